/// The landmark side of Skyformer's product kappa(q, L) (kappa(L, L) + gamma I)^-1 kappa(L, k) [v 1] and its gradients.
/// Where the landmarks' sums over the keys are further apart than T's exponents reach, as those of tokens far from one
/// another are, what is between landmarks is in double, and each landmark's values have an exponent of their own, which
/// is its key bias as a key of the queries: slower, and of the same result where T's exponents reach.
#pragma once

#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/detail/divided_rows.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/few_keys.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numbers>
#include <span>
#include <type_traits>

namespace attn::detail {

inline GaussianKernel with_rows(const GaussianKernel& kernel, Rows rows) {
  return {.bandwidth = kernel.bandwidth, .rows = rows};
}

/// Key biases relative to the largest finite one of the kept keys (0 if there is none), which overflows nowhere; those
/// of -infinity stay so. Rows that are divided by their sums depend on these alone; raw ones have 2^exponent, the
/// largest one's weight, in common, which is finite.
template <class T>
struct KeyBias {
  std::span<const T> relative{};
  double exponent = 0;

  double common_exponent(Rows rows) const { return rows == Rows::raw ? exponent : 0; }
};

/// The key biases of in relative to the given one.
template <class T>
KeyBias<T> bias_relative_to(T largest, const Sources<T>& in, Scratch& scratch) {
  constexpr T kLowest = std::numeric_limits<T>::lowest();
  constexpr double kMost = 1e300;
  if (largest == 0) return {in.key_bias};
  const std::span<T> relative = scratch.array<T>(in.k.rows());
  std::transform(in.key_bias.begin(), in.key_bias.end(), relative.begin(),
                 [&](T bias) { return bias < kLowest ? bias : std::max(bias - largest, kLowest); });
  return {relative, std::numbers::log2e * std::clamp(static_cast<double>(largest), -kMost, kMost)};
}

template <class T>
KeyBias<T> relative_bias(const Sources<T>& in, Scratch& scratch) {
  if (in.key_bias.empty()) return {};
  return bias_relative_to(BiasOrigins<T>::of_inputs(in, scratch).common, in, scratch);
}

template <class T>
MatrixRef<T> left_columns(const MatrixRef<T>& m, Index columns) {
  return {m.data(), m.rows(), columns, m.outerStride()};
}

/// to <- factor from, n elements of another type.
template <class To, class From>
void convert_scaled(double factor, const From* from, To* to, Index n) {
  if constexpr (std::is_same_v<To, From>) {
    if (factor == 1) return void(std::copy_n(from, n, to));
  }
  for (Index i = 0; i < n; ++i) to[i] = static_cast<To>(factor * static_cast<double>(from[i]));
}

/// kappa(L, k) [v 1] (m, d_v + 1). Where T's exponents reach: 2^top times sums, top being 0 where the rows of the
/// result are raw, so that normalized ones bear any common factor. Where they do not: row l is 2^exponents_l times row
/// l of sums. Without e^largest, that of the key biases, where rows are normalized.
template <class T>
struct LandmarkSums {
  ConstMatrixRef<T> sums;
  std::span<const double> exponents{};  ///< empty where T's exponents reach
  double top = 0;

