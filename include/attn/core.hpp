/// Cores: what stands between the two landmark factors of an approximation, in place of an inverse of the landmarks'
/// own matrix.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/cholesky.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/few_keys.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <string_view>

namespace attn {

/// A core of one's own: apply(a, x, context) overwrites x (m, columns) with what replaces a^-1 x; it may destroy a (m,
/// m). backward(a, x, dx, da, context), for the same a and x, turns dx (m, columns), the gradient by apply's result,
/// into the gradient by x, and sets da (m, m) to the gradient by a; it may destroy a and x. check(who) throws
/// std::invalid_argument when an option is out of range; it may be a template check<T>(who), T what the core computes
/// in. A core that is right for symmetric a alone says so with a member static constexpr bool kSymmetricOnly = true:
/// Skyformer's and LiftedSoftmax's matrices are, Nystrom's are not and it refuses such a core. One without that member
/// is taken to be right for any a.
template <class C, class T>
concept Core = std::copyable<C> &&
               requires(const C& core, MatrixRef<T> a, MatrixRef<T> x, Context& context, std::string_view who) {
                 core.apply(a, x, context);
                 core.backward(a, x, x, a, context);
                 core.check(who);
               };

namespace detail {

template <class C>
inline constexpr bool kSymmetricOnly = false;

template <class C>
  requires requires { C::kSymmetricOnly; }
inline constexpr bool kSymmetricOnly<C> = C::kSymmetricOnly;

}  // namespace detail

/// A core that does not need a symmetric matrix.
template <class C, class T>
concept CoreOfAnyMatrix = Core<C, T> && !detail::kSymmetricOnly<C>;

/// (A + gamma I)^-1 for a symmetric positive semidefinite A, by Cholesky. A direction in which A + gamma I is 0 but for
/// rounding (duplicate landmarks, gamma = 0) is left out: the result is 0 at landmarks that depend on others, which
/// pivots choose. m^3 / 3 flops; with pivots, for r of m landmarks, m r^2 more.
struct RidgeInverse {
  double gamma = 0.1;  ///< at least 0

  /// Whether the options are the same.
  friend bool operator==(const RidgeInverse&, const RidgeInverse&) = default;

  /// @{ As Core says.
  static constexpr bool kSymmetricOnly = true;

  template <class T = double>
  void check(std::string_view who) const {
    detail::check_gamma<T>(who, gamma);
  }

  template <class T>
  void apply(MatrixRef<T> a, MatrixRef<T> x, Context& context) const {
    Scratch scratch = context.scratch();
    detail::add_to_diagonal(a, static_cast<T>(gamma));
    detail::Cholesky<T>(a, scratch, context).solve(x);
  }
  /// @}

