/// Nystromformer: softmax attention through segment means.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/detail/saved.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/few_keys.hpp>
#include <attn/engine/rows.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/matrix.hpp>

#include <cstddef>
#include <initializer_list>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace attn {
namespace detail {

/// Landmarks (m, d) each, bv = B v (m, d_v) and the log-sums of B's rows (m).
template <class T>
struct NystromFactors {
  MatrixRef<T> q_land, k_land, bv;
  std::span<RowLog<T>> lse_land;

  template <class Landmarks, ScoreKernel Kernel>
  static NystromFactors of(std::string_view who, const Landmarks& landmarks, const Kernel& kernel, const Sources<T>& in,
                           Scratch& scratch, Context& context) {
    MatrixRef<T> q_land = select_rows(landmarks, in.q, kept_queries(in), scratch, context);
    MatrixRef<T> k_land = select_rows(landmarks, in.k, kept_keys(in), scratch, context);
    check_landmark_rows(who, "q", q_land, 1, in.q.cols());
    check_landmark_rows(who, "k", k_land, 1, in.k.cols());
    const Index m = q_land.rows();
    if (m != k_land.rows()) refuse(who, "there are %td landmarks of q, %td of k, should be as many", m, k_land.rows());
    const NystromFactors f{q_land, k_land, scratch.matrix<T>(m, in.v.cols()), scratch.array<RowLog<T>>(m)};
    multiply<Kernel, T>(kernel, {f.q_land, in.k, in.v, keys_only(in.mask)}, f.bv, {nullptr, f.lse_land.data()},
                        context);
    return f;
  }
};

/// What a backward pass needs of the forward pass: copies of the factors, and lse, the log-sums of F's rows (n_q).
/// exact: the method was exact attention, and lse are its log-sums.
template <class T>
struct NystromState {
  Matrix<T> q_land{}, k_land{}, bv{};
  std::vector<RowLog<T>> lse_land{}, lse{};
  bool exact = false;

  /// For a forward pass of n queries; returns where it is to write lse.
  RowLog<T>* reset(Index n, bool is_exact) {
    exact = is_exact;
    lse.resize(static_cast<std::size_t>(n));
    return lse.data();
  }

  void copy(const NystromFactors<T>& f) {
    q_land = f.q_land;
    k_land = f.k_land;
    bv = f.bv;
    lse_land.assign(f.lse_land.begin(), f.lse_land.end());
  }
};

template <class T, class Kernel, class Landmarks, class Inverse>
using NystromSaved = Saved<NystromState<Arithmetic<T>>, ForwardPass<Kernel, Landmarks, Inverse>>;

}  // namespace detail

/// softmax(s q k^T) v ~ F Z (B v), m landmarks on each side:
///   F = softmax(s q k_land^T)   A = softmax(s q_land k_land^T)   B = softmax(s q_land k^T)   Z ~ A^+ by six iterations
/// Where m reaches the number of kept queries or of kept keys it is exact attention, which is then as cheap.
/// O((n_q + n_k) m (d + d_v) + m^3) time, O(m (d + d_v + m)) memory. Not causal, no key bias. Xiong et al. 2021, eqs.
/// 13-16. The backward pass goes through the landmarks and through the inverse's own steps, and takes about 3 times the
/// forward pass.
template <class T, class Landmarks = SegmentMeans, class Inverse = IterativePinv, ScoreKernel Kernel = SoftmaxKernel>
  requires SplitLandmarks<Landmarks, T> && CoreOfAnyMatrix<Inverse, T>