  bool spread() const { return !exponents.empty(); }
};

/// Exponents of 2 that numbers may have, so that products of two have one.
template <class T>
inline constexpr auto kSafeExponent = static_cast<double>(Exp2<T>::kBias) / 2;

/// Whether sums with such exponents, infinite for landmarks that see no key, leave T's range: where rows are
/// normalized, relative to one another. common: log2 of the keys' common weight, which raw rows have on both sides.
template <class T>
bool leaves_range(std::span<const double> exponents, Rows rows, double common) {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (const double exponent : exponents) {
    if (!is_finite(exponent)) continue;
    low = std::min(low, exponent);
    high = std::max(high, exponent);
  }
  if (low > high) return false;
  return (rows == Rows::normalized ? high - low : std::max(std::abs(high), std::abs(common))) > kSafeExponent<T>;
}

/// The sums over keys whose row states are given, weighted being the left columns of sums (m, d_v + 1). common: log2 of
/// the keys' common weight.
template <class T>
LandmarkSums<T> sums_of_states(Rows rows, const RowStates<T>& states, const MatrixRef<T>& sums, double common,
                               Scratch& scratch) {
  const Index m = sums.rows(), d_v = sums.cols() - 1;
  const std::span<double> exponents = scratch.array<double>(m);
  for (std::size_t l = 0; l < exponents.size(); ++l) {
    row_of(sums, static_cast<Index>(l))[d_v] = states.sum[l];
    exponents[l] =
        states.sum[l] == 0 ? -std::numeric_limits<double>::infinity() : static_cast<double>(states.maximum[l]) + common;
  }
  if (leaves_range<T>(exponents, rows, common)) return {sums, exponents};
  const double largest = *std::max_element(exponents.begin(), exponents.end());
  const T top = rows == Rows::normalized && is_finite(largest) ? static_cast<T>(largest) : T(0);
  for (Index l = 0; l < m; ++l) {
    const double exponent = exponents[static_cast<std::size_t>(l)] - static_cast<double>(top);
    scale_row(static_cast<T>(std::exp2(exponent)), row_of(sums, l), row_of(sums, l), d_v + 1);
  }
  return {sums, {}, static_cast<double>(top)};
}

/// The sums of landmarks (m, d) over the keys of in, whose biases are given.
template <class T>
LandmarkSums<T> sum_over_keys(const GaussianKernel& kernel, const Sources<T>& in, const KeyBias<T>& bias,
                              const ConstMatrixRef<T>& land, Scratch& scratch, Context& context) {
  const Index m = land.rows(), d_v = in.v.cols();
  const MatrixRef<T> sums = scratch.matrix<T>(m, d_v + 1);
  if (m == 0) return {sums};
  const RowStates<T> states{scratch.array<T>(m), scratch.array<T>(m), left_columns(sums, d_v)};
  multiply_partial(kernel, Sources<T>{land, in.k, in.v, keys_only(in.mask), bias.relative}, states, context);
  return sums_of_states(kernel.rows, states, sums, bias.common_exponent(kernel.rows), scratch);
}

/// The log-sums of kappa(L, k) with key biases relative to the largest, from sums that T's exponents do not reach.
template <class T>
std::span<T> log_sums(const LandmarkSums<T>& of_keys, double common, Scratch& scratch) {
  const std::span<T> lse = scratch.array<T>(of_keys.sums.rows());
  for (std::size_t l = 0; l < lse.size(); ++l) {
    const T sum = row_of(of_keys.sums, static_cast<Index>(l))[of_keys.sums.cols() - 1];
    lse[l] = static_cast<T>(std::numbers::ln2 * (of_keys.exponents[l] - common + std::log2(static_cast<double>(sum))));
  }
  return lse;
}

/// Key biases (n) that take a factor of 2^-exponent on.
template <class T>
std::span<const T> shifted_bias(std::span<const T> bias, double exponent, Index n, Scratch& scratch) {
  const std::span<T> shifted = scratch.array<T>(n);
  for (std::size_t j = 0; j < shifted.size(); ++j)
    shifted[j] = (bias.empty() ? T(0) : bias[j]) - std::numbers::ln2_v<T> * static_cast<T>(exponent);
  return shifted;
}

/// to (by the landmarks, k and v) and dbias <- the gradients of sum_over_keys for dsums, that by the sums relative to
/// 2^top. Where T's exponents do not reach, each landmark's weights are measured by what they add up to, and so is its
/// gradient. Where the rows of the result are raw, nothing depends on the column of ones.
template <class T, class W>
void sum_over_keys_backward(const GaussianKernel& kernel, const Inputs<T>& in, const KeyBias<T>& bias,
                            const ConstMatrixRef<T>& land, const LandmarkSums<T>& of_keys, double top,
                            const MatrixRef<W>& dsums, const Gradients<T>& to, std::span<T> dbias, Context& context) {
  Scratch scratch = context.scratch();
  const Index m = land.rows(), n = in.v.rows(), d_v = in.v.cols();
  const bool raw = kernel.rows == Rows::raw, spread = of_keys.spread();
  const double common = bias.common_exponent(kernel.rows);
  const std::span<T> lse = spread ? log_sums(of_keys, common, scratch) : std::span<T>{};
  const MatrixRef<T> scaled = scratch.matrix<T>(m, raw ? d_v : d_v + 1), none = scratch.matrix<T>(m, scaled.cols());
  set_zero(none);  // sums of weights are constants here
  for (Index l = 0; l < m; ++l) {
    const double log_factor =
        spread ? static_cast<double>(lse[static_cast<std::size_t>(l)]) + std::numbers::ln2 * (common - top) : 0;
    convert_scaled(std::exp(log_factor), row_of(dsums, l), row_of(scaled, l), scaled.cols());
  }
  const GaussianKernel weights = with_rows(kernel, spread ? Rows::normalized : Rows::raw);
  const std::span<const T> biases = spread ? bias.relative
                                    : raw  ? in.key_bias
                                           : shifted_bias(bias.relative, of_keys.top, n, scratch);
  const Inputs<T> keys{land, in.k, in.v, keys_only(in.mask), biases};
  if (raw) return kernel_matmul_backward(weights, keys, none, lse, scaled, to, context, dbias);
  const MatrixRef<T> v = scratch.matrix<T>(n, d_v + 1), dv = scratch.matrix<T>(n, d_v + 1);
  for (Index j = 0; j < n; ++j) {
    std::copy_n(row_of(in.v, j), d_v, row_of(v, j));
    row_of(v, j)[d_v] = 1;
  }
  const Inputs<T> with_ones{land, in.k, v, keys.mask, biases};
  kernel_matmul_backward(weights, with_ones, none, lse, scaled, {to.dq, to.dk, dv}, context, dbias);
  for (Index j = 0; j < n; ++j) std::copy_n(row_of(dv, j), d_v, row_of(to.dv, j));
}

/// The type of what is between landmarks whose sums are apart: double, unless a core of the user's takes T alone.
template <class T, class Inverse>
using WideScalar = std::conditional_t<Core<Inverse, double>, double, T>;

/// kappa(L, L) (m, m), and the landmarks' sums (m, d_v + 1) over the keys relative to 2^top, in W.
template <class W>
struct LandmarkSystem {
  MatrixRef<W> a, sums;
  double top;