  /// For y = (a + gamma I)^-1 x: dx <- (a + gamma I)^-1 dx, da = -dx y^T.
  template <class T>
  void backward(MatrixRef<T> a, MatrixRef<T> x, MatrixRef<T> dx, MatrixRef<T> da, Context& context) const {
    Scratch scratch = context.scratch();
    detail::add_to_diagonal(a, static_cast<T>(gamma));
    detail::Cholesky<T> factor(a, scratch, context);
    factor.solve(x);
    factor.solve(dx);
    detail::gemm<T>(-1, dx, detail::transposed(x), 0, da, context);
  }
};

namespace detail {

/// The largest sum of magnitudes of a row, |a|_inf. By loops: Eigen's own reductions make GCC 12 warn in a build for
/// AVX-512.
template <class T>
T largest_row_sum(const ConstMatrixRef<T>& a) {
  T largest = 0;
  for (Index i = 0; i < a.rows(); ++i) {
    auto total = broadcast(T(0));
    for (Index j = 0; j < a.cols(); j += kLanes<T>) {
      const auto x = load_row(row_of(a, i), j, a.cols());
      total = total + max(x, broadcast(T(0)) - x);
    }
    largest = std::max(largest, sum(total));
  }
  return largest;
}

/// 1 / |a|_inf; NaN where that overflows, for a factor of 0 would make something finite of it.
template <class T>
T reciprocal_row_sum(const ConstMatrixRef<T>& a) {
  const T sum = largest_row_sum<T>(a);
  return is_finite(sum) ? 1 / sum : std::numeric_limits<T>::quiet_NaN();
}

/// The largest magnitude of an element of z with which iterate_pinv takes a step: 1 / (64 epsilon |a|_inf). Beyond it a
/// z is little but rounding: what still grows are directions in which a is 0 but for rounding, and some steps later
/// nothing is finite.
template <class T>
T largest_iterate(const ConstMatrixRef<T>& a) {
  return 1 / (64 * std::numeric_limits<T>::epsilon() * largest_row_sum<T>(a));
}

/// z <- (z (13 I - az (15 I - az (7 I - az)))) / 4 with az = a z, iterations times, but no more where z has grown
/// beyond largest_iterate, which takes more than ten steps for rows of softmax. a, z (m, m). 8 m^3 flops each. Razavi
/// et al. 2014; Xiong et al. 2021, eq. 11.
template <class T>
void iterate_pinv(const ConstMatrixRef<T>& a, MatrixRef<T> z, int iterations, Context& context) {
  Scratch scratch = context.scratch();
  const Index m = a.rows();
  const T limit = largest_iterate<T>(a);
  auto az = scratch.matrix<T>(m, m), even = scratch.matrix<T>(m, m), odd = scratch.matrix<T>(m, m);
  for (int i = 0; i < iterations; ++i) {
    if (largest_magnitude<T>(z) > limit) return;
    gemm<T>(1, a, z, 0, az, context);
    set_scaled(even, -1, az);
    add_to_diagonal(even, 7);
    gemm<T>(-1, az, even, 0, odd, context);
    add_to_diagonal(odd, 15);
    gemm<T>(-1, az, odd, 0, even, context);
    add_to_diagonal(even, 13);
    gemm<T>(T(0.25), z, even, 0, odd, context);
    set_scaled(z, 1, odd);
  }
}

/// The gradients of iterate_pinv: for z, what the iteration started from, and dz, the gradient by its result. dz <- the
/// gradient by z, da <- da + the gradient by a. With x = a z, e1 = 7 I - x, e2 = 15 I - x e1, e3 = 13 I - x e2, a step
/// is z e3 / 4. 30 m^3 flops each.
template <class T>
void iterate_pinv_backward(const ConstMatrixRef<T>& a, const ConstMatrixRef<T>& z, MatrixRef<T> dz, MatrixRef<T> da,
                           int iterations, Context& context) {
  Scratch scratch = context.scratch();
  const Index m = a.rows();
  MatrixRef<T> iterates = scratch.matrix<T>(iterations * m, m);
  MatrixRef<T> x = scratch.matrix<T>(m, m), e1 = scratch.matrix<T>(m, m), e2 = scratch.matrix<T>(m, m),
               e3 = scratch.matrix<T>(m, m);
  MatrixRef<T> de = scratch.matrix<T>(m, m), dx = scratch.matrix<T>(m, m), next = scratch.matrix<T>(m, m);
  const auto iterate = [&](int i) { return MatrixRef<T>(iterates.data() + i * m * m, m, m, m); };
  const T limit = largest_iterate<T>(a);
  int steps = 0;
  for (; steps < iterations; ++steps) {
    set_scaled<T>(iterate(steps), 1, steps == 0 ? z : ConstMatrixRef<T>(iterate(steps - 1)));
    if (steps > 0) iterate_pinv<T>(a, iterate(steps), 1, context);
    if (largest_magnitude<T>(iterate(steps)) > limit) break;
  }
  for (int i = steps - 1; i >= 0; --i) {
    const MatrixRef<T> before = iterate(i);
    gemm<T>(1, a, before, 0, x, context);
    set_scaled(e1, -1, x);
    add_to_diagonal(e1, 7);
    gemm<T>(-1, x, e1, 0, e2, context);
    add_to_diagonal(e2, 15);
    gemm<T>(-1, x, e2, 0, e3, context);
    add_to_diagonal(e3, 13);
    gemm<T>(T(0.25), transposed(before), dz, 0, de, context);  // de3
    gemm<T>(T(0.25), dz, transposed(e3), 0, next, context);
    gemm<T>(-1, de, transposed(e2), 0, dx, context);
    gemm<T>(-1, transposed(x), de, 0, e3, context);  // de2
    gemm<T>(-1, e3, transposed(e1), 1, dx, context);
    gemm<T>(1, transposed(x), e3, 1, dx, context);  // -de1
    gemm<T>(1, dx, transposed(before), 1, da, context);
    gemm<T>(1, transposed(a), dx, 1, next, context);
    set_scaled(dz, 1, next);
  }
}

/// da <- da + dsum times the gradient of largest_row_sum(a), which lies in the row that has it.
template <class T>
void add_row_sum_gradient(const ConstMatrixRef<T>& a, T dsum, MatrixRef<T> da) {
  Index largest = 0;
  for (Index i = 1; i < a.rows(); ++i) {
    if (largest_row_sum<T>(a.row(i)) > largest_row_sum<T>(a.row(largest))) largest = i;
  }
  for (Index j = 0; j < a.cols(); ++j) da(largest, j) += std::copysign(dsum, dsum * a(largest, j));
}

/// sum_ij x_ij y_ij.
template <class T>
T sum_of_products(const ConstMatrixRef<T>& x, const ConstMatrixRef<T>& y) {
  T sum = 0;
  for (Index i = 0; i < x.rows(); ++i) sum += dot_product(row_of(x, i), row_of(y, i), x.cols());
  return sum;
}

}  // namespace detail

/// What stands for the inverse of A, rows of softmax between landmarks, in Nystromformer: iterations steps from A^T /
/// (|A|_1 |A|_inf). On an eigenvalue x of A Z one step takes 1 - x to (3 (1 - x)^3 + (1 - x)^4) / 4, so small ones grow
/// 3.25 times a step: six steps are a spectral filter, and far better than the pseudo-inverse that more of them would
/// reach. 8 m^3 flops a step. Where z has grown so far that further steps would only raise its rounding, none are
/// taken: whatever their number, z is finite. Razavi et al. 2014; Xiong et al. 2021, eqs. 11-12.
struct IterativePinv {
  int iterations = 6;  ///< steps, at least 1

