/// Cores: what stands between the two landmark factors of an approximation, in place of an inverse of the landmarks'
/// own matrix.
#pragma once

#include <attn/engine/requirements.hpp>

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

/// to <- x + factor y, all (m, m).
template <class T>
void set_sum(const MatrixRef<T>& to, const ConstMatrixRef<T>& x, std::type_identity_t<T> factor,
             const ConstMatrixRef<T>& y) {
  set_scaled(to, 1, x);
  for (Index i = 0; i < to.rows(); ++i) add_row(factor, row_of(y, i), row_of(to, i), to.cols());
}

/// What a step multiplies z by, p = (13 I - x (15 I - x (7 I - x))) / 4 with x = a z. With the residual e = I - x it is
/// I + e + e^2 + e^3 / 4, and the step takes e to e^3 (3 I + e) / 4. e, squared = e^2 and p (m, m). z is a^T times a
/// polynomial of a a^T, but for rounding, and so these are symmetric: the lower half of their products will do, as long
/// as z is small.
template <class T>
struct PinvStep {
  MatrixRef<T> e, squared, p;
  T limit, symmetric_limit;  ///< for elements of z: 1 / (64 epsilon |a|_inf), 1 / (2 sqrt(epsilon) |a|_inf)

  PinvStep(const ConstMatrixRef<T>& a, Scratch& scratch)
      : e(scratch.matrix<T>(a.rows(), a.rows())),
        squared(scratch.matrix<T>(a.rows(), a.rows())),
        p(scratch.matrix<T>(a.rows(), a.rows())),
        limit(largest_iterate<T>(a)),
        symmetric_limit(32 * std::sqrt(std::numeric_limits<T>::epsilon()) * limit) {}

  /// Whether e of a z that grows by such a factor may be taken for symmetric. Unlike the iteration itself, that mends
  /// no error in directions where z is right; what rounding has made of symmetry is about epsilon |z|.
  bool symmetric(const ConstMatrixRef<T>& z, T growth) const {
    constexpr Index kWorthwhile = kPanelPackets * kLanes<T>;  // one strip of columns has no half
    return z.rows() > kWorthwhile && largest_magnitude<T>(z) * growth <= symmetric_limit;
  }

  /// e, squared and p of z.
  void set(const ConstMatrixRef<T>& a, const ConstMatrixRef<T>& z, Context& context) const {
    symmetric_gemm<T>(-1, a, z, 0, e, context);
    add_to_diagonal(e, 1);
    symmetric_gemm<T>(1, e, e, 0, squared, context);
    set_sum<T>(p, e, 1, squared);
    symmetric_gemm<T>(T(0.25), e, squared, 1, p, context);
    add_to_diagonal(p, 1);
  }

  /// next <- z p, unless z has grown beyond largest_iterate; returns whether.
  bool take(const ConstMatrixRef<T>& a, const ConstMatrixRef<T>& z, const MatrixRef<T>& next, Context& context) const {
    if (largest_magnitude<T>(z) > limit) return false;
    symmetric(z, 1) ? set(a, z, context) : set_factor(a, z, context);
    gemm<T>(1, z, p, 0, next, context);
    return true;
  }

 private:
  /// p = I + e (I + e (I + e / 4)), whether e is symmetric or not.
  void set_factor(const ConstMatrixRef<T>& a, const ConstMatrixRef<T>& z, Context& context) const {
    const MatrixRef<T>& inner = squared;
    gemm<T>(-1, a, z, 0, e, context);
    add_to_diagonal(e, 1);
    set_scaled(p, T(0.25), e);
    add_to_diagonal(p, 1);
    gemm<T>(1, e, p, 0, inner, context);
    add_to_diagonal(inner, 1);
    gemm<T>(1, e, inner, 0, p, context);
    add_to_diagonal(p, 1);
  }
};