  template <class T>
  LandmarkSystem(const GaussianKernel& kernel, const ConstMatrixRef<T>& land, const LandmarkSums<T>& of_keys,
                 Scratch& scratch, Context& context)
      : a(scratch.matrix<W>(land.rows(), land.rows())),
        sums(scratch.matrix<W>(land.rows(), of_keys.sums.cols())),
        top(of_keys.spread() ? *std::max_element(of_keys.exponents.begin(), of_keys.exponents.end()) : of_keys.top) {
    for (Index l = 0; l < sums.rows(); ++l) {
      const double exponent = of_keys.spread() ? of_keys.exponents[static_cast<std::size_t>(l)] - top : 0;
      convert_scaled(std::exp2(exponent), row_of(of_keys.sums, l), row_of(sums, l), sums.cols());
    }
    Scratch temporary = scratch.nested();
    const ConstMatrixRef<W> wide = in_type<W>(land, temporary, context);
    kernel_matrix<GaussianKernel, W>(with_rows(kernel, Rows::raw), wide, wide, a, context);
  }
};

/// to <- from / divisor, n elements of another type. The inverse of a small divisor could be infinite.
template <class To, class From>
void divide_row(double divisor, const From* from, To* to, Index n) {
  if constexpr (std::is_same_v<To, From>) {
    if (divisor == 1) return void(std::copy_n(from, n, to));
  }
  for (Index i = 0; i < n; ++i) to[i] = static_cast<To>(static_cast<double>(from[i]) / divisor);
}

/// Values [z z1 |z1|] of landmarks in T: row l of a solution [z z1] is unit_l times row l of rows, and unit_l is
/// 2^exponent e^bias_l. The largest bias is 0; that of a row of zeros is -infinity, which removes the landmark. Where
/// T's exponents reach, units are 1, and there are neither.
template <class T>
struct LandmarkValues {
  MatrixRef<T> rows;
  std::span<T> bias{};
  std::span<double> unit{};
  double exponent = 0;

