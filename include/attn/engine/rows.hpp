/// Loops over rows of numbers: what is done to matrices but for their products. Eigen would do the same, but takes the
/// compiler ten times as long.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/simd.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cstddef>
#include <functional>
#include <limits>
#include <new>
#include <span>
#include <type_traits>

namespace attn::detail {

/// Half-open range of indices.
struct Range {
  Index first, last;
};

/// Part i of [0, n) cut into count parts, as evenly as they go.
inline Range nth_part(Index n, Index count, Index i) {
  return {n * i / count, n * (i + 1) / count};
}

/// The count first elements of a packet from memory, fewer than it has lanes; fill in the others. Not inlined, and so
/// compiled once.
template <class T>
[[gnu::noinline]] Packet<T> load_some(const T* from, Index count, T fill) {
  alignas(64) T lanes[kLanes<T>];
  for (Index i = 0; i < kLanes<T>; ++i) lanes[i] = i < count ? from[i] : fill;
  return load(lanes);
}

/// The count first lanes of a packet, to memory.
template <class T>
[[gnu::noinline]] void store_some(T* to, Index count, Packet<T> x) {
  alignas(64) T lanes[kLanes<T>];
  store(lanes, x);
  for (Index i = 0; i < count; ++i) to[i] = lanes[i];
}

/// Lanes [first, first + kLanes) of a row of length d, beyond it what fills them.
template <class T>
inline Packet<T> load_row(const T* row, Index first, Index d, T fill = 0) {
  return first + kLanes<T> <= d ? load_unaligned(row + first) : load_some(row + first, d - first, fill);
}

/// load_row of a row that may be null, which is all zeros.
template <class T>
inline Packet<T> load_row_if(const T* row, Index first, Index d) {
  return row == nullptr ? broadcast(T(0)) : load_row(row, first, d);
}

template <class T>
inline void store_row(T* row, Index first, Index d, Packet<T> x) {
  first + kLanes<T> <= d ? store_unaligned(row + first, x) : store_some(row + first, d - first, x);
}

/// a.b of rows of length d.
template <class T>
[[gnu::noinline]] T dot_product(const T* a, const T* b, Index d) {
  auto products = broadcast(T(0));
  Index c = 0;
  for (; c + kLanes<T> <= d; c += kLanes<T>)
    products = multiply_add(load_unaligned(a + c), load_unaligned(b + c), products);
  T total = sum(products);
  for (; c < d; ++c) total += a[c] * b[c];
  return total;
}

/// to <- to + factor row, of length d.
template <class T>
[[gnu::noinline]] void add_row(T factor, const T* row, T* to, Index d) {
  Index c = 0;
  for (; c + kLanes<T> <= d; c += kLanes<T>) {
    store_unaligned(to + c, multiply_add(broadcast(factor), load_unaligned(row + c), load_unaligned(to + c)));
  }
  for (; c < d; ++c) to[c] += factor * row[c];
}

/// row <- row + x, of length d.
template <class T>
void add_to_row(T x, T* row, Index d) {
  for (Index c = 0; c < d; ++c) row[c] += x;
}

/// to <- factor row, of length d.
template <class T>
[[gnu::noinline]] void scale_row(T factor, const T* row, T* to, Index d) {
  Index c = 0;
  for (; c + kLanes<T> <= d; c += kLanes<T>) store_unaligned(to + c, broadcast(factor) * load_unaligned(row + c));
  for (; c < d; ++c) to[c] = factor * row[c];
}

/// to <- to + (the sum of count >= 1 rows), kPackets packets of each from element c on.
template <int kPackets, class T>
inline void add_columns(const T* const* rows, Index count, T* to, Index c) {
  Packet<T> total[static_cast<std::size_t>(kPackets)];
  for (int p = 0; p < kPackets; ++p) total[p] = load_unaligned(rows[0] + c + p * kLanes<T>);
  for (Index i = 1; i < count; ++i) {
    for (int p = 0; p < kPackets; ++p) total[p] = total[p] + load_unaligned(rows[i] + c + p * kLanes<T>);
  }
  for (int p = 0; p < kPackets; ++p) {
    T* const at = to + c + p * kLanes<T>;
    store_unaligned(at, load_unaligned(at) + total[p]);
  }
}

/// to <- to + (the sum of count >= 1 rows), of length d. Several packets of a row at a time, for memory is read fastest
/// in its order.
template <class T>
inline void add_rows(const T* const* rows, Index count, T* to, Index d) {
  constexpr int kPackets = 4;
  Index c = 0;
  for (; c + kPackets * kLanes<T> <= d; c += kPackets * kLanes<T>) add_columns<kPackets>(rows, count, to, c);
  for (; c + kLanes<T> <= d; c += kLanes<T>) add_columns<1>(rows, count, to, c);
  for (; c < d; ++c) {
    T total = rows[0][c];
    for (Index i = 1; i < count; ++i) total += rows[i][c];
    to[c] += total;
  }
}

/// to <- to + (a - b)^2, element by element of rows of length d.
template <class T>
inline void add_squared_difference(const T* a, const T* b, T* to, Index d) {
  for (Index first = 0; first < d; first += kLanes<T>) {
    const auto difference = load_row(a, first, d) - load_row(b, first, d);
    store_row(to, first, d, multiply_add(difference, difference, load_row(to, first, d)));
  }
}

/// |row|^2 of a row of length d.
template <class T>
inline T squared_norm(const T* row, Index d) {
  return dot_product(row, row, d);
}

/// |a - b|^2 of rows of length d, in short chains of sums.
template <class T>
T squared_distance(const T* a, const T* b, Index d) {
  auto squares = broadcast(T(0));
  Index c = 0;
  for (; c + kLanes<T> <= d; c += kLanes<T>) {
    const auto x = load_unaligned(a + c) - load_unaligned(b + c);
    squares = multiply_add(x, x, squares);
  }
  T total = d < kLanes<T> ? T(0) : sum(squares);
  for (; c < d; ++c) total += (a[c] - b[c]) * (a[c] - b[c]);
  return total;
}

/// The largest of n elements.
template <class T>
T row_maximum(const T* row, Index n) {
  auto top = broadcast(std::numeric_limits<T>::lowest());
  for (Index j = 0; j < n; j += kLanes<T>) top = max(top, load_row(row, j, n, std::numeric_limits<T>::lowest()));
  return largest(top);
}

/// The sum of n elements.
template <class T>
T row_sum(const T* row, Index n) {
  auto total = broadcast(T(0));
  for (Index j = 0; j < n; j += kLanes<T>) total = total + load_row(row, j, n);
  return sum(total);
}

/// Scores, count packets of them that begin step elements apart, <- weights 2^(score - top), no exponent above limit;
/// returns their sums, lane by lane.
template <class T>
inline Packet<T> weigh_packets(T* scores, Index count, Index step, Packet<T> top, T limit) {
  auto total = broadcast(T(0));
  for (const T* const end = scores + count * step; scores != end; scores += step) {
    const auto weight = exp2_bounded(min(load(scores) - top, broadcast(limit)));
    total = total + weight;
    store(scores, weight);
  }
  return total;
}

/// row (length n) <- exp2(row - origin); returns its sum.
template <class T>
T exponentiate(T* row, Index n, T origin) {
  auto total = broadcast(T(0));
  for (Index j = 0; j < n; j += kLanes<T>) {
    const auto weight = exp2(load_row(row, j, n, -std::numeric_limits<T>::infinity()) - broadcast(origin));
    total = total + weight;
    store_row(row, j, n, weight);
  }
  return sum(total);
}

/// row (length n) <- exp2(row), or with normalized rows what that is divided by its sum, taken relative to its maximum.
template <class T>
void weigh_row(T* row, Index n, Rows rows) {
  const T total = exponentiate(row, n, rows == Rows::normalized ? row_maximum(row, n) : T(0));
  if (rows == Rows::raw) return;
  for (Index j = 0; j < n; j += kLanes<T>) store_row(row, j, n, load_row(row, j, n) / broadcast(total));
}

/// Elements [first, first + count) of x. As sort_elements a template that is not constexpr, unlike what it is for:
/// constexpr functions are instantiated wherever a template names them, called or not.
template <class T>
std::span<T> part_of(std::span<T> x, Index first, Index count) {
  return x.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
}

/// x <- its n elements, sorted.
template <class T, class Less = std::less<>>
void sort_elements(T* x, Index n, const Less& less = {}) {
  std::sort(x, x + n, less);
}

/// view <- a view of what another one shows. Assignment would copy its elements.
template <class T>
void show(MatrixRef<T>& view, const MatrixRef<T>& other) {
  new (&view) MatrixRef<T>(other);
}

/// Where row i of a matrix begins.
template <class M>
auto row_of(const M& m, Index i) {
  return m.data() + i * m.outerStride();
}

/// to <- factor from.
template <class T>
[[gnu::noinline]] void set_scaled(const MatrixRef<T>& to, std::type_identity_t<T> factor,
                                  const std::type_identity_t<ConstMatrixRef<T>>& from) {
  for (Index i = 0; i < to.rows(); ++i) {
    scale_row(factor, row_of(from, i), row_of(to, i), to.cols());
  }
}

/// to <- factor from^T.
template <class T>
[[gnu::noinline]] void set_transposed(const MatrixRef<T>& to, std::type_identity_t<T> factor,
                                      const std::type_identity_t<ConstMatrixRef<T>>& from) {
  for (Index i = 0; i < to.rows(); ++i) {
    T* row = row_of(to, i);
    for (Index j = 0; j < to.cols(); ++j) row[j] = factor * from.data()[j * from.outerStride() + i];
  }
}

/// to <- 0.
template <class T>
[[gnu::noinline]] void set_zero(const MatrixRef<T>& to) {
  for (Index i = 0; i < to.rows(); ++i) std::fill_n(row_of(to, i), to.cols(), T(0));
}

/// The largest magnitude of a's elements.
template <class T>
T largest_magnitude(const ConstMatrixRef<T>& a) {
  auto top = broadcast(T(0));
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index j = 0; j < a.cols(); j += kLanes<T>) {
      const auto x = load_row(row_of(a, i), j, a.cols());
      top = max(top, max(x, broadcast(T(0)) - x));
    }
  }
  return largest(top);
}

/// a <- a + x I.
template <class T>
[[gnu::noinline]] void add_to_diagonal(const MatrixRef<T>& a, std::type_identity_t<T> x) {
  for (Index i = 0; i < a.rows(); ++i) a.data()[i * (a.outerStride() + 1)] += x;
}

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
  [[gnu::noinline]] void add_level(Index count, T* partial, T* sum, Add& add) const {
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
