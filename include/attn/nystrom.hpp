/// Nystromformer: softmax attention through segment means.
#pragma once

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/detail/checks.hpp>
#include <attn/detail/kernel_matrix.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>

#include <algorithm>
#include <string_view>

namespace attn {

/// softmax(s q k^T) v ~ F Z (B v), m landmarks on each side:
///   F = softmax(s q k_land^T)    A = softmax(s q_land k_land^T)    B = softmax(s q_land k^T)    Z ~ A^+ by six iterations
/// Where m reaches the number of kept queries or of kept keys it is exact attention, which is then as cheap.
/// q (n_q, d), k (n_k, d), v (n_k, d_v), out (n_q, d_v). O((n_q + n_k) m (d + d_v) + m^3) time, O(m (d + d_v + m)) memory. Not causal,
/// no key bias. Throws std::invalid_argument when shapes disagree or are empty, an option is out of range, or a mask is not supported.
/// Xiong et al. 2021, eqs. 13-16.
template <class T, class Landmarks = SegmentMeans, class Inverse = IterativePinv, ScoreKernel Kernel = SoftmaxKernel>
  requires SplitLandmarks<Landmarks, T> && Core<Inverse, T>
class Nystrom {
 public:
  using Scalar = T;
  static constexpr std::string_view kName = "nystrom";

  explicit constexpr Nystrom(Landmarks landmarks = {}, Inverse inverse = {}, Kernel kernel = {})
      : landmarks_(landmarks), inverse_(inverse), kernel_(kernel) {}

  bool supports(const Inputs<T>& in) const { return in.mask.causal == Causal::none && in.key_bias.empty(); }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    detail::check(kName, in, out);
    detail::check_not_causal(kName, in);
    detail::check_no_bias(kName, in);
    detail::check_kernel(kName, kernel_);
    detail::check_landmarks(kName, landmarks_);
    inverse_.check(kName);
    if (detail::covers(landmarks_.num_landmarks, in)) return kernel_matmul(kernel_, in, out, context);
    Scratch scratch = context.scratch();
    const auto keeps_q = [&](Index i) { return detail::keeps_query(in, i); };
    const auto keeps_k = [&](Index j) { return detail::keeps_key(in, j); };
    MatrixRef<T> q_land = landmarks_.template select<T>(in.q, keeps_q, scratch);
    MatrixRef<T> k_land = landmarks_.template select<T>(in.k, keeps_k, scratch);
    MatrixRef<T> values = scratch.matrix<T>(q_land.rows(), in.v.cols()), a = scratch.matrix<T>(q_land.rows(), k_land.rows());
    kernel_matmul(kernel_, Inputs<T>{q_land, in.k, in.v, keys_only(in.mask)}, values, context);           // B v
    detail::kernel_matrix<Kernel, T>(kernel_, q_land, k_land, a, context);                                // A
    inverse_.apply(a, values, context);                                                                   // Z (B v)
    kernel_matmul(kernel_, Inputs<T>{in.q, k_land, values, queries_only(in.mask)}, out, context);         // F Z (B v)
  }

 private:
  Landmarks landmarks_;
  Inverse inverse_;
  Kernel kernel_;
};

static_assert(Approximator<Nystrom<float>>);

}  // namespace attn
