/// What is done to matrices element by element. Eigen would do the same, but takes the compiler ten times as long.
#pragma once

#include <attn/engine/panel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <type_traits>

namespace attn::detail {

/// to <- factor from.
template <class T>
void set_scaled(const MatrixRef<T>& to, std::type_identity_t<T> factor,
                const std::type_identity_t<ConstMatrixRef<T>>& from) {
  for (Index i = 0; i < to.rows(); ++i) {
    scale_row(factor, from.data() + i * from.outerStride(), to.data() + i * to.outerStride(), to.cols());
  }
}

/// to <- factor from^T.
template <class T>
void set_transposed(const MatrixRef<T>& to, std::type_identity_t<T> factor,
                    const std::type_identity_t<ConstMatrixRef<T>>& from) {
  for (Index i = 0; i < to.rows(); ++i) {
    T* row = to.data() + i * to.outerStride();
    for (Index j = 0; j < to.cols(); ++j) row[j] = factor * from.data()[j * from.outerStride() + i];
  }
}

/// to <- 0.
template <class T>
void set_zero(const MatrixRef<T>& to) {
  for (Index i = 0; i < to.rows(); ++i) std::fill_n(to.data() + i * to.outerStride(), to.cols(), T(0));
}

/// The largest magnitude of a's elements.
template <class T>
T largest_magnitude(const ConstMatrixRef<T>& a) {
  auto top = broadcast(T(0));
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index j = 0; j < a.cols(); j += kLanes<T>) {
      const auto x = load_row(a.data() + i * a.outerStride(), j, a.cols());
      top = max(top, max(x, broadcast(T(0)) - x));
    }
  }
  return largest(top);
}

/// a <- a + x I.
template <class T>
void add_to_diagonal(const MatrixRef<T>& a, std::type_identity_t<T> x) {
  for (Index i = 0; i < a.rows(); ++i) a.data()[i * (a.outerStride() + 1)] += x;
}

}  // namespace attn::detail
