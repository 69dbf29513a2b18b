/// Nystromformer: softmax attention through segment means.
#pragma once

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/few_keys.hpp>
#include <attn/detail/nystrom_factors.hpp>
#include <attn/detail/saved.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/narrow.hpp>

#include <span>
#include <string_view>
#include <type_traits>

namespace attn {

/// softmax(s q k^T) v ~ F Z (B v), m landmarks on each side:
///   F = softmax(s q k_land^T)   A = softmax(s q_land k_land^T)   B = softmax(s q_land k^T)   Z ~ A^+ by six iterations
/// Where m reaches the number of kept queries or of kept keys it is exact attention, which is then as cheap.
/// q (n_q, d), k (n_k, d), v (n_k, d_v), out (n_q, d_v). O((n_q + n_k) m (d + d_v) + m^3) time, O(m (d + d_v + m))
/// memory. Not causal, no key bias. Throws std::invalid_argument when shapes disagree or are empty, an option is out of
/// range, or a mask is not supported. Xiong et al. 2021, eqs. 13-16.
template <class T, class Landmarks = SegmentMeans, class Inverse = IterativePinv, ScoreKernel Kernel = SoftmaxKernel>
  requires SplitLandmarks<Landmarks, T> && CoreOfAnyMatrix<Inverse, T>
class Nystrom {
 public:
  /// @{ As Approximator says.
  using Scalar = T;
  static constexpr std::string_view kName = "nystrom";

  /// How landmarks are chosen, what stands for A^+, and the kernel.
  explicit constexpr Nystrom(Landmarks landmarks = {}, Inverse inverse = {}, Kernel kernel = {})
      : landmarks_(landmarks), inverse_(inverse), kernel_(kernel) {}

  template <class Stored = T>
  bool supports(const Inputs<Stored>& in) const {
    return in.mask.causal == Causal::none && in.key_bias.empty();
  }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    detail::check(kName, in, out);
    run(detail::sources(in), out, context, nullptr);
  }

  /// What backward needs, and of which inputs and options it is.
  struct Saved : detail::NystromSaved<T> {
    detail::ForwardPass<Landmarks, Inverse> pass{};  ///< checked by backward
  };

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    detail::check(kName, in, out);
    run(detail::sources(in), out, context, &saved);
  }
  /// @}

  /// Through the landmarks and through the inverse's own steps. About 3 times the forward pass.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Context& context) const {
    detail::check_backward(kName, in, out, dout, gradients);
    saved.pass.check(kName, kernel_, in, landmarks_, inverse_);
    if (saved.exact) return detail::multiply_backward<Kernel, T>(kernel_, in, out, saved.lse, dout, gradients, context);
    detail::nystrom_backward<Kernel, T>(kernel_, landmarks_, inverse_, in, saved, out, saved.lse, dout, gradients,
                                        context);
  }

 private:
  template <NarrowScalar, class>
  friend class detail::Widened;

  void check(const detail::Sources<T>& in) const {
    detail::check_not_causal(kName, in);
    detail::check_no_bias(kName, in);
    detail::check_kernel<T>(kName, kernel_, in.q.cols());
    detail::check_landmarks(kName, landmarks_);
    detail::check_core<T>(kName, inverse_);
  }

  /// saved: a pointer, or nullptr itself, with which nothing of saving is compiled.
  template <class SavedPointer>
  void run(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context, SavedPointer saved) const {
    check(in);
    const bool exact = detail::covers(landmarks_.num_landmarks, in);
    detail::RowLog<T>* lse = nullptr;
    if constexpr (!std::is_null_pointer_v<SavedPointer>) {
      saved->pass = {};
      lse = saved->reset(in.q.rows(), exact);
    }
    Scratch scratch = context.scratch();
    if (exact) {
      detail::multiply<Kernel, T>(kernel_, in, out, {nullptr, lse}, context);
    } else {
      const detail::NystromFactors<T> factors = select(in, scratch, context);
      multiply(in, factors, out, lse, context);
      if constexpr (!std::is_null_pointer_v<SavedPointer>) saved->keep(factors);
    }
    if constexpr (!std::is_null_pointer_v<SavedPointer>) saved->pass.keep(kernel_, in, landmarks_, inverse_);
  }

  /// The landmarks, and room for what is known of them.
  detail::NystromFactors<T> select(const detail::Sources<T>& in, Scratch& scratch, Context& context) const {
    MatrixRef<T> q_land = detail::select_rows(landmarks_, in.q, detail::kept_queries(in), scratch, context);
    MatrixRef<T> k_land = detail::select_rows(landmarks_, in.k, detail::kept_keys(in), scratch, context);
    detail::check_landmark_rows(kName, "q", q_land, 1, in.q.cols());
    detail::check_landmark_rows(kName, "k", k_land, 1, in.k.cols());
    if (q_land.rows() != k_land.rows())
      detail::refuse(kName, "there are %td landmarks of q, %td of k, should be as many", q_land.rows(), k_land.rows());
    return {q_land, k_land, scratch.matrix<T>(q_land.rows(), in.v.cols()),
            scratch.elements<detail::RowLog<T>>(q_land.rows())};
  }

  /// out <- F Z (B v); lse, unless null, <- the log-sums of F's rows.
  void multiply(const detail::Sources<T>& in, const detail::NystromFactors<T>& f, const detail::ResultRows<T>& out,
                detail::RowLog<T>* lse, Context& context) const {
    using Sources = detail::Sources<T>;
    Scratch scratch = context.scratch();
    MatrixRef<T> values = scratch.matrix<T>(f.sums.rows(), f.sums.cols()),
                 a = scratch.matrix<T>(f.q_land.rows(), f.k_land.rows());
    detail::multiply<Kernel, T>(kernel_, Sources{f.q_land, in.k, in.v, keys_only(in.mask)}, f.sums,
                                {nullptr, f.lse_land}, context);                // B v
    detail::kernel_matrix<Kernel, T>(kernel_, f.q_land, f.k_land, a, context);  // A
    detail::set_scaled(values, 1, f.sums);
    inverse_.apply(a, values, context);  // Z (B v)
    detail::multiply<Kernel, T>(kernel_, Sources{in.q, f.k_land, values, queries_only(in.mask)}, out, {nullptr, lse},
                                context);  // F Z (B v)
  }

  Landmarks landmarks_;
  Inverse inverse_;
  Kernel kernel_;
};

/// With narrow types in memory.
template <NarrowScalar T, class Landmarks, class Inverse, ScoreKernel Kernel>
  requires SplitLandmarks<Landmarks, T> && CoreOfAnyMatrix<Inverse, T>
class Nystrom<T, Landmarks, Inverse, Kernel> : public detail::Widened<T, Nystrom<float, Landmarks, Inverse, Kernel>> {
  using Wide = Nystrom<float, Landmarks, Inverse, Kernel>;

 public:
  /// As for float.
  explicit constexpr Nystrom(Landmarks landmarks = {}, Inverse inverse = {}, Kernel kernel = {})
      : detail::Widened<T, Wide>(Wide(landmarks, inverse, kernel)) {}
};

}  // namespace attn
