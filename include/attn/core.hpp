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

/// Sum of a row, by a loop: Eigen's own reductions make GCC 12 warn in a consumer's build for AVX-512.
template <class T>
T row_sum(MatrixRef<T> a, Index i) {
  T sum = 0;
  for (Index j = 0; j < a.cols(); ++j) sum += a.data()[i * a.outerStride() + j];
  return sum;
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
    for (Index i = 0; i < m; ++i) scale(i, 0) = 1 / std::sqrt(detail::row_sum(a, i));
    for (Index i = 0; i < m; ++i) a.row(i).array() *= scale(i, 0) * scale.col(0).transpose().array();
    T norm = 0;  // |P|_1, by rows, for P is symmetric and positive
    for (Index i = 0; i < m; ++i) norm = std::max(norm, detail::row_sum(a, i));
    z = a.transpose() / norm;
    detail::iterate_pinv<T>(a, z, iterations, context);
    x.array().colwise() *= scale.col(0).array();
    detail::gemm<T>(1, z, x, 0, product, context);
    x = product.array().colwise() * scale.col(0).array();
  }
};

static_assert(Core<RidgeInverse, float> && Core<PreconditionedPinv, double>);

}  // namespace attn
