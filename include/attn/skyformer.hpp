/// Skyformer: Gaussian attention through landmarks, by a Nystrom method lifted to a positive semidefinite matrix.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/detail/divided_rows.hpp>
#include <attn/detail/landmark_sums.hpp>
#include <attn/detail/saved.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/rows.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <concepts>
#include <initializer_list>
#include <span>
#include <string_view>
#include <vector>

namespace attn {
namespace detail {

/// The landmarks (m, d), and what LandmarkSums has of them.
template <class T>
struct SkyformerState {
  Matrix<T> land{}, sums{};
  std::vector<double> exponents{};
  double top = 0;

  void copy(const ConstMatrixRef<T>& landmarks, const LandmarkSums<T>& of_keys) {
    land = landmarks;
    sums = of_keys.sums;
    exponents.assign(of_keys.exponents.begin(), of_keys.exponents.end());
    top = of_keys.top;
  }
};

template <class T, class Kernel, class Landmarks, class Inverse>
using SkyformerSaved = Saved<SkyformerState<Arithmetic<T>>, ForwardPass<Kernel, Landmarks, Inverse>>;

}  // namespace detail

/// kappa(q, k) v ~ kappa(q, L) (kappa(L, L) + gamma I)^-1 kappa(L, k) v with the Gaussian kernel kappa and landmarks L,
/// rows of [q; k]. The kernel matrix of [q; k] is positive semidefinite, and so is what its Nystrom approximation
/// leaves, which bounds the error of the block that is wanted. Normalised rows: (C~ v)_i / (C~ 1)_i, the divisor kept
/// above 1e-6 of the sum of its terms' magnitudes. Where the landmarks' sums kappa(L, k) 1 are further apart than T's
/// exponents reach, what is between landmarks is computed in double. O((n_q + n_k) m (d + d_v) + m^3) time, O(m (d +
/// d_v + m)) memory. Not causal. Chen et al. 2021, eq. 6 and Theorem 2. The backward pass goes through the landmarks,
/// wherever they were sampled, and through the inverse. It takes about 3 times the forward pass; where rows are
/// normalized one product more, and memory for two copies of v.
template <class T, class Landmarks = UniformSample, class Inverse = RidgeInverse>
  requires JointLandmarks<Landmarks, T> && Core<Inverse, T>
class Skyformer : public MethodBase<Skyformer<T, Landmarks, Inverse>, T,
                                    detail::SkyformerSaved<T, GaussianKernel, Landmarks, Inverse>> {
 public:
  using Saved = detail::SkyformerSaved<T, GaussianKernel, Landmarks, Inverse>;  ///< what backward needs
  using MethodBase<Skyformer, T, Saved>::backward;
  static constexpr std::string_view kName = "skyformer";          ///< in tables and error messages
  static constexpr detail::MaskSupport kMasks{.key_bias = true};  ///< which it takes

  /// How landmarks are chosen, the inverse with its gamma, and the kernel.
  explicit constexpr Skyformer(Landmarks landmarks = {},  // write {{.num_landmarks = 64}}
                               Inverse inverse = {}, GaussianKernel kernel = {})
      : landmarks_(landmarks), inverse_(inverse), kernel_(kernel) {}
  Skyformer(std::initializer_list<detail::NoOption>) = delete;

  /// The same backward pass, and dbias (n_k), unless empty, <- the gradient by the key bias; of a narrow T in float.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, std::span<detail::Arithmetic<T>> dbias, Context& context) const {
    detail::check_backward<T>(kName, in, out, dout, gradients, {}, dbias);
    this->run_backward(in, out, dout, saved, gradients, context, dbias);
  }

