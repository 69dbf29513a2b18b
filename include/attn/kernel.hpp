/// Score kernels: what turns a query and a key into a weight.
#pragma once

#include <attn/engine/requirements.hpp>

#include <Eigen/Core>

#include <cmath>
#include <concepts>
#include <optional>

namespace attn {

/// Whether a row of weights is used as it is or divided by its sum.
enum class Rows { raw, normalized };

/// kappa(q, k) = exp(scale q.k - bias (|q|^2 + |k|^2)), rows raw or divided by their sum: all that the library asks of
/// a kernel.
struct ScoreParameters {
  double scale;  ///< of the scores q.k
  double bias;   ///< of the squares |q|^2 and |k|^2
  Rows rows;     ///< what becomes of the rows

  /// Whether kappa is at most 1, as a Gaussian is:
  /// kappa(q, k) = exp(-scale |q - k|^2 / 2 - (bias - scale / 2) (|q|^2 + |k|^2)).
  constexpr bool bounded() const { return scale >= 0 && bias >= scale / 2; }

  /// Whether kappa(q, k) = exp(-bias |q - k|^2).
  constexpr bool gaussian() const { return bias != 0 && scale == 2 * bias; }
};

/// softmax(scale q k^T), scale = 1/sqrt(d) unless given. Vaswani et al. 2017, eq. 1.
struct SoftmaxKernel {
  std::optional<double> scale{};  ///< s, finite
};

/// exp(-|q - k|^2 / (2 bandwidth^2)), bandwidth = d^(1/4) unless given, so that it scales scores by 1/sqrt(d) as
/// softmax does. Rows are raw in Chen et al. 2021, eq. 3; normalized rows are kernel regression (Nadaraya 1964, Watson
/// 1964).
struct GaussianKernel {
  std::optional<double> bandwidth{};  ///< h, positive and finite
  Rows rows = Rows::raw;              ///< what becomes of the rows
};

/// The parameters of a kernel for tokens of d features.
inline ScoreParameters score_parameters(const SoftmaxKernel& kernel, Eigen::Index d) {
  return {kernel.scale.value_or(1.0 / std::sqrt(static_cast<double>(d))), 0.0, Rows::normalized};
}

/// exp(-|q - k|^2 / (2 h^2)) = exp(q.k / h^2 - (|q|^2 + |k|^2) / (2 h^2)).
inline ScoreParameters score_parameters(const GaussianKernel& kernel, Eigen::Index d) {
  const double h = kernel.bandwidth.value_or(std::sqrt(std::sqrt(static_cast<double>(d))));
  return {1.0 / (h * h), 0.5 / (h * h), kernel.rows};
}

/// A kernel of one's own has three members: scale(d), bias(d) and rows().
template <class K>
  requires requires(const K& kernel, Eigen::Index d) {
    { kernel.scale(d) } -> std::convertible_to<double>;
    { kernel.bias(d) } -> std::convertible_to<double>;
    { kernel.rows() } -> std::same_as<Rows>;
  }
ScoreParameters score_parameters(const K& kernel, Eigen::Index d) {
  return {kernel.scale(d), kernel.bias(d), kernel.rows()};
}

/// Anything with score_parameters: the two kernels above, or a type with scale(d), bias(d) and rows().
template <class K>
concept ScoreKernel = std::copyable<K> && requires(const K& kernel, Eigen::Index d) {
  { score_parameters(kernel, d) } -> std::same_as<ScoreParameters>;
};

namespace detail {

/// Whether a kernel may have a bias: for one that has none, what a bias needs is not compiled.
template <ScoreKernel Kernel>
inline constexpr bool kMayHaveBias = !std::same_as<Kernel, SoftmaxKernel>;

}  // namespace detail

}  // namespace attn