/// z <- (z (13 I - az (15 I - az (7 I - az)))) / 4 with az = a z, iterations times, but no more where z has grown
/// beyond largest_iterate, which takes more than ten steps for rows of softmax. z begins as a multiple of a^T. a, z (m,
/// m). 5 m^3 flops each, 8 m^3 where z is large. Razavi et al. 2014; Xiong et al. 2021, eq. 11.
template <class T>
void iterate_pinv(const ConstMatrixRef<T>& a, MatrixRef<T> z, int iterations, Context& context) {
  Scratch scratch = context.scratch();
  const PinvStep<T> step(a, scratch);
  const MatrixRef<T> next = scratch.matrix<T>(a.rows(), a.rows());
  for (int i = 0; i < iterations && step.take(a, z, next, context); ++i) set_scaled(z, 1, next);
}

/// x (m, columns) <- p x of a step, as x + w + e^2 (x + w / 4), w = e x.
template <class T>
void apply_step(const PinvStep<T>& step, const MatrixRef<T>& x, Context& context) {
  Scratch scratch = context.scratch();
  const MatrixRef<T> w = scratch.matrix<T>(x.rows(), x.cols()), y = scratch.matrix<T>(x.rows(), x.cols());
  gemm<T>(1, step.e, x, 0, w, context);
  set_sum<T>(y, x, T(0.25), w);
  for (Index i = 0; i < x.rows(); ++i) add_row(T(1), row_of(w, i), row_of(x, i), x.cols());
  gemm<T>(1, step.squared, y, 1, x, context);
}

/// x (m, columns) <- what so many steps from z multiply it by, times x: the residuals after the first are made of one
/// another.
template <class T>
void apply_last_steps(const PinvStep<T>& step, const ConstMatrixRef<T>& a, const ConstMatrixRef<T>& z,
                      const MatrixRef<T>& x, int steps, Context& context) {
  symmetric_gemm<T>(-1, a, z, 0, step.e, context);
  add_to_diagonal(step.e, 1);
  for (int i = 0; i < steps; ++i) {
    symmetric_gemm<T>(1, step.e, step.e, 0, step.squared, context);
    apply_step(step, x, context);  // factors of z commute
    if (i + 1 == steps) return;
    set_sum<T>(step.p, step.squared, 3, step.e);
    symmetric_gemm<T>(T(0.25), step.squared, step.p, 0, step.e, context);
  }
}

/// x (m, columns) <- z x with the z of iterate_pinv, which z (m, m) may become or not. Where x is narrow, the last
/// three steps are those of the residual alone, 2 m^3 flops each, and what they multiply z by is applied to x: each
/// loses some digits of the residual, and six steps from one residual would lose most.
template <class T>
void apply_iterated_pinv(const ConstMatrixRef<T>& a, const MatrixRef<T>& z, const MatrixRef<T>& x, int iterations,
                         Context& context) {
  constexpr T kGrowth = 40;  // of z in three steps, and more
  Scratch scratch = context.scratch();
  const Index m = a.rows();
  const PinvStep<T> step(a, scratch);
  const int last = 2 * m > 3 * x.cols() ? std::min(iterations, 3) : 0;
  iterate_pinv<T>(a, z, iterations - last, context);
  if (last > 0 && step.symmetric(z, kGrowth)) {
    apply_last_steps<T>(step, a, z, x, last, context);
  } else {
    iterate_pinv<T>(a, z, last, context);
  }
  const MatrixRef<T> old = scratch.matrix<T>(m, x.cols());
  set_scaled(old, 1, x);
  gemm<T>(1, z, old, 0, x, context);
}

/// All that iterate_pinv goes through from a start, which is the first of its iterates: one (m, m) matrix after
/// another, of which the last is its result.
template <class T>
struct PinvIterates {
  MatrixRef<T> all;
  int steps = 0;

  PinvIterates(const ConstMatrixRef<T>& a, const ConstMatrixRef<T>& start, int iterations, Scratch& scratch,
               Context& context)
      : all(scratch.matrix<T>((iterations + 1) * a.rows(), a.rows())) {
    Scratch temporary = scratch.nested();
    const PinvStep<T> step(a, temporary);
    set_scaled(at(0), 1, start);
    while (steps < iterations && step.take(a, at(steps), at(steps + 1), context)) ++steps;
  }

  MatrixRef<T> at(int i) const {
    return {all.data() + i * all.cols() * all.cols(), all.cols(), all.cols(), all.cols()};
  }
  MatrixRef<T> result() const { return at(steps); }
};

