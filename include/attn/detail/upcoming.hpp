/// Memory that is about to be used.
#pragma once

#include <attn/detail/partition.hpp>
#include <attn/matrix.hpp>

#include <algorithm>

namespace attn::detail {

/// Rows of a matrix that will soon be read or written. Fetched into the cache a few at a time, between the steps of a loop whose
/// arithmetic hides the wait: the processor's own prefetching stops at the end of each 4 KiB page, which is 16 rows of 64 floats.
class Upcoming {
 public:
  Upcoming() = default;

  /// The given rows of m, as far as m has them.
  template <class T>
  static Upcoming of(const ConstMatrixRef<T>& m, Range rows) {
    Upcoming upcoming;
    if (rows.first >= std::min(rows.last, m.rows())) return upcoming;
    upcoming.data_ = reinterpret_cast<const char*>(m.data() + rows.first * m.outerStride());
    upcoming.rows_ = std::min(rows.last, m.rows()) - rows.first;
    upcoming.row_bytes_ = m.cols() * Index{sizeof(T)};
    upcoming.stride_ = m.outerStride() * Index{sizeof(T)};
    return upcoming;
  }

  /// The share of all rows that falls to steps [first, first + count) of a loop of so many steps.
  [[gnu::always_inline]] inline void fetch(Index first, Index count, Index steps) const {
    if (rows_ == 0) return;
    const Index last = rows_ * (first + count) / steps;
    for (Index row = rows_ * first / steps; row < last; ++row) fetch_row(row);
  }

  /// All rows.
  void fetch() const {
    for (Index row = 0; row < rows_; ++row) fetch_row(row);
  }

 private:
  static constexpr Index kLine = 64;

  [[gnu::always_inline]] inline void fetch_row(Index row) const {
    for (Index byte = 0; byte < row_bytes_; byte += kLine) __builtin_prefetch(data_ + row * stride_ + byte, 0, 2);
  }

  const char* data_ = nullptr;
  Index rows_ = 0, row_bytes_ = 0, stride_ = 0;
};

}  // namespace attn::detail
