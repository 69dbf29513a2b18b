/// Cores: what stands between the two landmark factors of an approximation, in place of an inverse of the landmarks' own matrix.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/checks.hpp>
#include <attn/detail/cholesky.hpp>
#include <attn/detail/gemm.hpp>
#include <attn/detail/kernel_matrix.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <string_view>

namespace attn {

/// A core of one's own: apply(a, x, context) overwrites x (m, columns) with what replaces a^-1 x; it may destroy a (m, m).
/// check(who) throws std::invalid_argument when an option is out of range.
template <class C, class T>
concept Core = std::copyable<C> && requires(const C& core, MatrixRef<T> a, MatrixRef<T> x, Context& context, std::string_view who) {
  core.apply(a, x, context);
  core.check(who);
};

/// (A + gamma I)^-1 for a symmetric positive semidefinite A, by Cholesky. A direction in which A + gamma I is 0 but for rounding
/// (duplicate landmarks, gamma = 0) is left out. m^3 / 3 flops.
struct RidgeInverse {
  double gamma = 0.1;

  void check(std::string_view who) const { detail::check_at_least(who, "gamma", gamma, 0); }

  template <class T>
  void apply(MatrixRef<T> a, MatrixRef<T> x, Context& context) const {
    Scratch scratch = context.scratch();
    a.diagonal().array() += static_cast<T>(gamma);
    detail::Cholesky<T>(a, scratch, context).solve(x);
  }
};

namespace detail {

/// The largest sum of magnitudes of a row, |a|_inf. By loops: Eigen's own reductions make GCC 12 warn in a build for AVX-512.
template <class T>
T largest_row_sum(const ConstMatrixRef<T>& a) {
  T largest = 0;
  for (Index i = 0; i < a.rows(); ++i) {
    T sum = 0;
    for (Index j = 0; j < a.cols(); ++j) sum += std::abs(a.data()[i * a.outerStride() + j]);
    largest = std::max(largest, sum);
  }
  return largest;
}

/// z <- (z (13 I - az (15 I - az (7 I - az)))) / 4 with az = a z, iterations times. a, z (m, m). 8 m^3 flops each.
/// Razavi et al. 2014; Xiong et al. 2021, eq. 11.
template <class T>
void iterate_pinv(const ConstMatrixRef<T>& a, MatrixRef<T> z, int iterations, Context& context) {
  Scratch scratch = context.scratch();
  const Index m = a.rows();
  auto az = scratch.matrix<T>(m, m), even = scratch.matrix<T>(m, m), odd = scratch.matrix<T>(m, m);
  for (int i = 0; i < iterations; ++i) {
    gemm<T>(1, a, z, 0, az, context);
    even = -az;
    even.diagonal().array() += T(7);
    gemm<T>(-1, az, even, 0, odd, context);
    odd.diagonal().array() += T(15);
    gemm<T>(-1, az, odd, 0, even, context);
    even.diagonal().array() += T(13);
    gemm<T>(T(0.25), z, even, 0, odd, context);
    z = odd;
  }
}

}  // namespace detail

/// What stands for the inverse of A, rows of softmax between landmarks, in Nystromformer: iterations steps from A^T / (|A|_1 |A|_inf).
/// On an eigenvalue x of A Z one step takes 1 - x to (3 (1 - x)^3 + (1 - x)^4) / 4, so small ones grow 3.25 times a step: six steps
/// are a spectral filter, and far better than the pseudo-inverse that more of them would reach. 8 m^3 flops a step.
/// Razavi et al. 2014; Xiong et al. 2021, eqs. 11-12.
struct IterativePinv {
  int iterations = 6;

  void check(std::string_view who) const { detail::check_at_least(who, "iterations", iterations, 1); }

  /// z (m, m) <- what stands for the inverse of a (m, m).
  template <class T>
  void invert(const ConstMatrixRef<T>& a, MatrixRef<T> z, Context& context) const {
    z = a.transpose();
    z /= detail::largest_row_sum<T>(a) * detail::largest_row_sum<T>(z);
    detail::iterate_pinv<T>(a, z, iterations, context);
  }

  template <class T>
  void apply(MatrixRef<T> a, MatrixRef<T> x, Context& context) const {
    Scratch scratch = context.scratch();
    MatrixRef<T> z = scratch.matrix<T>(a.rows(), a.rows()), old = scratch.matrix<T>(x.rows(), x.cols());
    invert<T>(a, z, context);
    old = x;
    detail::gemm<T>(1, z, old, 0, x, context);
  }
};

/// The paper's inverse of A + gamma I: six steps of the iteration for P = D^-1/2 (A + gamma I) D^-1/2, D = diag((A + gamma I) 1),
/// from P^T / |P|_1, then D^-1/2 Z D^-1/2. 8 m^3 flops a step; RidgeInverse is cheaper and exact. Chen et al. 2021, section 4.4.
struct PreconditionedPinv {
  double gamma = 0.1;
  int iterations = 6;

  void check(std::string_view who) const {
    detail::check_at_least(who, "gamma", gamma, 0);
    detail::check_at_least(who, "iterations", iterations, 1);
  }

  template <class T>
  void apply(MatrixRef<T> a, MatrixRef<T> x, Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = a.rows();
    MatrixRef<T> scale = scratch.matrix<T>(m, 1), z = scratch.matrix<T>(m, m), product = scratch.matrix<T>(m, x.cols());
    a.diagonal().array() += static_cast<T>(gamma);
    for (Index i = 0; i < m; ++i) scale(i, 0) = 1 / std::sqrt(detail::largest_row_sum<T>(a.row(i)));
    for (Index i = 0; i < m; ++i) a.row(i).array() *= scale(i, 0) * scale.col(0).transpose().array();
    z = a.transpose() / detail::largest_row_sum<T>(a);  // |P|_1 = |P|_inf, for P is symmetric
    detail::iterate_pinv<T>(a, z, iterations, context);
    x.array().colwise() *= scale.col(0).array();
    detail::gemm<T>(1, z, x, 0, product, context);
    x = product.array().colwise() * scale.col(0).array();
  }
};

static_assert(Core<RidgeInverse, float> && Core<IterativePinv, float> && Core<PreconditionedPinv, double>);

}  // namespace attn
