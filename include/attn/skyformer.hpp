/// Skyformer: Gaussian attention through landmarks, by a Nystrom method lifted to a positive semidefinite matrix.
#pragma once

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/engine/checks.hpp>
#include <attn/detail/divided_rows.hpp>
#include <attn/detail/landmark_sums.hpp>
#include <attn/detail/saved.hpp>
#include <attn/detail/skyformer_factors.hpp>
#include <attn/detail/spread_landmarks.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/narrow.hpp>

#include <concepts>
#include <span>
#include <string_view>

namespace attn {

/// kappa(q, k) v ~ kappa(q, L) (kappa(L, L) + gamma I)^-1 kappa(L, k) v with the Gaussian kernel kappa and landmarks L,
/// rows of [q; k]. The kernel matrix of [q; k] is positive semidefinite, and so is what its Nystrom approximation
/// leaves, which bounds the error of the block that is wanted. Normalised rows: (C~ v)_i / (C~ 1)_i, the divisor kept
/// above 1e-6 of the sum of its terms' magnitudes. Where the landmarks' sums kappa(L, k) 1 are further apart than T's
/// exponents reach, what is between landmarks is computed in double. q (n_q, d), k (n_k, d), v (n_k, d_v), out (n_q,
/// d_v). O((n_q + n_k) m (d + d_v) + m^3) time, O(m (d + d_v + m)) memory; not causal. Throws std::invalid_argument
/// when shapes disagree or are empty, an option is out of range, or the mask is causal. Chen et al. 2021, eq. 6 and
/// Theorem 2.
template <class T, class Landmarks = UniformSample, class Inverse = RidgeInverse>
  requires JointLandmarks<Landmarks, T> && Core<Inverse, T>
class Skyformer {
 public:
  /// @{ As Approximator says.
  using Scalar = T;
  static constexpr std::string_view kName = "skyformer";

  /// How landmarks are chosen, the inverse with its gamma, and the kernel.
  explicit constexpr Skyformer(Landmarks landmarks = {}, Inverse inverse = {}, GaussianKernel kernel = {})
      : landmarks_(landmarks), inverse_(inverse), kernel_(kernel) {}

  template <class Stored = T>
  bool supports(const Inputs<Stored>& in) const {
    return in.mask.causal == Causal::none;
  }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    detail::check(kName, in, out);
    run(detail::sources(in), out, context, nullptr);
  }

  /// What backward needs, and of which inputs and options it is.
  struct Saved : detail::SkyformerSaved<T> {
    detail::ForwardPass<Landmarks, Inverse> pass{};  ///< checked by backward
  };

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    detail::check(kName, in, out);
    run(detail::sources(in), out, context, &saved);
  }
  /// @}

  /// Through the landmarks, wherever they were sampled, and through the inverse. About 3 times the forward pass; where
  /// rows are normalized one product more, and memory for two copies of v.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Context& context) const {
    backward(in, out, dout, saved, gradients, {}, context);
  }

  /// The same, and dbias (n_k), unless empty, <- the gradient by the key bias.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, std::span<T> dbias, Context& context) const {
    detail::check_backward(kName, in, out, dout, gradients, {}, dbias);
    saved.pass.check(kName, kernel_, in, landmarks_, inverse_);
    detail::skyformer_backward<T>(kernel_, landmarks_, inverse_, in, saved, out, dout, gradients, dbias, context);
  }

 private:
  template <NarrowScalar, class>
  friend class detail::Widened;
  template <class U, class L, class I>
    requires JointLandmarks<L, U> && Core<I, U>
  friend class LiftedSoftmax;

  void check(const detail::Sources<T>& in) const {
    detail::check_kernel<T>(kName, kernel_, in.q.cols());
    detail::check_not_causal(kName, in);
    detail::check_landmarks(kName, landmarks_);
    detail::check_core<T>(kName, inverse_);
  }

  /// saved may be null.
  void run(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context, Saved* saved) const {
    check(in);
    if (saved != nullptr) saved->pass = {};
    Scratch scratch = context.scratch();
    const MatrixRef<T> land = detail::select_jointly(landmarks_, in, scratch);
    detail::check_landmark_rows(kName, "q and k", land, detail::any_kept(in) ? 1 : 0, in.q.cols());
    const detail::LandmarkSums<T> sums =
        detail::sum_over_keys<T>(kernel_, in, detail::relative_bias(in, scratch), land, scratch, context);
    if (saved != nullptr) {
      saved->keep(land, sums);
      saved->pass.keep(kernel_, in, landmarks_, inverse_);
    }
    if (land.rows() == 0) return out.set_zero();  // no query or no key is kept
    if (sums.spread) return detail::multiply_spread<T>(kernel_, inverse_, in, land, sums, out, context);
    multiply(in, land, sums.sums, out, context);
  }

  /// out <- kappa(q, L) (kappa(L, L) + gamma I)^-1 sums.
  void multiply(const detail::Sources<T>& in, const ConstMatrixRef<T>& land, const ConstMatrixRef<T>& sums,
                const detail::ResultRows<T>& out, Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = land.rows(), d_v = in.v.cols();
    MatrixRef<T> values = scratch.matrix<T>(m, d_v + 2), a = scratch.matrix<T>(m, m);
    detail::solve_landmarks<T>(kernel_, inverse_, land, sums, a, values.leftCols(d_v + 1), context);
    if (kernel_.rows == Rows::raw) {
      const detail::Sources<T> queries{in.q, land, values.leftCols(d_v), queries_only(in.mask)};
      return detail::multiply<GaussianKernel, T>(kernel_, queries, out, nullptr, context);
    }
    values.col(d_v + 1) = values.col(d_v).cwiseAbs();
    detail::divide_rows(kernel_, in, land, values, out, context);
  }

  Landmarks landmarks_;
  Inverse inverse_;
  GaussianKernel kernel_;
};

/// With narrow types in memory.
template <NarrowScalar T, class Landmarks, class Inverse>
  requires JointLandmarks<Landmarks, T> && Core<Inverse, T>
class Skyformer<T, Landmarks, Inverse> : public detail::Widened<T, Skyformer<float, Landmarks, Inverse>> {
  using Wide = Skyformer<float, Landmarks, Inverse>;

 public:
  /// As for float.
  explicit constexpr Skyformer(Landmarks landmarks = {}, Inverse inverse = {}, GaussianKernel kernel = {})
      : detail::Widened<T, Wide>(Wide(landmarks, inverse, kernel)) {}

  using detail::Widened<T, Wide>::backward;

  /// The same, and dbias (n_k), unless empty, <- the gradient by the key bias, in float.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const typename Wide::Saved& saved,
                const Gradients<T>& gradients, std::span<float> dbias, Context& context) const {
    detail::check_backward<T>(Wide::kName, in, out, dout, gradients, {}, dbias);
    detail::round_backward<T>(in, out, dout, gradients, context,
                              [&](const auto& wide, const auto& o, const auto& d_o, const auto& to) {
                                this->wide().backward(wide, o, d_o, saved, to, dbias, context);
                              });
  }

  /// The same with dbias of T.
  template <std::convertible_to<std::span<T>> Bias>
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const typename Wide::Saved& saved,
                const Gradients<T>& gradients, Bias&& dbias, Context& context) const {
    detail::check_backward<T>(Wide::kName, in, out, dout, gradients, {}, std::span<T>(dbias));
    detail::round_bias_gradient(std::span<T>(dbias), context, [&](std::span<float> wide) {
      backward(in, out, dout, saved, gradients, wide, context);
    });
  }
};

}  // namespace attn