/// The gradients of iterate_pinv from its iterates, for dz, that by its result. dz <- the gradient by their start, da
/// <- da + the gradient by a. For a step z p, p = I + e + e^2 + e^3 / 4, e = I - a z: with d the symmetric part of z^T
/// dz, which is all that counts since e is symmetric whatever a is,
///   de = d + u + u^T + (d e^2 + e^2 d + e d e) / 4, u = d e;  da -= de z^T;  dz <- dz p - a^T de.
/// 18 m^3 flops each.
template <class T>
void iterate_pinv_backward(const ConstMatrixRef<T>& a, const PinvIterates<T>& iterates, MatrixRef<T> dz,
                           MatrixRef<T> da, Context& context) {
  Scratch scratch = context.scratch();
  const Index m = a.rows();
  const PinvStep<T> step(a, scratch);
  const MatrixRef<T> d = scratch.matrix<T>(m, m), de = scratch.matrix<T>(m, m), next = scratch.matrix<T>(m, m);
  for (int i = iterates.steps - 1; i >= 0; --i) {
    const MatrixRef<T> z = iterates.at(i);
    step.set(a, z, context);
    gemm<T>(1, transposed(z), dz, 0, d, context);
    gemm<T>(1, dz, step.p, 0, next, context);
    make_symmetric(d);
    gemm<T>(1, d, step.e, 0, step.p, context);  // u
    symmetric_gemm<T>(T(0.125), step.e, step.p, 0, de, context);
    for (Index r = 0; r < m; ++r) {  // with its transpose, all of de
      add_row(T(0.5), row_of(d, r), row_of(de, r), m);
      add_row(T(1), row_of(step.p, r), row_of(de, r), m);
    }
    gemm<T>(T(0.25), d, step.squared, 1, de, context);
    make_symmetric(de);
    gemm<T>(-2, de, transposed(z), 1, da, context);
    gemm<T>(-2, transposed(a), de, 1, next, context);
    set_scaled(dz, 1, next);
  }
}

