/// Products of small matrices (landmarks by landmarks) with the library's own register tile: Eigen's would allocate.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/panel.hpp>
#include <attn/detail/partition.hpp>
#include <attn/detail/register_tile.hpp>
#include <attn/detail/upcoming.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <span>

namespace attn::detail {

/// Whether the right operand of a product is taken as it is or transposed.
enum class Right { plain, transposed };

/// panel <- depth x width of b (plain: rows first .., columns column ..) or of b^T, zeros beyond its columns.
template <Right kRight, class T>
void pack_right(const ConstMatrixRef<T>& b, Range depth, Range columns, int packets, T* panel) {
  const Index width = packets * kLanes<T>;
  if constexpr (kRight == Right::plain) {
    for (Index l = depth.first; l < depth.last; ++l, panel += width) {
      const T* row = b.data() + l * b.outerStride();
      for (Index p = 0; p < width; p += kLanes<T>) store(panel + p, load_row(row, columns.first + p, columns.last));
    }
  } else {
    for (Index p = 0; p < width; p += kLanes<T>) {
      const T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        const Index column = columns.first + p + i;
        rows[i] = column < columns.last ? b.data() + column * b.outerStride() + depth.first : nullptr;
      }
      pack_rows<T>(rows, depth.last - depth.first, nullptr, T(1), panel + p, width);
    }
  }
}

/// What each row of a product is multiplied by: element i of data, or with step 0 one factor for all.
template <class T>
struct RowFactors {
  const T* data;
  Index step;
};

/// c (rows, columns) <- keep c + tile, whose rows hold width elements.
template <class T>
[[gnu::noinline]] void add_tile(const T* tile, Index rows, Index width, T keep, T* c, Index stride, Index columns) {
  for (Index r = 0; r < rows; ++r, tile += width, c += stride) {
    for (Index at = 0; at < columns; at += kLanes<T>) {
      const auto x = load(tile + at);
      store_row(c, at, columns, keep == 0 ? x : multiply_add(broadcast(keep), load_row(c, at, columns), x));
    }
  }
}

/// c <- keep c + diag(factor) a b for some rows and columns of c, b given as a packed panel; Left::column_major takes a^T for a.
/// What is upcoming is fetched meanwhile.
template <Left kLeft, int kPackets, class T>
[[gnu::noinline]] void multiply_panel(const RowFactors<T>& factor, const ConstMatrixRef<T>& a, Range depth, const T* panel, T keep,
                                      MatrixRef<T> c, Range rows, Range columns, const Upcoming& upcoming) {
  constexpr Index kWidth = kPackets * kLanes<T>;
  const Index row_step = kLeft == Left::row_major ? a.outerStride() : 1,
              depth_step = kLeft == Left::row_major ? 1 : a.outerStride();
  const bool stores = keep == 0 && columns.last - columns.first == kWidth;
  for_each_tile<kPanelRows<kPackets>>(rows.last - rows.first, [&](Index r0, auto count) __attribute__((always_inline)) {
    upcoming.fetch(r0, count, rows.last - rows.first);
    Packet<T> tile[extent(count)][extent(kPackets)];
    multiply_tile<kLeft>(a.data() + (rows.first + r0) * row_step + depth.first * depth_step, a.outerStride(), panel,
                         depth.last - depth.first, tile);
    alignas(64) T buffer[extent(count * kWidth)];
    T* to = c.data() + (rows.first + r0) * c.outerStride() + columns.first;
    T* out = stores ? to : buffer;
    const Index out_stride = stores ? c.outerStride() : kWidth;
    const T* row_factor = factor.data + (rows.first + r0) * factor.step;
    unroll<count, kPackets>([&](int r, int p) __attribute__((always_inline)) {
      store_unaligned(out + r * out_stride + p * kLanes<T>, broadcast(row_factor[r * factor.step]) * tile[r][p]);
    });
    if (!stores) add_tile<T>(buffer, count, kWidth, keep, to, c.outerStride(), columns.last - columns.first);
  });
}

/// c <- keep c + scale a b, with a^T for Left::column_major and b^T for Right::transposed. c must not overlap a or b, and is not
/// read where keep is 0. Sums run over at most 256 terms at a time.
template <class T, Left kLeft = Left::row_major, Right kRight = Right::plain>
void gemm(T scale, const ConstMatrixRef<T>& a, const ConstMatrixRef<T>& b, T keep, MatrixRef<T> c, Context& context) {
  constexpr Index kRowBlock = 256, kDepth = 256, kWidth = kPanelPackets * kLanes<T>;
  const Index column_packets = (c.cols() + kLanes<T> - 1) / kLanes<T>;
  constexpr Index kWorthSharing = 4 << 20;  // multiply-adds: below, waking the workers costs more
  const Index row_blocks = (c.rows() + kRowBlock - 1) / kRowBlock, strips = (column_packets + kPanelPackets - 1) / kPanelPackets;
  const Index terms = kLeft == Left::row_major ? a.cols() : a.rows();
  Scratch scratch = context.scratch();
  const std::span<T> panels = scratch.array<T>(context.workers() * kDepth * kWidth);
  const auto multiply = [&](Index item, int worker) {
    T* panel = panels.data() + worker * kDepth * kWidth;
    const Range rows = nth_part(c.rows(), row_blocks, item / strips);
    const Range strip = nth_part(column_packets, strips, item % strips);
    const Range columns{strip.first * kLanes<T>, std::min(c.cols(), strip.last * kLanes<T>)};
    const int packets = static_cast<int>(strip.last - strip.first);
    for (Index first = 0; first < terms; first += kDepth) {
      const Range depth{first, std::min(terms, first + kDepth)};
      pack_right<kRight, T>(b, depth, columns, packets, panel);
      with_packets<kPanelPackets>(packets, [&](auto count) {
        multiply_panel<kLeft, count, T>({&scale, 0}, a, depth, panel, first == 0 ? keep : T(1), c, rows, columns, {});
      });
    }
  };
  if (c.rows() * c.cols() * terms >= kWorthSharing) return context.for_each(row_blocks * strips, multiply);
  for (Index item = 0; item < row_blocks * strips; ++item) multiply(item, 0);
}

}  // namespace attn::detail