  /// Whether the options are the same.
  friend bool operator==(const IterativePinv&, const IterativePinv&) = default;

  /// @{ As Core says.
  void check(std::string_view who) const { detail::check_at_least(who, "iterations", iterations, 1); }

  /// z (m, m) <- what stands for the inverse of a (m, m).
  template <class T>
  void invert(const ConstMatrixRef<T>& a, MatrixRef<T> z, Context& context) const {
    detail::set_transposed(z, 1, a);
    detail::set_scaled(z, detail::reciprocal_row_sum<T>(z), z);  // one after another: the sums' product may overflow
    detail::set_scaled(z, detail::reciprocal_row_sum<T>(a), z);
    detail::iterate_pinv<T>(a, z, iterations, context);
  }

  template <class T>
  void apply(MatrixRef<T> a, MatrixRef<T> x, Context& context) const {
    Scratch scratch = context.scratch();
    MatrixRef<T> z = scratch.matrix<T>(a.rows(), a.rows()), old = scratch.matrix<T>(x.rows(), x.cols());
    invert<T>(a, z, context);
    detail::set_scaled(old, 1, x);
    detail::gemm<T>(1, z, old, 0, x, context);
  }
  /// @}

  /// For y = z x: dx <- z^T dx, and da from dz = dx x^T.
  template <class T>
  void backward(MatrixRef<T> a, MatrixRef<T> x, MatrixRef<T> dx, MatrixRef<T> da, Context& context) const {
    Scratch scratch = context.scratch();
    MatrixRef<T> z = scratch.matrix<T>(a.rows(), a.rows()), dz = scratch.matrix<T>(a.rows(), a.rows());
    MatrixRef<T> dy = scratch.matrix<T>(x.rows(), x.cols());
    invert<T>(a, z, context);
    dy = dx;
    detail::gemm<T>(1, dy, detail::transposed(x), 0, dz, context);
    detail::gemm<T>(1, detail::transposed(z), dy, 0, dx, context);
    invert_backward<T>(a, dz, da, context);
  }

  /// da <- the gradient by a for dz, that by invert's z; overwrites dz. The norms of the start have theirs, at their
  /// largest row and column.
  template <class T>
  void invert_backward(const ConstMatrixRef<T>& a, MatrixRef<T> dz, MatrixRef<T> da, Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = a.rows();
    MatrixRef<T> transposed = scratch.matrix<T>(m, m), start = scratch.matrix<T>(m, m),
                 by_columns = scratch.matrix<T>(m, m);
    transposed = a.transpose();
    const T rows = detail::largest_row_sum<T>(a), columns = detail::largest_row_sum<T>(transposed);
    start = transposed / columns / rows;
    da.setZero();
    detail::iterate_pinv_backward<T>(a, start, dz, da, iterations, context);
    const T dscale = detail::sum_of_products<T>(dz, transposed);
    by_columns.setZero();
    detail::add_row_sum_gradient<T>(transposed, -dscale / rows / columns / columns, by_columns);
    detail::add_row_sum_gradient<T>(a, -dscale / rows / columns / rows, da);
    da += by_columns.transpose();
    da += dz.transpose() / columns / rows;
  }
};

/// The paper's inverse of A + gamma I: six steps of the iteration for P = D^-1/2 (A + gamma I) D^-1/2, D = diag((A +
/// gamma I) 1), from P^T / |P|_1, then D^-1/2 Z D^-1/2. 8 m^3 flops a step; RidgeInverse is cheaper and exact. Chen et
/// al. 2021, section 4.4.
struct PreconditionedPinv {
  double gamma = 0.1;  ///< at least 0
  int iterations = 6;  ///< steps, at least 1

