/// Lifted softmax: Skyformer's Nystrom method applied to softmax attention itself.
#pragma once

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/simd.hpp>
#include <attn/detail/landmark_sums.hpp>
#include <attn/engine/rows.hpp>
#include <attn/detail/saved.hpp>
#include <attn/kernel.hpp>
#include <attn/landmarks.hpp>
#include <attn/narrow.hpp>
#include <attn/skyformer.hpp>

#include <cmath>
#include <limits>
#include <span>
#include <string_view>

namespace attn {

/// softmax(s q k^T) v ~ (A~ v) / (A~ 1), A~ the lifted Nystrom approximation of A = exp(s q k^T). Since
///   exp(s q_i.k_j) = exp(s |q_i|^2 / 2) kappa(q_i, k_j) exp(s |k_j|^2 / 2),  kappa Gaussian of bandwidth 1/sqrt s,
/// and the queries' factor cancels, it is Skyformer with normalised rows and the log-weight s |k_j|^2 / 2 on each key.
/// It can blow up where A~ 1 comes near 0, for nothing keeps A~ positive: the divisor is kept above 1e-6 of the sum of
/// its terms' magnitudes. Shapes, cost and errors as Skyformer's. Chen et al. 2021, figure 1.
template <class T, class Landmarks = UniformSample, class Inverse = RidgeInverse>
  requires JointLandmarks<Landmarks, T> && Core<Inverse, T>
class LiftedSoftmax {
 public:
  /// @{ As Approximator says.
  using Scalar = T;
  static constexpr std::string_view kName = "lifted-softmax";

  /// How landmarks are chosen, the inverse with its gamma, and the kernel.
  explicit constexpr LiftedSoftmax(Landmarks landmarks = {}, Inverse inverse = {.gamma = 1e-3},
                                   SoftmaxKernel kernel = {})
      : landmarks_(landmarks), inverse_(inverse), kernel_(kernel) {}

  template <class Stored = T>
  bool supports(const Inputs<Stored>& in) const {
    return in.mask.causal == Causal::none;
  }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    detail::check(kName, in, out);
    run(detail::sources(in), out, context, nullptr);
  }

  /// What Skyformer saved, and of which inputs and options it is.
  struct Saved {
    typename Skyformer<T, Landmarks, Inverse>::Saved of_skyformer{};  ///< for its backward
    detail::ForwardPass<Landmarks, Inverse> pass{};                   ///< checked by backward
  };

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    detail::check(kName, in, out);
    run(detail::sources(in), out, context, &saved);
  }
  /// @}

  /// Skyformer's, and the log-weights' own: dk_j gets s dbias_j k_j.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Context& context) const {
    detail::check_backward(kName, in, out, dout, gradients);
    saved.pass.check(kName, kernel_, in, landmarks_, inverse_);
    Scratch scratch = context.scratch();
    const std::span<T> dbias = scratch.array<T>(in.k.rows());
    const Inputs<T> weighted{in.q, in.k, in.v, in.mask, log_weights(detail::sources(in), scratch)};
    skyformer(in).backward(weighted, out, dout, saved.of_skyformer, gradients, dbias, context);
    MatrixRef<T> dk = gradients.dk;
    for (Index j = 0; j < dk.rows(); ++j) {
      if (detail::keeps_key(in, j))
        dk.row(j) += static_cast<T>(scale(in)) * dbias[static_cast<std::size_t>(j)] * in.k.row(j);
    }
  }

 private:
  template <NarrowScalar, class>
  friend class detail::Widened;

  /// saved may be null.
  void run(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context, Saved* saved) const {
    check(in);
    if (saved != nullptr) saved->pass = {};
    Scratch scratch = context.scratch();
    skyformer(in).run({in.q, in.k, in.v, in.mask, log_weights(in, scratch)}, out, context,
                      saved == nullptr ? nullptr : &saved->of_skyformer);
    if (saved != nullptr) saved->pass.keep(kernel_, in, landmarks_, inverse_);
  }

  void check(const detail::Sources<T>& in) const {
    detail::check_not_causal(kName, in);
    detail::check_landmarks(kName, landmarks_);
    detail::check_core<T>(kName, inverse_);
    if (!(detail::is_finite(scale(in)) && scale(in) > 0))
      detail::refuse(kName, "scale is %g, should be positive and finite", scale(in));
    detail::check_kernel<T>(kName, kernel_, in.q.cols());
  }

  template <class In>
  double scale(const In& in) const {
    return score_parameters(kernel_, in.q.cols()).scale;
  }

  template <class In>
  Skyformer<T, Landmarks, Inverse> skyformer(const In& in) const {
    return Skyformer<T, Landmarks, Inverse>{
        landmarks_, inverse_, {.bandwidth = 1 / std::sqrt(scale(in)), .rows = Rows::normalized}};
  }

  /// s |k_j|^2 / 2 and the caller's bias, relative to its largest. Dropped keys may hold anything, so they get no
  /// weight.
  std::span<const T> log_weights(const detail::Sources<T>& in, Scratch& scratch) const {
    const std::span<T> weights = scratch.array<T>(in.k.rows());
    const std::span<const T> bias = detail::relative_bias(in, scratch).relative;
    Scratch temporary = scratch.nested();
    T* buffer = temporary.elements<T>(in.k.cols());
    const T half_scale = static_cast<T>(scale(in)) / 2;
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

/// With narrow types in memory.
template <NarrowScalar T, class Landmarks, class Inverse>
  requires JointLandmarks<Landmarks, T> && Core<Inverse, T>
class LiftedSoftmax<T, Landmarks, Inverse> : public detail::Widened<T, LiftedSoftmax<float, Landmarks, Inverse>> {
  using Wide = LiftedSoftmax<float, Landmarks, Inverse>;

 public:
  /// As for float.
  explicit constexpr LiftedSoftmax(Landmarks landmarks = {}, Inverse inverse = {.gamma = 1e-3},
                                   SoftmaxKernel kernel = {})
      : detail::Widened<T, Wide>(Wide(landmarks, inverse, kernel)) {}
};

}  // namespace attn
