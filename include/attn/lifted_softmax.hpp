/// Lifted softmax: Skyformer's Nystrom method applied to softmax attention itself.
#pragma once

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/detail/checks.hpp>
#include <attn/detail/panel.hpp>
#include <attn/kernel.hpp>
#include <attn/landmarks.hpp>
#include <attn/skyformer.hpp>

#include <cmath>
#include <limits>
#include <span>
#include <string_view>

namespace attn {

/// softmax(s q k^T) v ~ (A~ v) / (A~ 1), A~ the lifted Nystrom approximation of A = exp(s q k^T). Since
///   exp(s q_i.k_j) = exp(s |q_i|^2 / 2) kappa(q_i, k_j) exp(s |k_j|^2 / 2)    with the Gaussian kernel kappa of bandwidth 1/sqrt s
/// and the queries' factor cancels, it is Skyformer with normalised rows and the log-weight s |k_j|^2 / 2 on each key. It can blow up
/// where A~ 1 comes near 0, for nothing keeps A~ positive: the divisor is kept above 1e-6 of the sum of its terms' magnitudes.
/// Shapes, cost and errors as Skyformer's. Chen et al. 2021, figure 1.
template <class T, class Landmarks = UniformSample, class Inverse = RidgeInverse>
  requires JointLandmarks<Landmarks, T> && Core<Inverse, T>
class LiftedSoftmax {
 public:
  using Scalar = T;
  static constexpr std::string_view kName = "lifted-softmax";

  explicit constexpr LiftedSoftmax(Landmarks landmarks = {}, Inverse inverse = {.gamma = 1e-3}, SoftmaxKernel kernel = {})
      : landmarks_(landmarks), inverse_(inverse), kernel_(kernel) {}

  bool supports(const Inputs<T>& in) const { return in.mask.causal == Causal::none; }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    detail::check(kName, in, out);
    detail::check_not_causal(kName, in);
    detail::check_landmarks(kName, landmarks_);
    inverse_.check(kName);
    const double scale = score_parameters(kernel_, in.q.cols()).scale;
    if (!(std::isfinite(scale) && scale > 0)) detail::refuse(kName, "scale is ", scale, ", should be positive and finite");
    Scratch scratch = context.scratch();
    const GaussianKernel gaussian{.bandwidth = 1 / std::sqrt(scale), .rows = Rows::normalized};
    const Inputs<T> weighted{in.q, in.k, in.v, in.mask, log_weights(in, static_cast<T>(scale), scratch)};
    Skyformer<T, Landmarks, Inverse>{landmarks_, inverse_, gaussian}.forward(weighted, out, context);
  }

 private:
  /// s |k_j|^2 / 2 and the caller's bias. Dropped keys may hold anything, so they get no weight.
  static std::span<const T> log_weights(const Inputs<T>& in, T scale, Scratch& scratch) {
    const std::span<T> weights = scratch.array<T>(in.k.rows());
    for (Index j = 0; j < in.k.rows(); ++j) {
      const auto at = static_cast<std::size_t>(j);
      weights[at] = -std::numeric_limits<T>::infinity();
      if (!detail::keeps_key(in, j)) continue;
      weights[at] = scale / 2 * detail::squared_norm(in.k.data() + j * in.k.outerStride(), in.k.cols());
      if (!in.key_bias.empty()) weights[at] += in.key_bias[at];
    }
    return weights;
  }

  Landmarks landmarks_;
  Inverse inverse_;
  SoftmaxKernel kernel_;
};

static_assert(Approximator<LiftedSoftmax<float>>);

}  // namespace attn