  /// Whether the options are the same.
  friend bool operator==(const PreconditionedPinv&, const PreconditionedPinv&) = default;

  /// @{ As Core says.
  static constexpr bool kSymmetricOnly = true;

  template <class T = double>
  void check(std::string_view who) const {
    detail::check_gamma<T>(who, gamma);
    detail::check_at_least(who, "iterations", iterations, 1);
  }

  template <class T>
  void apply(MatrixRef<T> a, MatrixRef<T> x, Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = a.rows();
    MatrixRef<T> scale = scratch.matrix<T>(m, 1), z = scratch.matrix<T>(m, m), product = scratch.matrix<T>(m, x.cols());
    precondition<T>(a, scale);
    z = a.transpose() / detail::largest_row_sum<T>(a);  // |P|_1 = |P|_inf, for P is symmetric
    detail::iterate_pinv<T>(a, z, iterations, context);
    x.array().colwise() *= scale.col(0).array();
    detail::gemm<T>(1, z, x, 0, product, context);
    x = product.array().colwise() * scale.col(0).array();
  }
  /// @}

  /// For y = s z (s x), s = D^-1/2: through z as IterativePinv, and through s, which z and P = s (a + gamma I) s hold
  /// as well.
  template <class T>
  void backward(MatrixRef<T> a, MatrixRef<T> x, MatrixRef<T> dx, MatrixRef<T> da, Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = a.rows(), columns = x.cols();
    MatrixRef<T> scale = scratch.matrix<T>(m, 1), z = scratch.matrix<T>(m, m), start = scratch.matrix<T>(m, m),
                 dz = scratch.matrix<T>(m, m);
    MatrixRef<T> product = scratch.matrix<T>(m, columns), dscale = scratch.matrix<T>(m, 1),
                 scaled = scratch.matrix<T>(m, columns);
    precondition<T>(a, scale);
    const T norm = detail::largest_row_sum<T>(a);
    z = start = a.transpose() / norm;
    detail::iterate_pinv<T>(a, z, iterations, context);
    scaled = x.array().colwise() * scale.col(0).array();
    detail::gemm<T>(1, z, scaled, 0, product, context);
    for (Index i = 0; i < m; ++i) dscale(i, 0) = detail::dot_product(&dx(i, 0), &product(i, 0), columns);
    dx.array().colwise() *= scale.col(0).array();
    detail::gemm<T>(1, dx, detail::transposed(scaled), 0, dz, context);
    detail::gemm<T>(1, detail::transposed(z), dx, 0, product, context);
    for (Index i = 0; i < m; ++i) dscale(i, 0) += detail::dot_product(&x(i, 0), &product(i, 0), columns);
    dx = product.array().colwise() * scale.col(0).array();
    da.setZero();
    detail::iterate_pinv_backward<T>(a, start, dz, da, iterations, context);
    detail::add_row_sum_gradient<T>(a, -detail::sum_of_products<T>(dz, start) / norm, da);
    da += dz.transpose() / norm;
    precondition_backward<T>(a, scale, dscale, da);
  }

 private:
  /// a <- P = s (a + gamma I) s, scale <- s = D^-1/2 with D the row sums.
  template <class T>
  void precondition(MatrixRef<T> a, MatrixRef<T> scale) const {
    detail::add_to_diagonal(a, static_cast<T>(gamma));
    for (Index i = 0; i < a.rows(); ++i) scale(i, 0) = 1 / std::sqrt(detail::largest_row_sum<T>(a.row(i)));
    for (Index i = 0; i < a.rows(); ++i) a.row(i).array() *= scale(i, 0) * scale.col(0).transpose().array();
  }

  /// da: the gradient by P -> that by a. dscale: what s has beside P. With P_ij = s_i M_ij s_j and s_i = (sum_j
  /// |M_ij|)^-1/2.
  template <class T>
  static void precondition_backward(const ConstMatrixRef<T>& p, const ConstMatrixRef<T>& scale, MatrixRef<T> dscale,
                                    MatrixRef<T> da) {
    for (Index i = 0; i < p.rows(); ++i) {
      for (Index j = 0; j < p.cols(); ++j) {
        dscale(i, 0) += da(i, j) * p(i, j) / scale(i, 0);
        dscale(j, 0) += da(i, j) * p(i, j) / scale(j, 0);
      }
    }
    for (Index i = 0; i < p.rows(); ++i) {
      const T drow = T(-0.5) * dscale(i, 0) * scale(i, 0) * scale(i, 0) * scale(i, 0);
      for (Index j = 0; j < p.cols(); ++j)
        da(i, j) = da(i, j) * scale(i, 0) * scale(j, 0) + std::copysign(drow, drow * p(i, j));
    }
  }
};

}  // namespace attn
