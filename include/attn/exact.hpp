/// Exact attention: softmax, and Gaussian ("kernelized"), streamed.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/approximator.hpp>
#include <attn/detail/saved.hpp>
#include <attn/engine/bfloat16_strip.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/few_queries.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>

#include <cstddef>
#include <initializer_list>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace attn {

/// How a method multiplies tokens of a narrow type: as fast as the processor can, or in float. It makes a difference to
/// Eigen::bfloat16 where programs are compiled for AVX512_BF16, whose units add products of bfloat16 numbers to floats:
/// weights are then rounded to bfloat16 too, and rows divided by the sums of the rounded ones.
enum class Products { fastest, float32 };

namespace detail {

/// The log-sums of the rows (n_q), each counted from an origin of its own, which keeps digits; raw rows need none.
template <class T, ScoreKernel Kernel>
struct ExactState {
  std::vector<RowLog<T>> lse{};
};

template <class T, ScoreKernel Kernel>
using ExactSaved = Saved<ExactState<Arithmetic<T>, Kernel>, PassInputs>;

}  // namespace detail

/// out <- [kappa] v for any kernel, masks and causal alignments included.
///   SoftmaxKernel    softmax(s q k^T) v                           Vaswani et al. 2017, eq. 1
///   GaussianKernel   exp(-|q_i - k_j|^2 / (2 h^2)) v, h^2 = sqrt d   Chen et al. 2021, eq. 3
/// 2 n_q n_k (d + d_v) flops, O(tile) memory. Dao et al. 2022, Alg. 1. The backward pass streams once more: 2 n_q n_k
/// (3 d + 2 d_v) flops. Dao et al. 2022, Alg. 4.
template <class T, ScoreKernel Kernel>
class ExactAttention : public MethodBase<ExactAttention<T, Kernel>, T, detail::ExactSaved<T, Kernel>> {
  using Base = MethodBase<ExactAttention<T, Kernel>, T, detail::ExactSaved<T, Kernel>>;

 public:
  using Saved = detail::ExactSaved<T, Kernel>;  ///< what backward needs
  /// In tables and error messages.
  static constexpr std::string_view kName = std::is_same_v<Kernel, SoftmaxKernel>    ? "softmax"
                                            : std::is_same_v<Kernel, GaussianKernel> ? "gaussian"
                                                                                     : "exact";
  static constexpr detail::MaskSupport kMasks{.causal = true, .key_bias = true, .positions = true};  ///< which it takes

  /// With its parameter.
  explicit constexpr ExactAttention(Kernel kernel = {}) : kernel_(kernel) {}  // write {{.scale = 0.5}}
  /// With both.
  explicit constexpr ExactAttention(Products products, Kernel kernel = {}) : kernel_(kernel), products_(products) {}
  ExactAttention(std::initializer_list<detail::NoOption>) = delete;

  /// That parameter.
  const Kernel& kernel() const { return kernel_; }

  using Base::forward;

  /// The same, and lse (n_q) <- log sum_j kappa_ij of each row, -infinity for one that sees no key.
  void forward(const Inputs<T>& in, MatrixRef<T> out, std::span<detail::Arithmetic<T>> lse, Context& context) const {
    detail::check(kName, in, out, lse);
    kernel_matmul(kernel_, in, out, lse, context);
  }

  /// forward with keys and values of a narrow type beside float queries: bitwise what it gives for them widened. lse:
  /// empty, or as above.
  template <NarrowScalar Cache>
    requires std::is_same_v<T, float>
  void forward(const CacheInputs<Cache>& in, MatrixRef<T> out, std::span<float> lse, Context& context) const {
    detail::check(kName, in, out, lse);
    kernel_matmul(kernel_, in, out, lse, context);
  }
  /// The same without log-sums.
  template <NarrowScalar Cache>
    requires std::is_same_v<T, float>
  void forward(const CacheInputs<Cache>& in, MatrixRef<T> out, Context& context) const {
    forward(in, out, std::span<float>{}, context);
  }

  /// Up to how many queries of d features, of heads that share their keys, are computed together by multi_head.
  Index most_shared_queries(Index d) const {
    const ScoreParameters parameters = score_parameters(kernel_, d);
    return detail::FewQueries<detail::Arithmetic<T>>::most(parameters.bias != 0, parameters.gaussian());
  }

  /// @{ As MethodBase says.
  void check(const detail::Sources<T>& in) const { detail::check_kernel<T>(kName, kernel_, in.q.cols()); }

  void attend(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context, Saved* saved) const {
    std::span<detail::RowLog<T>> lse{};
    if (saved != nullptr) {
      saved->lse.resize(normalized(in) ? static_cast<std::size_t>(in.q.rows()) : 0);
      lse = saved->lse;
    }
    detail::multiply<Kernel, T>(kernel_, in, out, {nullptr, detail::data_or_null(lse)}, context);
  }

  detail::PassInputs pass(const detail::Sources<T>& in) const {
    return normalized(in) ? detail::PassInputs::of(kernel_, in) : detail::PassInputs{};
  }

  void differentiate(const Inputs<T>& in, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                     const Saved& saved, const Gradients<T>& gradients, Context& context) const {
    detail::multiply_backward<Kernel, T>(kernel_, in, out, saved.lse, dout, gradients, context);
  }

  constexpr auto wide() const
    requires NarrowScalar<T>
  {
    return ExactAttention<float, Kernel>(kernel_);
  }

  void choose_products(detail::Sources<float>& in, bool saves, Scratch& scratch) const
    requires std::is_same_v<T, Eigen::bfloat16>
  {
    if (products_ == Products::float32) return;
    const ScoreParameters parameters = score_parameters(kernel_, in.q.cols());
    detail::use_bfloat16_units(parameters, saves && parameters.rows == Rows::normalized, in, scratch);
  }
  /// @}

 private:
  template <class>
  friend struct detail::Distributed;

  bool normalized(const detail::Sources<T>& in) const {
    return score_parameters(kernel_, in.q.cols()).rows == Rows::normalized;
  }

  Kernel kernel_;
  Products products_ = Products::fastest;
};

/// softmax(s q k^T) v.
template <class T>
using SoftmaxAttention = ExactAttention<T, SoftmaxKernel>;

/// Kernelized attention, C v with C_ij = exp(-|q_i - k_j|^2 / (2 h^2)).
template <class T>
using GaussianAttention = ExactAttention<T, GaussianKernel>;

}  // namespace attn
