/// Solving with a symmetric positive semidefinite matrix, in blocks whose work is products.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/gemm.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <limits>

namespace attn::detail {

/// inverse <- L^-1 for the factor a = L L^T of one diagonal block, of which a's lower triangle is given. A pivot that is 0 but for
/// rounding (at most tolerance) makes its row and column 0: that direction is left out, as in a pseudo-inverse.
template <class T>
void invert_factor(MatrixRef<T> a, T tolerance, MatrixRef<T> inverse) {
  const Index n = a.rows();
  T* const l = a.data();
  const Index stride = a.outerStride();
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
    inverse(j, j) = pivot <= tolerance ? T(0) : 1 / std::sqrt(pivot);
    for (Index c = 0; c < j; ++c) {
      T x = 0;
      for (Index t = c; t < j; ++t) x += row[t] * inverse(t, c);
      inverse(j, c) = -inverse(j, j) * x;
    }
  }
}

/// Solves with a symmetric positive semidefinite matrix a = L L^T (m, m), factorised in place, left-looking in blocks of columns:
/// m^3 / 3 flops. Reads a's lower triangle alone. Golub and Van Loan 2013, section 4.2.
template <class T>
class Cholesky {
 public:
  Cholesky(MatrixRef<T> a, Scratch& scratch, Context& context)
      : l_(a), inverses_(scratch.matrix<T>(a.rows(), kBlock)), copy_(scratch.matrix<T>(a.rows(), kBlock)), context_(context) {
    T largest = 0;
    for (Index j = 0; j < a.rows(); ++j) largest = std::max(largest, a(j, j));
    const T tolerance = largest * static_cast<T>(a.rows()) * std::numeric_limits<T>::epsilon();
    for (Index j = 0; j < l_.rows(); j += kBlock) {
      const Index n = width(j), below = l_.rows() - j - n;
      if (j > 0) {
        gemm<T>(-1, l_.block(j, 0, n + below, j), transposed(l_.block(j, 0, n, j)), 1, l_.block(j, j, n + below, n), context_);
      }
      invert_factor<T>(l_.block(j, j, n, n), tolerance, inverse(j));
      MatrixRef<T> column = copy_.topLeftCorner(below, n);
      column = l_.block(j + n, j, below, n);
      gemm<T>(1, column, transposed(inverse(j)), 0, l_.block(j + n, j, below, n), context_);
    }
  }

  /// x (m, columns) <- a^-1 x. 2 m^2 columns flops.
  void solve(MatrixRef<T> x) {
    const Index m = l_.rows(), last = (m - 1) / kBlock * kBlock;
    for (Index j = 0; j < m; j += kBlock) {
      const Index n = width(j);
      if (j > 0) gemm<T>(-1, l_.block(j, 0, n, j), x.topRows(j), 1, x.middleRows(j, n), context_);
      multiply_block(inverse(j), j, x);
    }
    for (Index j = last; j >= 0; j -= kBlock) {
      const Index n = width(j), below = m - j - n;
      if (below > 0) {
        gemm<T>(-1, transposed(l_.block(j + n, j, below, n)), x.bottomRows(below), 1, x.middleRows(j, n), context_);
      }
      multiply_block(transposed(inverse(j)), j, x);
    }
  }

 private:
  static constexpr Index kBlock = kTileWidth<T>;

  Index width(Index j) const { return std::min(kBlock, l_.rows() - j); }
  MatrixRef<T> inverse(Index j) { return inverses_.block(j, 0, width(j), width(j)); }

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
  Context& context_;
};

}  // namespace attn::detail