  double unit_of(Index l) const { return unit.empty() ? 1 : unit[static_cast<std::size_t>(l)]; }
};

/// What a row [z z1] is measured by: |z1|, or if z is larger by far, z, so that neither overflows; 0 for a row of
/// zeros.
template <class W>
double magnitude_of(const W* row, Index d_v) {
  double largest = 0;
  bool finite = true;
  for (Index c = 0; c <= d_v; ++c) {
    const double x = std::abs(static_cast<double>(row[c])) * (c < d_v ? 0x1p-64 : 1.0);
    finite = finite && is_finite(x);
    if (is_finite(x)) largest = std::max(largest, x);
  }
  return largest > 0 || finite ? largest : 1;
}

/// The values that a system's solution stands for, with units of their own where the landmarks' sums are spread.
template <class T, class W>
LandmarkValues<T> values_of(const MatrixRef<W>& solution, bool spread, Scratch& scratch) {
  const Index m = solution.rows(), d_v = solution.cols() - 1;
  LandmarkValues<T> values{scratch.matrix<T>(m, d_v + 2)};
  if (spread) {
    values.bias = scratch.array<T>(m);
    values.unit = scratch.array<double>(m);
    double top = 0;
    for (Index l = 0; l < m; ++l) top = std::max(top, magnitude_of(row_of(solution, l), d_v));
    values.exponent = top > 0 ? std::log2(top) : 0;
  }
  for (Index l = 0; l < m; ++l) {
    if (spread) {
      const auto at = static_cast<std::size_t>(l);
      const double magnitude = magnitude_of(row_of(solution, l), d_v),
                   log = std::log(magnitude) - std::numbers::ln2 * values.exponent;
      values.bias[at] = static_cast<T>(log);
      values.unit[at] = magnitude > 0 ? magnitude * std::exp(static_cast<double>(values.bias[at]) - log) : 1;
    }
    T* const row = row_of(values.rows, l);
    divide_row(values.unit_of(l), row_of(solution, l), row, d_v + 1);
    row[d_v + 1] = std::abs(row[d_v]);
  }
  return values;
}

/// The rows, of tokens and d_v columns, times 2^exponent_i each, with infinities where results overflow and nowhere
/// else.
template <class T>
void scale_by_exponent(double exponent, const T* row, T* to, Index d_v) {
  const double half = std::exp2(std::clamp(exponent, -2000.0, 2000.0) / 2);
  for (Index c = 0; c < d_v; ++c) to[c] = static_cast<T>(static_cast<double>(row[c]) * half * half);
}

/// out <- 2^exponent kappa(q, L) z for landmarks of such biases: each row relative to its largest weight until it is
/// written.
template <class T>
void raise_rows(const GaussianKernel& kernel, const Sources<T>& in, const ConstMatrixRef<T>& land,
                const ConstMatrixRef<T>& z, std::span<const T> bias, double exponent, const ResultRows<T>& out,
                Context& context) {
  for_some_queries<T>(in, land, z, bias, [&](Index first, const Sources<T>& queries) {
    Scratch scratch = context.scratch();
    const Index n = queries.q.rows();
    const RowStates<T> states{scratch.array<T>(n), scratch.array<T>(n), scratch.matrix<T>(n, out.cols())};
    multiply_partial(kernel, queries, states, context);
    for (Index i = 0; i < n; ++i) {
      T* const part = row_of(states.weighted, i);
      scale_by_exponent(static_cast<double>(states.maximum[static_cast<std::size_t>(i)]) + exponent, part, part,
                        out.cols());
      out.set_row(first + i, part);
    }
  });
}

/// The gradients of raise_rows: dq, dland and dz. Rows are measured by their sums of weights, so that neither those nor
/// what they are multiplied by overflows.
template <class T>
void raise_rows_backward(const GaussianKernel& kernel, const Inputs<T>& in, const ConstMatrixRef<T>& land,
                         const MatrixRef<T>& z, std::span<const T> bias, double exponent, const ConstMatrixRef<T>& dout,
                         MatrixRef<T> dq, MatrixRef<T> dland, MatrixRef<T> dz, Context& context) {
  Scratch scratch = context.scratch();
  const Index n = dout.rows(), d_v = dout.cols();
  MatrixRef<T> scaled = scratch.matrix<T>(n, d_v), none = scratch.matrix<T>(n, d_v);
  const std::span<T> lse = scratch.array<T>(n);
  const Inputs<T> queries{in.q, land, z, queries_only(in.mask), bias};
  const GaussianKernel normalized = with_rows(kernel, Rows::normalized);
  kernel_matmul(normalized, queries, none, lse, context);
  for (Index i = 0; i < n; ++i) {
    const double log_sum = static_cast<double>(lse[static_cast<std::size_t>(i)]);
    scale_by_exponent(std::numbers::log2e * log_sum + exponent, row_of(dout, i), row_of(scaled, i), d_v);
  }
  set_zero(none);  // sums of weights are constants here
  kernel_matmul_backward(normalized, queries, none, lse, scaled, {dq, dland, dz}, context);
}

/// dland (m, d) <- dland + the gradient by the landmarks of kappa(L, L) = a, for its gradient da:
///   2 b (S L - diag(S 1) L)    with S = da a + (da a)^T element by element and kappa = exp(-b |x - y|^2)
/// In double, for L may be far from the origin.
template <class T, class W>
void landmark_matrix_backward(const GaussianKernel& kernel, const ConstMatrixRef<T>& land, const MatrixRef<W>& a,
                              const MatrixRef<W>& da, const MatrixRef<T>& dland, Context& context) {
  using Double = DoubleWith<T>;
  Scratch scratch = context.scratch();
  const Index m = land.rows(), d = land.cols();
  const double twice_b = 2 * score_parameters(kernel, d).bias;
  const MatrixRef<Double> s = scratch.matrix<Double>(m, m), product = scratch.matrix<Double>(m, d);
  const ConstMatrixRef<Double> wide = in_type<Double>(land, scratch, context);
  for (Index i = 0; i < m; ++i) {
    for (Index j = 0; j < i; ++j) {
      row_of(s, i)[j] = row_of(s, j)[i] = static_cast<double>(row_of(da, i)[j]) * static_cast<double>(row_of(a, i)[j]) +
                                          static_cast<double>(row_of(da, j)[i]) * static_cast<double>(row_of(a, j)[i]);
    }
    row_of(s, i)[i] = 0;
  }
  gemm<Double>(twice_b, s, wide, 0, product, context);
  for (Index i = 0; i < m; ++i) {
    add_row(-twice_b * row_sum(row_of(s, i), m), row_of(wide, i), row_of(product, i), d);
    for (Index c = 0; c < d; ++c) row_of(dland, i)[c] += static_cast<T>(row_of(product, i)[c]);
  }
}

}  // namespace attn::detail
