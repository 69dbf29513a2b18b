/// Sums over the keys that each landmark sees: kappa(L, k) [v 1], with key biases relative to the largest.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/rows.hpp>
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

namespace attn::detail {

inline GaussianKernel with_rows(const GaussianKernel& kernel, Rows rows) {
  return {.bandwidth = kernel.bandwidth, .rows = rows};
}

/// Key biases: the largest finite one of the kept keys (0 if there is none), and all of them relative to it, which
/// overflows nowhere; those of -infinity stay so. Rows that are divided by their sums depend on the relative ones
/// alone.
template <class T>
struct KeyBias {
  T largest = 0;
  std::span<const T> relative{};
};

template <class T>
KeyBias<T> relative_bias(const Sources<T>& in, Scratch& scratch) {
  constexpr T kLowest = std::numeric_limits<T>::lowest();
  if (in.key_bias.empty()) return {};
  const T largest = BiasOrigins<T>::of_inputs(in, scratch).common;
  if (largest == 0) return {0, in.key_bias};
  const std::span<T> relative = scratch.array<T>(in.k.rows());
  std::transform(in.key_bias.begin(), in.key_bias.end(), relative.begin(),
                 [&](T bias) { return bias < kLowest ? bias : std::max(bias - largest, kLowest); });
  return {largest, relative};
}

/// log2 of the weight that is common to all keys, where the rows of the result have it too; finite.
template <class T>
double common_exponent(const GaussianKernel& kernel, const KeyBias<T>& bias) {
  constexpr double kMost = 1e300;
  return kernel.rows == Rows::raw ? std::numbers::log2e * std::clamp(static_cast<double>(bias.largest), -kMost, kMost)
                                  : 0;
}

/// kappa(L, k) [v 1] (m, d_v + 1). Where T's exponents reach: 2^top times sums, top being 0 where the rows of the
/// result are raw, so that normalized ones bear any common factor. Where they do not (spread): row l is 2^exponents_l
/// times row l of sums. Without e^largest, that of the key biases, where rows are normalized.
template <class T>
struct LandmarkSums {
  MatrixRef<T> sums;
  std::span<double> exponents;
  T top = 0;
  bool spread = false;
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

/// The sums of landmarks (m, d) over the keys of in, whose biases are given.
template <class T>
LandmarkSums<T> sum_over_keys(const GaussianKernel& kernel, const Sources<T>& in, const KeyBias<T>& bias,
                              const ConstMatrixRef<T>& land, Scratch& scratch, Context& context) {
  const Index m = land.rows(), d_v = in.v.cols();
  LandmarkSums<T> result{scratch.matrix<T>(m, d_v + 1), scratch.array<double>(m)};
  if (m == 0) return result;
  const RowStates<T> states{scratch.array<T>(m), scratch.array<T>(m), result.sums.leftCols(d_v)};
  multiply_partial(kernel, Sources<T>{land, in.k, in.v, keys_only(in.mask), bias.relative}, states, context);
  const double common = common_exponent(kernel, bias);
  for (std::size_t l = 0; l < states.sum.size(); ++l) {
    result.sums(static_cast<Index>(l), d_v) = states.sum[l];
    result.exponents[l] =
        states.sum[l] == 0 ? -std::numeric_limits<double>::infinity() : static_cast<double>(states.maximum[l]) + common;
  }
  result.spread = leaves_range<T>(result.exponents, kernel.rows, common);
  if (result.spread) return result;
  if (kernel.rows == Rows::normalized) {
    const double top = *std::max_element(result.exponents.begin(), result.exponents.end());
    result.top = is_finite(top) ? static_cast<T>(top) : T(0);
  }
  for (Index l = 0; l < m; ++l) {
    const double exponent = result.exponents[static_cast<std::size_t>(l)] - static_cast<double>(result.top);
    T* const row = result.sums.data() + l * result.sums.outerStride();
    scale_row(static_cast<T>(std::exp2(exponent)), row, row, d_v + 1);
  }
  return result;
}

/// The gradients of kappa(L, k) [v 1] for dsums (m, d_v + 1) by the landmarks (to.dq), k, v and the key bias: kernel,
/// bias, sums and lse are as in kernel_matmul_backward.
template <class T>
void sum_over_keys_backward(const GaussianKernel& kernel, const Inputs<T>& in, std::span<const T> bias,
                            const ConstMatrixRef<T>& land, const ConstMatrixRef<T>& sums, std::span<const T> lse,
                            const ConstMatrixRef<T>& dsums, const Gradients<T>& to, std::span<T> dbias,
                            Context& context) {
  Scratch scratch = context.scratch();
  const Index n = in.v.rows(), d_v = in.v.cols();
  MatrixRef<T> v = scratch.matrix<T>(n, d_v + 1), dv = scratch.matrix<T>(n, d_v + 1);
  v.leftCols(d_v) = in.v;
  v.col(d_v).setOnes();
  const Inputs<T> keys{land, in.k, v, keys_only(in.mask), bias};
  kernel_matmul_backward(kernel, keys, sums, lse, dsums, {to.dq, to.dk, dv}, context, dbias);
  MatrixRef<T>(to.dv) = dv.leftCols(d_v);
}

}  // namespace attn::detail
