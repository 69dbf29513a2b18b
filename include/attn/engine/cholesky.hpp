/// Solving with a symmetric positive semidefinite matrix, in blocks whose work is products.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <utility>

namespace attn::detail {

/// inverse <- L^-1 for the factor a = L L^T of one diagonal block, of which a's lower triangle is given. A pivot of at
/// most tolerance makes its row and column 0. Returns the smallest pivot.
template <class T>
T invert_factor(MatrixRef<T> a, T tolerance, MatrixRef<T> inverse) {
  const Index n = a.rows();
  T* const l = a.data();
  const Index stride = a.outerStride();
  T smallest = std::numeric_limits<T>::infinity();
  inverse.setZero();
  for (Index j = 0; j < n; ++j) {
    T* row = l + j * stride;
    for (Index c = 0; c < j; ++c) {
      T x = row[c];
      for (Index t = 0; t < c; ++t) x -= row[t] * l[c * stride + t];
      row[c] = x * inverse(c, c);
    }
    T pivot = row[j];
    for (Index t = 0; t < j; ++t) pivot -= row[t] * row[t];
    smallest = std::min(smallest, pivot);
    inverse(j, j) = pivot <= tolerance ? T(0) : 1 / std::sqrt(pivot);
    T* const inverse_row = row_of(inverse, j);
    for (Index t = 0; t < j; ++t) add_row(row[t], row_of(inverse, t), inverse_row, t + 1);
    scale_row(-inverse_row[j], inverse_row, inverse_row, j);
  }
  return smallest;
}

/// order <- the rows of a (m, m) in the order of a factorisation that takes the largest pivot left, first those that it
/// takes: until what is left of the diagonal is at most tolerance, or no further above 0 than rounding has brought some
/// of it below. Returns how many. Row i of factor (m, m) <- row i of the factor, without the rows' order. NaN counts as
/// largest. m r^2 flops for r rows. Higham 1990.
template <class T>
Index choose_pivots(const ConstMatrixRef<T>& a, T tolerance, MatrixRef<T> factor, std::span<T> left,
                    std::span<Index> order) {
  const auto count = static_cast<Index>(order.size()), stride = factor.outerStride();
  const auto of = [&](Index i) -> T& { return left[static_cast<std::size_t>(i)]; };
  for (Index i = 0; i < count; ++i) of(order[static_cast<std::size_t>(i)] = i) = a(i, i);
  for (Index rank = 0; rank < count; ++rank) {
    const std::span<Index> rest = part_of(order, rank, count - rank);
    T floor = tolerance;
    for (const Index i : rest) floor = std::max(floor, -of(i));
    const auto largest = std::max_element(
        rest.begin(), rest.end(), [&](Index i, Index j) { return of(i) < of(j) || (is_nan(of(j)) && !is_nan(of(i))); });
    if (of(*largest) <= floor) return rank;
    std::swap(rest.front(), *largest);
    const T* const row = factor.data() + rest.front() * stride;
    const T root = std::sqrt(of(rest.front()));
    for (const Index i : rest) {
      T* const other = factor.data() + i * stride;
      other[rank] = (a(i, rest.front()) - dot_product(row, other, rank)) / root;
      of(i) -= other[rank] * other[rank];
    }
  }
  return count;
}

/// Solves with a symmetric positive semidefinite matrix a = L L^T (m, m), factorised in place, left-looking in blocks
/// of columns: m^3 / 3 flops. Golub and Van Loan 2013, section 4.2. Where a pivot comes near to what rounding leaves of
/// 0, pivots are chosen by their size (section 4.2.8). Rows that then have none depend on the others but for rounding:
/// they are left out, the result is 0 there.
template <class T>
class Cholesky {
 public:
  Cholesky(MatrixRef<T> a, Scratch& scratch, Context& context)
      : l_(a),
        inverses_(scratch.matrix<T>(a.rows(), kBlock)),
        copy_(scratch.matrix<T>(a.rows(), kBlock)),
        rank_(a.rows()),
        context_(context) {
    MatrixRef<T> blocks = scratch.matrix<T>(a.rows(), kBlock);
    T largest = 0;
    for (Index j = 0; j < a.rows(); ++j) largest = std::max(largest, a(j, j));
    for (Index j = 0; j < a.rows(); j += kBlock)
      set_scaled<T>(blocks.block(j, 0, width(j), width(j)), 1, diagonal_block(j));
    const T tolerance = largest * static_cast<T>(a.rows()) * std::numeric_limits<T>::epsilon();
    if (factorise(tolerance) > kSafety * tolerance) return;
    restore(blocks);
    choose_rows(tolerance, scratch);
    factorise(tolerance);
  }

