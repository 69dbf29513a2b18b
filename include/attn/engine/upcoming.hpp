/// Memory that is about to be used.
#pragma once

#include <attn/engine/partition.hpp>
#include <attn/engine/token_rows.hpp>
#include <attn/matrix.hpp>

#include <algorithm>

namespace attn::detail {

/// Rows of a matrix that will soon be read or written. Fetched into the cache a few at a time, between the steps of a
/// loop whose arithmetic hides the wait: the processor's own prefetching stops at the end of each 4 KiB page, which is
/// 16 rows of 64 floats.
class Upcoming {
 public:
  Upcoming() = default;

  /// The given rows of m, as far as m has them.
  [[gnu::noinline]] static Upcoming of(const MemoryRows& m, Range rows) {
    Upcoming upcoming;
    if (rows.first >= std::min(rows.last, m.rows)) return upcoming;
    upcoming.memory_ = {m.row(rows.first), std::min(rows.last, m.rows) - rows.first, m.row_bytes, m.stride_bytes};
    return upcoming;
  }

  /// The share of all rows that falls to steps [first, first + count) of a loop of so many steps.
  [[gnu::always_inline]] inline void fetch(Index first, Index count, Index steps) const {
    if (memory_.rows != 0) fetch({memory_.rows * first / steps, memory_.rows * std::min(first + count, steps) / steps});
  }

  /// All rows.
  void fetch() const { fetch({0, memory_.rows}); }

 private:
  static constexpr Index kLine = 64;

  /// Not inlined: all kernels call it.
  [[gnu::noinline]] void fetch(Range rows) const {
    for (Index row = rows.first; row < rows.last; ++row) {
      for (Index byte = 0; byte < memory_.row_bytes; byte += kLine) __builtin_prefetch(memory_.row(row) + byte, 0, 2);
    }
  }

  MemoryRows memory_{};
};

}  // namespace attn::detail