class Nystrom : public MethodBase<Nystrom<T, Landmarks, Inverse, Kernel>, T,
                                  detail::NystromSaved<T, Kernel, Landmarks, Inverse>> {
 public:
  using Saved = detail::NystromSaved<T, Kernel, Landmarks, Inverse>;  ///< what backward needs
  static constexpr std::string_view kName = "nystrom";                ///< in tables and error messages
  static constexpr detail::MaskSupport kMasks{};                      ///< which it takes

  /// How landmarks are chosen, what stands for A^+, and the kernel.
  explicit constexpr Nystrom(Landmarks landmarks = {},  // write {{.num_landmarks = 64}}
                             Inverse inverse = {}, Kernel kernel = {})
      : landmarks_(landmarks), inverse_(inverse), kernel_(kernel) {}
  Nystrom(std::initializer_list<detail::NoOption>) = delete;

  /// @{ As MethodBase says.
  void check(const detail::Sources<T>& in) const {
    detail::check_kernel<T>(kName, kernel_, in.q.cols());
    detail::check_landmarks(kName, landmarks_);
    detail::check_core<T>(kName, inverse_);
  }

  template <class SavedPointer>
  void attend(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context,
              SavedPointer saved) const {
    const bool exact = detail::covers(landmarks_.num_landmarks, in);
    detail::RowLog<T>* lse = nullptr;
    if constexpr (!std::is_null_pointer_v<SavedPointer>) lse = saved->reset(in.q.rows(), exact);
    if (exact) return detail::multiply<Kernel, T>(kernel_, in, out, {nullptr, lse}, context);
    Scratch scratch = context.scratch();
    const auto f = detail::NystromFactors<T>::of(kName, landmarks_, kernel_, in, scratch, context);  // B v
    if constexpr (!std::is_null_pointer_v<SavedPointer>) saved->copy(f);
    multiply(in, f, out, lse, context);
  }

  auto pass(const detail::Sources<T>& in) const {
    return detail::ForwardPass<Kernel, Landmarks, Inverse>::of(kernel_, in, landmarks_, inverse_);
  }

  void differentiate(const Inputs<T>& in, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                     const Saved& saved, const Gradients<T>& gradients, Context& context) const {
    if (saved.exact) return detail::multiply_backward<Kernel, T>(kernel_, in, out, saved.lse, dout, gradients, context);
    differentiate_product(in, out, saved.lse, dout, saved, gradients, context);
  }

  constexpr auto wide() const
    requires NarrowScalar<T>
  {
    return Nystrom<float, Landmarks, Inverse, Kernel>(landmarks_, inverse_, kernel_);
  }
  /// @}

  /// zbv <- Z (B v) of factors, or of what is saved of them.
  template <class Factors>
  void apply_core(const Factors& f, MatrixRef<T> zbv, Context& context) const {
    Scratch scratch = context.scratch();
    MatrixRef<T> a = scratch.matrix<T>(f.q_land.rows(), f.k_land.rows());
    detail::kernel_matrix<Kernel, T>(kernel_, f.q_land, f.k_land, a, context);  // A
    detail::set_scaled(zbv, 1, f.bv);
    inverse_.apply(a, zbv, context);
  }

  /// out <- F Z (B v), likewise; lse, unless null, <- the log-sums of F's rows.
  template <class Factors>
  void multiply(const detail::Sources<T>& in, const Factors& f, const detail::ResultRows<T>& out,
                detail::RowLog<T>* lse, Context& context) const {
    Scratch scratch = context.scratch();
    const MatrixRef<T> zbv = scratch.matrix<T>(f.bv.rows(), f.bv.cols());
    apply_core(f, zbv, context);
    detail::multiply<Kernel, T>(kernel_, {in.q, f.k_land, zbv, queries_only(in.mask)}, out, {nullptr, lse}, context);
  }

  /// gradients <- those of F Z (B v), which is out with lse the log-sums of F's rows, for its gradient dout.
  void differentiate_product(const Inputs<T>& in, const ConstMatrixRef<T>& out, std::span<const detail::RowLog<T>> lse,
                             const ConstMatrixRef<T>& dout, const detail::NystromState<T>& f,
                             const Gradients<T>& gradients, Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = f.q_land.rows(), d = in.q.cols(), d_v = in.v.cols();
    MatrixRef<T> dq_land = scratch.matrix<T>(m, d), dk_land = scratch.matrix<T>(m, d), added = scratch.matrix<T>(m, d);
    const MatrixRef<T> zbv = scratch.matrix<T>(m, d_v), dbv = scratch.matrix<T>(m, d_v);
    apply_core(f, zbv, context);
    detail::multiply_backward<Kernel, T>(kernel_, {in.q, f.k_land, zbv, queries_only(in.mask)}, out, lse, dout,
                                         {gradients.dq, dk_land, dbv}, context);  // F: dbv is that by Z B v
    differentiate_core(f, dbv, dq_land, added, context);
    dk_land += added;
    detail::multiply_backward<Kernel, T>(kernel_, {f.q_land, in.k, in.v, keys_only(in.mask)}, f.bv, f.lse_land, dbv,
                                         {added, gradients.dk, gradients.dv}, context);  // B
    dq_land += added;
    if constexpr (requires { landmarks_.template scatter<T>(dq_land, detail::kept_queries(in), gradients.dq); }) {
      landmarks_.template scatter<T>(dq_land, detail::kept_queries(in), gradients.dq);
      landmarks_.template scatter<T>(dk_land, detail::kept_keys(in), gradients.dk);
    }
  }

 private:
  template <class>
  friend struct detail::Distributed;

  /// dbv: the gradient by Z B v -> that by B v; dq_land and dk_land <- those by the landmarks within A. A = A I, and so
  /// its gradients are those of any streamed product.
  void differentiate_core(const detail::NystromState<T>& f, MatrixRef<T> dbv, MatrixRef<T> dq_land,
                          MatrixRef<T> dk_land, Context& context) const {
    Scratch scratch = context.scratch();
    const Index m = f.q_land.rows();
    MatrixRef<T> a = scratch.matrix<T>(m, m), identity = scratch.matrix<T>(m, m), kept = scratch.matrix<T>(m, m),
                 da = scratch.matrix<T>(m, m), unused = scratch.matrix<T>(m, m), bv = scratch.matrix<T>(m, dbv.cols());
    const std::span<detail::RowLog<T>> lse = scratch.array<detail::RowLog<T>>(m);
    identity.setIdentity();
    const Inputs<T> in{f.q_land, f.k_land, identity};
    detail::multiply<Kernel, T>(kernel_, detail::sources(in), a, {nullptr, lse.data()}, context);
    kept = a;
    bv = f.bv;
    inverse_.backward(a, bv, dbv, da, context);
    detail::multiply_backward<Kernel, T>(kernel_, in, kept, lse, da, {dq_land, dk_land, unused}, context);
  }

  Landmarks landmarks_;
  Inverse inverse_;
  Kernel kernel_;
};

}  // namespace attn
