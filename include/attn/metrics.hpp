/// How far an approximation is from what it approximates, and the spectra that decide how far it must be.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/attention_operator.hpp>
#include <attn/context.hpp>
#include <attn/detail/split_mix64.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/simd.hpp>
#include <attn/matrix.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>
#include <string_view>

namespace attn {
namespace detail {

template <class A, class E>
void check_same_shape(std::string_view who, const Eigen::MatrixBase<A>& approximation,
                      const Eigen::MatrixBase<E>& exact) {
  if (approximation.rows() == exact.rows() && approximation.cols() == exact.cols()) return;
  refuse(who, "approximation is %td x %td, exact is %td x %td", approximation.rows(), approximation.cols(),
         exact.rows(), exact.cols());
}

/// difference / size, and 0 where nothing differs from nothing.
inline double relative(double difference, double size) {
  return difference == 0 && size == 0 ? 0.0 : difference / size;
}

}  // namespace detail

/// |approximation - exact|_F / |exact|_F, summed in double. 0 if both are zero, infinite if only exact is, NaN if
/// either holds one. Throws std::invalid_argument when shapes disagree.
template <class A, class E>
double relative_frobenius_error(const Eigen::MatrixBase<A>& approximation, const Eigen::MatrixBase<E>& exact) {
  detail::check_same_shape("relative_frobenius_error", approximation, exact);
  double difference = 0, size = 0;
  for (Index i = 0; i < exact.rows(); ++i) {
    difference += (approximation.row(i).template cast<double>() - exact.row(i).template cast<double>()).squaredNorm();
    size += exact.row(i).template cast<double>().squaredNorm();
  }
  return detail::relative(std::sqrt(difference), std::sqrt(size));
}

/// max_i |a_i - e_i| / r over the rows a_i of the approximation and e_i of exact, r the root mean square of |e_i| over
/// the rows of exact that are not zero (a dropped query's is): the worst row's error in units of an ordinary row, so
/// that a row that is small by cancellation counts no more than others. Special values and errors as in
/// relative_frobenius_error.
template <class A, class E>
double worst_row_error(const Eigen::MatrixBase<A>& approximation, const Eigen::MatrixBase<E>& exact) {
  detail::check_same_shape("worst_row_error", approximation, exact);
  double worst = 0, size = 0;
  Index rows = 0;
  for (Index i = 0; i < exact.rows(); ++i) {
    const double row = exact.row(i).template cast<double>().squaredNorm();
    const double difference =
        (approximation.row(i).template cast<double>() - exact.row(i).template cast<double>()).squaredNorm();
    size += row;
    rows += row == 0 ? 0 : 1;
    if (!(difference <= worst)) worst = difference;
    if (detail::is_nan(difference)) return difference;
  }
  return detail::relative(std::sqrt(worst), std::sqrt(size / static_cast<double>(std::max<Index>(rows, 1))));
}

/// How singular values are found: stops when none of those wanted changes by more than tolerance times the largest in
/// one step, or after max_iterations.
struct SubspaceIteration {
  double tolerance = 1e-6;   ///< 16 units of rounding at the least
  int max_iterations = 300;  ///< steps, at least 1
  Index oversampling = 8;    ///< columns beside those wanted: the more, the more work a step, and the fewer steps
  std::uint64_t seed = 0;    ///< of the start
};

/// The largest singular values, and how they were found.
struct SingularValues {
  Eigen::VectorXd values;  ///< in descending order
  int iterations = 0;      ///< steps that it took
  bool converged = false;  ///< within the tolerance
};

namespace detail {

/// (rows, cols) of -1 and 1, each as likely: the same on every platform.
template <class T>
Matrix<T> random_signs(Index rows, Index cols, std::uint64_t seed) {
  SplitMix64 random(seed);
  Matrix<T> x(rows, cols);
  for (Index i = 0; i < x.size(); ++i) x.data()[i] = (random() >> 63U) != 0 ? T(1) : T(-1);
  return x;
}

/// Turns columns i and j of x in their plane until they are orthogonal; false where they were, up to rounding.
template <class T>
bool rotate_columns(Matrix<T>& x, Index i, Index j) {
  double ii = 0, jj = 0, ij = 0;
  for (Index r = 0; r < x.rows(); ++r) {
    const double a = static_cast<double>(x(r, i)), b = static_cast<double>(x(r, j));
    ii += a * a;
    jj += b * b;
    ij += a * b;
  }
  const double rounding = 4.0 * static_cast<double>(std::numeric_limits<T>::epsilon());
  if (!(std::abs(ij) > rounding * std::sqrt(ii) * std::sqrt(jj))) return false;
  const double ratio = (jj - ii) / (2 * ij);
  const double tangent = std::copysign(1.0, ratio) / (std::abs(ratio) + std::hypot(1.0, ratio));
  const double cosine = 1 / std::hypot(1.0, tangent), sine = cosine * tangent;
  for (Index r = 0; r < x.rows(); ++r) {
    const double a = static_cast<double>(x(r, i)), b = static_cast<double>(x(r, j));
    x(r, i) = static_cast<T>(cosine * a - sine * b);
    x(r, j) = static_cast<T>(sine * a + cosine * b);
  }
  return true;
}

/// x (n, p) <- an orthonormal basis of its columns, in the directions of its left singular vectors; returns the
/// singular values that it had, in descending order. A column whose value is 0 stays zero. One-sided Jacobi rotations,
/// Hestenes 1958: O(n p^2) a sweep.
template <class T>
Eigen::VectorXd orthonormalize(Matrix<T>& x) {
  constexpr int kMostSweeps = 40;
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < kMostSweeps; ++sweep) {
    rotated = false;
    for (Index i = 0; i < x.cols(); ++i) {
      for (Index j = i + 1; j < x.cols(); ++j) rotated |= rotate_columns(x, i, j);
    }
  }
  Eigen::VectorXd values(x.cols());
  for (Index c = 0; c < x.cols(); ++c) {
    values[c] = x.col(c).template cast<double>().norm();
    if (values[c] > 0) x.col(c) /= static_cast<T>(values[c]);
  }
  sort_elements(values.data(), values.size(), std::greater<>());
  return values;
}

/// What singular values may change by in a step of which only rounding is left, relative to the largest. Blocks that an
/// operator rounds to a narrow type stay as they are once they have settled, since all else is in float.
template <class A>
double smallest_change() {
  if constexpr (TakesWideBlocks<A>) {
    return 16.0 * static_cast<double>(std::numeric_limits<WideBlock<A>>::epsilon());
  } else {
    return std::same_as<typename A::Scalar, Eigen::half> ? 0x1p-10 : 0x1p-7;  // Eigen 3.4 says 2^-13 of half
  }
}

inline void check_subspace(std::string_view who, Index rows, Index cols, Index count,
                           const SubspaceIteration& options) {
  check_at_least(who, "count", static_cast<double>(count), 1);
  if (count > std::min(rows, cols)) refuse(who, "count is %td, the operator is %td x %td", count, rows, cols);
  check_at_least(who, "tolerance", options.tolerance, 0);
  check_at_least(who, "max_iterations", options.max_iterations, 1);
  check_at_least(who, "oversampling", static_cast<double>(options.oversampling), 0);
}

}  // namespace detail