  /// x (m, columns) <- a^-1 x. 2 m^2 columns flops.
  void solve(MatrixRef<T> x) {
    if (order_.empty()) return solve_in_order(x);
    Scratch scratch = context_.scratch();
    MatrixRef<T> chosen = scratch.matrix<T>(rank_, x.cols());
    for (Index i = 0; i < rank_; ++i) chosen.row(i) = x.row(row(i));
    solve_in_order(chosen);
    set_zero(x);
    for (Index i = 0; i < rank_; ++i) x.row(row(i)) = chosen.row(i);
  }

 private:
  static constexpr Index kBlock = kTileWidth<T>;
  static constexpr T kSafety = 8;  ///< how far above the tolerance pivots in the given order may be relied on

  Index width(Index j) const { return std::min(kBlock, rank_ - j); }
  Index row(Index i) const { return order_[static_cast<std::size_t>(i)]; }
  MatrixRef<T> inverse(Index j) { return inverses_.block(j, 0, width(j), width(j)); }
  MatrixRef<T> diagonal_block(Index j) { return l_.block(j, j, width(j), width(j)); }

  /// L from the lower triangle of a, in the order of its rows. Returns the smallest pivot.
  T factorise(T tolerance) {
    T smallest = std::numeric_limits<T>::infinity();
    for (Index j = 0; j < rank_; j += kBlock) {
      const Index n = width(j), below = rank_ - j - n;
      if (j > 0) {
        gemm<T>(-1, l_.block(j, 0, n + below, j), transposed(l_.block(j, 0, n, j)), 1, l_.block(j, j, n + below, n),
                context_);
      }
      smallest = std::min(smallest, invert_factor<T>(diagonal_block(j), tolerance, inverse(j)));
      MatrixRef<T> column = copy_.topLeftCorner(below, n);
      column = l_.block(j + n, j, below, n);
      gemm<T>(1, column, transposed(inverse(j)), 0, l_.block(j + n, j, below, n), context_);
    }
    return smallest;
  }

  /// a as it was: its diagonal blocks are given, and what is above them has not changed.
  void restore(const MatrixRef<T>& blocks) {
    for (Index j = 0; j < rank_; j += kBlock) {
      const Index n = width(j), below = rank_ - j - n;
      diagonal_block(j) = blocks.block(j, 0, n, n);
      set_transposed<T>(l_.block(j + n, j, below, n), 1, l_.block(j, j + n, n, below));
    }
  }

  /// a <- its rows and columns that have pivots, in their order.
  void choose_rows(T tolerance, Scratch& scratch) {
    const Index m = rank_;
    order_ = scratch.array<Index>(m);
    Scratch temporary = scratch.nested();
    MatrixRef<T> factor = temporary.matrix<T>(m, m);
    rank_ = choose_pivots<T>(l_, tolerance, factor, temporary.array<T>(m), order_);
    for (Index i = 0; i < rank_; ++i) {
      for (Index j = 0; j < rank_; ++j) factor(i, j) = l_(row(i), row(j));
    }
    set_scaled<T>(l_.topLeftCorner(rank_, rank_), 1, factor.topLeftCorner(rank_, rank_));
  }

  /// x (rank, columns) <- the solution for rows in the factor's order.
  void solve_in_order(MatrixRef<T> x) {
    const Index last = (rank_ - 1) / kBlock * kBlock;
    for (Index j = 0; j < rank_; j += kBlock) {
      const Index n = width(j);
      if (j > 0) gemm<T>(-1, l_.block(j, 0, n, j), x.topRows(j), 1, x.middleRows(j, n), context_);
      multiply_block(inverse(j), j, x);
    }
    for (Index j = last; j >= 0 && rank_ > 0; j -= kBlock) {
      const Index n = width(j), below = rank_ - j - n;
      if (below > 0) {
        gemm<T>(-1, transposed(l_.block(j + n, j, below, n)), x.bottomRows(below), 1, x.middleRows(j, n), context_);
      }
      multiply_block(transposed(inverse(j)), j, x);
    }
  }

  /// Rows j .. of x, multiplied by a: the inverse of their diagonal block, or its transpose.
  void multiply_block(const Operand<T>& a, Index j, MatrixRef<T> x) {
    for (Index c = 0; c < x.cols(); c += kBlock) {
      MatrixRef<T> block = x.block(j, c, width(j), std::min(kBlock, x.cols() - c));
      MatrixRef<T> copy = copy_.topLeftCorner(block.rows(), block.cols());
      copy = block;
      gemm<T>(1, a, copy, 0, block, context_);
    }
  }

  MatrixRef<T> l_, inverses_;  // L below the diagonal blocks; the inverses of those, one below the other
  MatrixRef<T> copy_;
  Index rank_;                // rows of L
  std::span<Index> order_{};  // which rows of a they are; empty: as they come
  Context& context_;
};

}  // namespace attn::detail
