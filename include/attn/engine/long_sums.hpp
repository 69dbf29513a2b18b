/// Sums of many rows, in which no chain of additions is long: its rounding errors grow with its length.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/panel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <span>

namespace attn::detail {

/// Sums of rows of d elements as sums of at most kTerms terms, each of which is such a sum again.
template <class T>
class LongSums {
 public:
  static constexpr Index kTerms = 256;

  /// For up to count rows, by any of the workers.
  LongSums(Index count, Index d, Index workers, Scratch& scratch)
      : d_(d), levels_(levels_of(count)), partial_(scratch.elements<T>(workers * levels_ * d)) {}

  /// sum <- sum + count rows: add(some, to) adds the next some of them, at most kTerms, to a row.
  template <class Add>
  void add(Index count, int worker, T* sum, Add&& add) const {
    add_level(count, partial_ + worker * levels_ * d_, sum, add);
  }

 private:
  static Index levels_of(Index count) {
    Index levels = 0;
    for (; count > kTerms; count = (count + kTerms - 1) / kTerms) ++levels;
    return levels;
  }

  template <class Add>
  void add_level(Index count, T* partial, T* sum, Add& add) const {
    if (count <= kTerms) return add(count, sum);
    Index part = kTerms;
    while (part * kTerms < count) part *= kTerms;
    for (; count > 0; count -= part) {
      std::fill_n(partial, d_, T(0));
      add_level(std::min(part, count), partial + d_, partial, add);
      add_row(T(1), partial, sum, d_);
    }
  }

  Index d_, levels_;
  T* partial_;
};

}  // namespace attn::detail