  /// The same with dbias of a narrow T.
  template <std::convertible_to<std::span<T>> Bias>
    requires NarrowScalar<T>
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Bias&& dbias, Context& context) const {
    detail::check_backward<T>(kName, in, out, dout, gradients, {}, std::span<T>(dbias));
    detail::set_rounded(std::span<T>(dbias), context, [&](std::span<float> wide) {
      this->run_backward(in, out, dout, saved, gradients, context, wide);
    });
  }

  /// @{ As MethodBase says.
  void check(const detail::Sources<T>& in) const {
    detail::check_kernel<T>(kName, kernel_, in.q.cols());
    detail::check_landmarks(kName, landmarks_);
    detail::check_core<T>(kName, inverse_);
  }

  void attend(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context,
              detail::SkyformerState<T>* saved) const {
    Scratch scratch = context.scratch();
    const MatrixRef<T> land = detail::select_jointly(landmarks_, in, scratch);
    detail::check_landmark_rows(kName, "q and k", land, detail::any_kept(in) ? 1 : 0, in.q.cols());
    const detail::LandmarkSums<T> sums =
        detail::sum_over_keys<T>(kernel_, in, detail::relative_bias(in, scratch), land, scratch, context);
    if (saved != nullptr) saved->copy(land, sums);
    if (land.rows() == 0) return out.set_zero();  // no query or no key is kept
    if (sums.spread()) return multiply<WideScalar>(in, land, sums, out, context);
    multiply<T>(in, land, sums, out, context);
  }

  auto pass(const detail::Sources<T>& in) const {
    return detail::ForwardPass<GaussianKernel, Landmarks, Inverse>::of(kernel_, in, landmarks_, inverse_);
  }

  /// dbias may be empty.
  void differentiate(const Inputs<T>& in, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                     const detail::SkyformerState<T>& saved, const Gradients<T>& gradients, Context& context,
                     std::span<T> dbias = {}) const {
    const Gradients<T> to = gradients;
    if (saved.land.rows() == 0) {
      for (const MatrixRef<T>& gradient : {to.dq, to.dk, to.dv}) detail::set_zero(gradient);
      return std::fill(dbias.begin(), dbias.end(), T(0));
    }
    Scratch scratch = context.scratch();
    const MatrixRef<T> dland = scratch.matrix<T>(saved.land.rows(), in.q.cols());
    const Known known{in, saved.land, {saved.sums, saved.exponents, saved.top}, out, dout};
    if (known.sums.spread()) {
      differentiate_product<WideScalar>(known, to, dland, dbias, context);
    } else {
      differentiate_product<T>(known, to, dland, dbias, context);
    }
    if constexpr (requires { landmarks_.scatter(in, dland, to.dq, to.dk, scratch); })
      landmarks_.scatter(in, dland, to.dq, to.dk, scratch);
  }

  constexpr auto wide() const
    requires NarrowScalar<T>
  {
    return Skyformer<float, Landmarks, Inverse>(landmarks_, inverse_, kernel_);
  }
  /// @}

 private:
  template <class>
  friend struct detail::Distributed;

  using WideScalar = detail::WideScalar<T, Inverse>;

  /// What the backward pass reads.
  struct Known {
    const Inputs<T>& in;
    ConstMatrixRef<T> land;
    detail::LandmarkSums<T> sums;
    const ConstMatrixRef<T>&out, &dout;
  };

  /// out <- kappa(q, L) (kappa(L, L) + gamma I)^-1 sums, what is between landmarks in W.
  template <class W>
  void multiply(const detail::Sources<T>& in, const ConstMatrixRef<T>& land, const detail::LandmarkSums<T>& sums,
                const detail::ResultRows<T>& out, Context& context) const {
    Scratch scratch = context.scratch();
    detail::LandmarkSystem<W> system(kernel_, land, sums, scratch, context);
    inverse_.apply(system.a, system.sums, context);
    const auto z = detail::values_of<T>(system.sums, sums.spread(), scratch);
    if (kernel_.rows == Rows::normalized)
      return detail::divide_rows<T>(kernel_, in, land, z.rows, out, context, z.bias);
    const MatrixRef<T> values = detail::left_columns(z.rows, out.cols());
    if (sums.spread())
      return detail::raise_rows<T>(kernel_, in, land, values, z.bias, z.exponent + system.top, out, context);
    detail::multiply<GaussianKernel, T>(kernel_, {in.q, land, values, queries_only(in.mask)}, out, nullptr, context);
  }

  /// to, dland (m, d) and dbias <- the gradients by q, k and v as far as they do not come from the landmarks, by these,
  /// and by the key bias.
  template <class W>
  void differentiate_product(const Known& of, const Gradients<T>& to, MatrixRef<T> dland, std::span<T> dbias,
                             Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = dland.rows(), columns = of.sums.sums.cols();
    const MatrixRef<W> a = scratch.matrix<W>(m, m), da = scratch.matrix<W>(m, m),
                       solution = scratch.matrix<W>(m, columns), dsums = scratch.matrix<W>(m, columns);
    const MatrixRef<T> added = scratch.matrix<T>(m, dland.cols()), dz = scratch.matrix<T>(m, columns);
    const detail::LandmarkSystem<W> system(kernel_, of.land, of.sums, scratch, context);
    detail::set_scaled(a, 1, system.a);
    detail::set_scaled(solution, 1, system.sums);
    inverse_.apply(a, solution, context);
    const auto z = detail::values_of<T>(solution, of.sums.spread(), scratch);
    differentiate_queries(of, z, system.top, to.dq, dland, dz, context);  // kappa(q, L) z
    for (Index l = 0; l < m; ++l)
      detail::divide_row(z.unit_of(l), detail::row_of(dz, l), detail::row_of(dsums, l), columns);
    detail::set_scaled(a, 1, system.a);
    inverse_.backward(a, system.sums, dsums, da, context);  // (kappa(L, L) + gamma I)^-1 sums
    detail::landmark_matrix_backward(kernel_, of.land, system.a, da, dland, context);
    const detail::KeyBias<T> bias = detail::relative_bias(detail::sources(of.in), scratch);
    detail::sum_over_keys_backward(kernel_, of.in, bias, of.land, of.sums, system.top, dsums, {added, to.dk, to.dv},
                                   dbias, context);  // kappa(L, k) [v 1]
    dland += added;
  }

  /// dq, dland (m, d) and dz (m, d_v + 1) <- the gradients of kappa(q, L) [z z1], its rows divided by their sums if
  /// normalized.
  void differentiate_queries(const Known& of, const detail::LandmarkValues<T>& z, double top, MatrixRef<T> dq,
                             MatrixRef<T> dland, MatrixRef<T> dz, Context& context) const {
    const Index d_v = of.dout.cols();
    if (kernel_.rows == Rows::normalized) {
      return detail::divide_rows_backward<T>(kernel_, of.in, of.land, detail::left_columns(z.rows, d_v + 1), of.out,
                                             of.dout, dq, dland, dz, context, z.bias);
    }
    for (Index l = 0; l < dz.rows(); ++l) dz(l, d_v) = 0;
    const MatrixRef<T> values = detail::left_columns(z.rows, d_v), dvalues = detail::left_columns(dz, d_v);
    if (of.sums.spread()) {
      return detail::raise_rows_backward<T>(kernel_, of.in, of.land, values, z.bias, z.exponent + top, of.dout, dq,
                                            dland, dvalues, context);
    }
    kernel_matmul_backward(kernel_, Inputs<T>{of.in.q, of.land, values, queries_only(of.in.mask)}, of.out, {}, of.dout,
                           {dq, dland, dvalues}, context);
  }

  Landmarks landmarks_;
  Inverse inverse_;
  GaussianKernel kernel_;
};

}  // namespace attn