/// da <- da + dsum times the gradient of largest_row_sum(a), which lies in the row that has it.
template <class T>
void add_row_sum_gradient(const ConstMatrixRef<T>& a, T dsum, MatrixRef<T> da) {
  Index largest = 0;
  T most = largest_row_sum<T>(a.row(0));
  for (Index i = 1; i < a.rows(); ++i) {
    const T sum = largest_row_sum<T>(a.row(i));
    if (sum > most) {
      largest = i;
      most = sum;
    }
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
    set_start<T>(a, z);
    detail::iterate_pinv<T>(a, z, iterations, context);
  }

  template <class T>
  void apply(MatrixRef<T> a, MatrixRef<T> x, Context& context) const {
    Scratch scratch = context.scratch();
    const MatrixRef<T> z = scratch.matrix<T>(a.rows(), a.rows());
    set_start<T>(a, z);
    detail::apply_iterated_pinv<T>(a, z, x, iterations, context);
  }
  /// @}

  /// For y = z x: dx <- z^T dx, and da from dz = dx x^T.
  template <class T>
  void backward(MatrixRef<T> a, MatrixRef<T> x, MatrixRef<T> dx, MatrixRef<T> da, Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = a.rows();
    const MatrixRef<T> start = scratch.matrix<T>(m, m), dz = scratch.matrix<T>(m, m),
                       dy = scratch.matrix<T>(x.rows(), x.cols());
    set_start<T>(a, start);
    const detail::PinvIterates<T> iterates(a, start, iterations, scratch, context);
    detail::set_scaled(dy, 1, dx);
    detail::gemm<T>(1, dy, detail::transposed(x), 0, dz, context);
    detail::gemm<T>(1, detail::transposed(iterates.result()), dy, 0, dx, context);
    invert_backward<T>(a, iterates, dz, da, context);
  }

  /// da <- the gradient by a for dz, that by invert's z; overwrites dz.
  template <class T>
  void invert_backward(const ConstMatrixRef<T>& a, MatrixRef<T> dz, MatrixRef<T> da, Context& context) const {
    Scratch scratch = context.scratch();
    const MatrixRef<T> start = scratch.matrix<T>(a.rows(), a.rows());
    set_start<T>(a, start);
    invert_backward<T>(a, detail::PinvIterates<T>(a, start, iterations, scratch, context), dz, da, context);
  }

 private:
  /// z <- a^T / (|a|_1 |a|_inf), one after another: the sums' product may overflow.
  template <class T>
  static void set_start(const ConstMatrixRef<T>& a, const MatrixRef<T>& z) {
    detail::set_transposed(z, 1, a);
    detail::set_scaled(z, detail::reciprocal_row_sum<T>(z), z);
    detail::set_scaled(z, detail::reciprocal_row_sum<T>(a), z);
  }

  /// The norms of the start have gradients, at their largest row and column.
  template <class T>
  static void invert_backward(const ConstMatrixRef<T>& a, const detail::PinvIterates<T>& iterates, MatrixRef<T> dz,
                              MatrixRef<T> da, Context& context) {
    Scratch scratch = context.scratch();
    const Index m = a.rows();
    const MatrixRef<T> transposed = scratch.matrix<T>(m, m), by_columns = scratch.matrix<T>(m, m);
    detail::set_transposed(transposed, 1, a);
    const T rows = detail::largest_row_sum<T>(a), columns = detail::largest_row_sum<T>(transposed);
    detail::set_zero(da);
    detail::iterate_pinv_backward<T>(a, iterates, dz, da, context);
    const T dscale = detail::sum_of_products<T>(dz, transposed);
    detail::set_transposed(by_columns, 1 / columns / rows, dz);
    for (Index i = 0; i < m; ++i) detail::add_row(T(1), &by_columns(i, 0), &da(i, 0), m);
    detail::set_zero(by_columns);
    detail::add_row_sum_gradient<T>(transposed, -dscale / rows / columns / columns, by_columns);
    detail::add_row_sum_gradient<T>(a, -dscale / rows / columns / rows, da);
    da += by_columns.transpose();
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
    MatrixRef<T> scale = scratch.matrix<T>(m, 1), z = scratch.matrix<T>(m, m);
    precondition<T>(a, scale);
    z = a.transpose() / detail::largest_row_sum<T>(a);  // |P|_1 = |P|_inf, for P is symmetric
    x.array().colwise() *= scale.col(0).array();
    detail::apply_iterated_pinv<T>(a, z, x, iterations, context);
    x.array().colwise() *= scale.col(0).array();
  }
  /// @}

  /// For y = s z (s x), s = D^-1/2: through z as IterativePinv, and through s, which z and P = s (a + gamma I) s hold
  /// as well.
  template <class T>
  void backward(MatrixRef<T> a, MatrixRef<T> x, MatrixRef<T> dx, MatrixRef<T> da, Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = a.rows(), columns = x.cols();
    MatrixRef<T> scale = scratch.matrix<T>(m, 1), start = scratch.matrix<T>(m, m), dz = scratch.matrix<T>(m, m);
    MatrixRef<T> product = scratch.matrix<T>(m, columns), dscale = scratch.matrix<T>(m, 1),
                 scaled = scratch.matrix<T>(m, columns);
    precondition<T>(a, scale);
    const T norm = detail::largest_row_sum<T>(a);
    start = a.transpose() / norm;
    const detail::PinvIterates<T> iterates(a, start, iterations, scratch, context);
    const MatrixRef<T> z = iterates.result();
    scaled = x.array().colwise() * scale.col(0).array();
    detail::gemm<T>(1, z, scaled, 0, product, context);
    for (Index i = 0; i < m; ++i) dscale(i, 0) = detail::dot_product(&dx(i, 0), &product(i, 0), columns);
    dx.array().colwise() *= scale.col(0).array();
    detail::gemm<T>(1, dx, detail::transposed(scaled), 0, dz, context);
    detail::gemm<T>(1, detail::transposed(z), dx, 0, product, context);
    for (Index i = 0; i < m; ++i) dscale(i, 0) += detail::dot_product(&x(i, 0), &product(i, 0), columns);
    dx = product.array().colwise() * scale.col(0).array();
    da.setZero();
    detail::iterate_pinv_backward<T>(a, iterates, dz, da, context);
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
