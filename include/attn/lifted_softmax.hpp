/// Lifted softmax: Skyformer's Nystrom method applied to softmax attention itself.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/detail/landmark_sums.hpp>
#include <attn/detail/saved.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/kernel.hpp>
#include <attn/landmarks.hpp>
#include <attn/skyformer.hpp>

#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <span>
#include <string_view>

namespace attn {

/// softmax(s q k^T) v ~ (A~ v) / (A~ 1), A~ the lifted Nystrom approximation of A = exp(s q k^T). Since
///   exp(s q_i.k_j) = exp(s |q_i|^2 / 2) kappa(q_i, k_j) exp(s |k_j|^2 / 2),  kappa Gaussian of bandwidth 1/sqrt s,
/// and the queries' factor cancels, it is Skyformer with normalised rows and the log-weight s |k_j|^2 / 2 on each key.
/// It can blow up where A~ 1 comes near 0, for nothing keeps A~ positive: the divisor is kept above 1e-6 of the sum of
/// its terms' magnitudes. Shapes, cost and errors as Skyformer's. Chen et al. 2021, figure 1. The backward pass
/// is Skyformer's, with the log-weights' own: dk_j gets s dbias_j k_j.
template <class T, class Landmarks = UniformSample, class Inverse = RidgeInverse>
  requires JointLandmarks<Landmarks, T> && Core<Inverse, T>
class LiftedSoftmax : public MethodBase<LiftedSoftmax<T, Landmarks, Inverse>, T,
                                        detail::SkyformerSaved<T, SoftmaxKernel, Landmarks, Inverse>> {
 public:
  using Saved = detail::SkyformerSaved<T, SoftmaxKernel, Landmarks, Inverse>;  ///< what backward needs
  static constexpr std::string_view kName = "lifted-softmax";                  ///< in tables and error messages
  static constexpr detail::MaskSupport kMasks{.key_bias = true};               ///< which it takes

  /// How landmarks are chosen, the inverse with its gamma, and the kernel.
  explicit constexpr LiftedSoftmax(Landmarks landmarks = {},  // write {{.num_landmarks = 64}}
                                   Inverse inverse = {.gamma = 1e-3}, SoftmaxKernel kernel = {})
      : landmarks_(landmarks), inverse_(inverse), kernel_(kernel) {}
  LiftedSoftmax(std::initializer_list<detail::NoOption>) = delete;

  /// @{ As MethodBase says.
  void check(const detail::Sources<T>& in) const {
    detail::check_landmarks(kName, landmarks_);
    detail::check_core<T>(kName, inverse_);
    const double s = scale(in.q.cols());
    if (!(detail::is_finite(s) && s > 0)) detail::refuse(kName, "scale is %g, should be positive and finite", s);
    detail::check_kernel<T>(kName, kernel_, in.q.cols());
  }

  void attend(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context, Saved* saved) const {
    Scratch scratch = context.scratch();
    const detail::Sources<T> weighted{in.q, in.k, in.v, in.mask,
                                      log_weights(in, detail::relative_bias(in, scratch).relative, scratch)};
    const auto method = skyformer(in.q.cols());
    method.check(weighted);
    method.attend(weighted, out, context, saved);
  }

  auto pass(const detail::Sources<T>& in) const {
    return detail::ForwardPass<SoftmaxKernel, Landmarks, Inverse>::of(kernel_, in, landmarks_, inverse_);
  }

  void differentiate(const Inputs<T>& in, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                     const Saved& saved, const Gradients<T>& gradients, Context& context) const {
    Scratch scratch = context.scratch();
    const std::span<T> dbias = scratch.array<T>(in.k.rows());
    const detail::Sources<T> from = detail::sources(in);
    const Inputs<T> weighted{in.q, in.k, in.v, in.mask,
                             log_weights(from, detail::relative_bias(from, scratch).relative, scratch)};
    skyformer(in.q.cols()).differentiate(weighted, out, dout, saved, gradients, context, dbias);
    MatrixRef<T> dk = gradients.dk;
    const T s = static_cast<T>(scale(in.q.cols()));
    for (Index j = 0; j < dk.rows(); ++j) {
      if (detail::keeps_key(in, j)) dk.row(j) += s * dbias[static_cast<std::size_t>(j)] * in.k.row(j);
    }
  }

  constexpr auto wide() const
    requires NarrowScalar<T>
  {
    return LiftedSoftmax<float, Landmarks, Inverse>(landmarks_, inverse_, kernel_);
  }
  /// @}

 private:
  template <class>
  friend struct detail::Distributed;

  double scale(Index d) const { return score_parameters(kernel_, d).scale; }

  Skyformer<T, Landmarks, Inverse> skyformer(Index d) const {
    return Skyformer<T, Landmarks, Inverse>{
        landmarks_, inverse_, {.bandwidth = 1 / std::sqrt(scale(d)), .rows = Rows::normalized}};
  }

  /// s |k_j|^2 / 2 and the caller's bias, relative to its largest; bias may be empty. Dropped keys may hold anything,
  /// so they get no weight.
  std::span<const T> log_weights(const detail::Sources<T>& in, std::span<const T> bias, Scratch& scratch) const {
    const std::span<T> weights = scratch.array<T>(in.k.rows());
    Scratch temporary = scratch.nested();
    T* buffer = temporary.elements<T>(in.k.cols());
    const T half_scale = static_cast<T>(scale(in.q.cols())) / 2;
    for (Index j = 0; j < in.k.rows(); ++j) {
      const auto at = static_cast<std::size_t>(j);
      weights[at] = -std::numeric_limits<T>::infinity();
      if (!detail::keeps_key(in, j)) continue;
      weights[at] = half_scale * detail::squared_norm(in.k.row(j, buffer), in.k.cols());
      if (!bias.empty()) weights[at] += bias[at];
    }
    return weights;
  }

  Landmarks landmarks_;
  Inverse inverse_;
  SoftmaxKernel kernel_;
};

}  // namespace attn
