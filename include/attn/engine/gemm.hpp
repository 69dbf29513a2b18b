/// Products of small matrices (landmarks by landmarks) with the library's own register tile: Eigen's would allocate.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/panels.hpp>
#include <attn/engine/partition.hpp>
#include <attn/matrix.hpp>

namespace attn::detail {

/// c <- keep c + scale a b; a and b may be transposed(...). c must not overlap a or b, and is not read where keep is 0.
/// Sums run over at most 256 terms at a time.
template <class T>
void gemm(T scale, const Operand<T>& a, const Operand<T>& b, T keep, const MatrixRef<T>& c, Context& context) {
  constexpr Index kBlockRows = 256, kWorthSharing = 4 << 20;  // multiply-adds: below, waking the workers costs more
  Scratch scratch = context.scratch();
  const Panels<T> panels = Panels<T>::pack(b, scratch);
  const Index blocks = (c.rows() + kBlockRows - 1) / kBlockRows, strips = panels.strips();
  const auto multiply_item = [&](Index item, int) {
    const Range rows = nth_part(c.rows(), blocks, item / strips);
    panels.multiply_strip(item % strips, {&scale, 0}, a.some_rows(rows), keep, rows_of(c, rows), {});
  };
  const TaskRef multiply(multiply_item);
  if (c.rows() * c.cols() * a.cols >= kWorthSharing) return context.for_each(blocks * strips, multiply);
  for (Index item = 0; item < blocks * strips; ++item) multiply(item, 0);
}

}  // namespace attn::detail
