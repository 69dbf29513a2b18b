/// Exact attention: softmax, and Gaussian ("kernelized"), streamed.
#pragma once

#include <attn/approximator.hpp>
#include <attn/engine/checks.hpp>
#include <attn/detail/saved.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/narrow.hpp>

#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace attn {

/// out <- [kappa] v for any kernel, masks and causal alignments included.
///   SoftmaxKernel    softmax(s q k^T) v                           Vaswani et al. 2017, eq. 1
///   GaussianKernel   exp(-|q_i - k_j|^2 / (2 h^2)) v, h^2 = sqrt d   Chen et al. 2021, eq. 3
/// q (n_q, d), k (n_k, d), v (n_k, d_v), out (n_q, d_v). Throws std::invalid_argument when shapes disagree or are
/// empty, or when the kernel's parameter is out of range. 2 n_q n_k (d + d_v) flops, O(tile) memory. Dao et al. 2022,
/// Alg. 1.
template <class T, ScoreKernel Kernel>
class ExactAttention {
 public:
  /// @{ As Approximator says.
  using Scalar = T;
  static constexpr std::string_view kName = std::is_same_v<Kernel, SoftmaxKernel>    ? "softmax"
                                            : std::is_same_v<Kernel, GaussianKernel> ? "gaussian"
                                                                                     : "exact";

  /// With its parameter.
  explicit constexpr ExactAttention(Kernel kernel = {}) : kernel_(kernel) {}

  /// Every mask is supported.
  template <class Stored = T>
  bool supports(const Inputs<Stored>&) const {
    return true;
  }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    detail::check(kName, in, out);
    run(detail::sources(in), out, context, nullptr);
  }

  /// The log-sums of the rows (n_q), each counted from an origin of its own, which keeps digits, and of which inputs
  /// they are; raw rows need neither.
  struct Saved {
    std::vector<detail::RowLog<T>> lse{};  ///< of each row, or empty
    detail::PassInputs inputs{};           ///< checked by backward
  };

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    detail::check(kName, in, out);
    run(detail::sources(in), out, context, &saved);
  }
  /// @}

  /// Streamed once more: 2 n_q n_k (3 d + 2 d_v) flops. Dao et al. 2022, Alg. 4.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Context& context) const {
    detail::check_backward(kName, in, out, dout, gradients);
    const bool normalized = score_parameters(kernel_, in.q.cols()).rows == Rows::normalized;
    detail::check_saved(kName, "rows of q", static_cast<Index>(saved.lse.size()), normalized ? in.q.rows() : 0);
    if (normalized) saved.inputs.check(kName, detail::PassInputs::of(kernel_, in));
    detail::multiply_backward<Kernel, T>(kernel_, in, out, saved.lse, dout, gradients, context);
  }

 private:
  template <NarrowScalar, class>
  friend class detail::Widened;

  /// saved may be null.
  void run(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context, Saved* saved) const {
    detail::check_kernel<T>(kName, kernel_, in.q.cols());
    detail::RowLog<T>* lse = nullptr;
    if (saved != nullptr) {
      const bool normalized = score_parameters(kernel_, in.q.cols()).rows == Rows::normalized;
      saved->lse.resize(normalized ? static_cast<std::size_t>(in.q.rows()) : 0);
      saved->inputs = normalized ? detail::PassInputs::of(kernel_, in) : detail::PassInputs{};
      lse = saved->lse.data();
    }
    detail::multiply<Kernel, T>(kernel_, in, out, {nullptr, lse}, context);
  }

  Kernel kernel_;
};

/// With narrow types in memory.
template <NarrowScalar T, ScoreKernel Kernel>
class ExactAttention<T, Kernel> : public detail::Widened<T, ExactAttention<float, Kernel>> {
 public:
  /// As for float.
  explicit constexpr ExactAttention(Kernel kernel = {})
      : detail::Widened<T, ExactAttention<float, Kernel>>(ExactAttention<float, Kernel>(kernel)) {}
};

/// softmax(s q k^T) v.
template <class T>
using SoftmaxAttention = ExactAttention<T, SoftmaxKernel>;

/// Kernelized attention, C v with C_ij = exp(-|q_i - k_j|^2 / (2 h^2)).
template <class T>
using GaussianAttention = ExactAttention<T, GaussianKernel>;

}  // namespace attn