/// The count largest singular values of A (rows, cols), by block power iteration on A^T A (subspace iteration, Halko,
/// Martinsson and Tropp 2011, algorithm 4.4): X <- orth(A^T orth(A X)), whose singular values on the way approach those
/// of A from below. Each step takes one product with A and one with A^T, with count + oversampling columns, and O((rows
/// + cols) count^2) time besides; memory is (rows + cols) times that many columns. The values are lower bounds up to
/// rounding; where the following ones are nearly as large, a small change in a step does not prove that they are close.
/// Throws std::invalid_argument when an option is out of range.
template <LinearOperator A>
SingularValues leading_singular_values(const A& a, Index count, const SubspaceIteration& options, Context& context) {
  using T = detail::WideBlock<A>;
  detail::check_subspace("leading_singular_values", a.rows(), a.cols(), count, options);
  const Index columns = std::min(count + options.oversampling, std::min(a.rows(), a.cols()));
  const double tolerance = std::max(options.tolerance, detail::smallest_change<A>());
  Matrix<T> x = detail::random_signs<T>(a.cols(), columns, options.seed), y(a.rows(), columns);
  detail::orthonormalize(x);
  SingularValues found;
  found.values.setZero(count);
  // Generic, and so compiled where they are called alone.
  const auto settled = [&](const auto& values) {
    return (values - found.values).cwiseAbs().maxCoeff() <= tolerance * values[0];
  };
  const auto is_finite = [](const auto& values) { return values.allFinite(); };
  while (!found.converged && found.iterations < options.max_iterations) {
    detail::apply_wide(a, x, y, context);
    detail::orthonormalize(y);
    detail::apply_wide(detail::Transposed{a}, y, x, context);
    const Eigen::VectorXd values = detail::orthonormalize(x).head(count);
    found.converged = settled(values);
    found.values = values;
    ++found.iterations;
    if (!is_finite(values)) break;
  }
  return found;
}

/// |A|_2, the largest singular value, from below: power iteration as in leading_singular_values.
template <LinearOperator A>
double spectral_norm(const A& a, const SubspaceIteration& options, Context& context) {
  return leading_singular_values(a, 1, options, context).values[0];
}

/// An estimate of |A|_F from products alone: sqrt(mean_c |A g_c|^2) over num_probes columns g_c of random signs. Its
/// square is unbiased (Hutchinson 1990), with a relative standard deviation of at most sqrt(2 / num_probes). Throws
/// std::invalid_argument for no probes.
template <ForwardOperator A>
double estimate_frobenius_norm(const A& a, Index num_probes, std::uint64_t seed, Context& context) {
  detail::check_at_least("estimate_frobenius_norm", "num_probes", static_cast<double>(num_probes), 1);
  using T = detail::WideBlock<A>;
  const Matrix<T> x = detail::random_signs<T>(a.cols(), num_probes, seed);
  Matrix<T> y(a.rows(), num_probes);
  detail::apply_wide(a, x, y, context);
  return y.template cast<double>().norm() / std::sqrt(static_cast<double>(num_probes));
}

/// A lower bound of |A|_2 from one product, for operators without a transpose: the largest singular value of A X, X an
/// orthonormal basis of num_probes random columns, or of as many as A has rows or columns. Throws std::invalid_argument
/// for no probes.
template <ForwardOperator A>
double spectral_norm_lower_bound(const A& a, Index num_probes, std::uint64_t seed, Context& context) {
  using T = detail::WideBlock<A>;
  detail::check_at_least("spectral_norm_lower_bound", "num_probes", static_cast<double>(num_probes), 1);
  const Index columns = std::min(num_probes, std::min(a.rows(), a.cols()));
  Matrix<T> x = detail::random_signs<T>(a.cols(), columns, seed), y(a.rows(), columns);
  detail::orthonormalize(x);
  detail::apply_wide(a, x, y, context);
  return detail::orthonormalize(y)[0];
}

/// sigma_1 / sigma_r of the r leading singular values given, in descending order: infinite if the last is 0.
template <class Values>
double condition_number(const Eigen::DenseBase<Values>& values) {
  return values.derived()[0] / values.derived()[values.size() - 1];
}

/// exp(-sum_i p_i log p_i), p_i = sigma_i / sum_j sigma_j: r for r equal singular values, 1 for a single one. Given
/// only the leading values it is the effective rank of that part. Roy and Vetterli 2007.
template <class Values>
double effective_rank(const Eigen::DenseBase<Values>& values) {
  const double sum = values.sum();
  double entropy = 0;
  for (Index i = 0; i < values.size(); ++i) {
    const double p = values.derived()[i] / sum;
    if (p > 0) entropy -= p * std::log(p);
  }
  return std::exp(entropy);
}

/// |A|_F^2 / |A|_2^2: at most the rank, and not moved by small singular values.
inline double stable_rank(double frobenius_norm, double spectral_norm) {
  return (frobenius_norm * frobenius_norm) / (spectral_norm * spectral_norm);
}

}  // namespace attn
