/// The landmark side of Nystromformer's product F C (B v), C a core in place of A^+, and its gradients. Nystrom and
/// ShiftedNystrom share it.
///   F = softmax(s q k_land^T)    A = softmax(s q_land k_land^T)    B = softmax(s q_land k^T)
#pragma once

#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/engine/few_keys.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/matrix.hpp>

#include <span>
#include <vector>

namespace attn::detail {

/// Landmarks (m, d) each, sums B v (m, d_v) and the log-sums of B's rows (m).
template <class T>
struct NystromFactors {
  MatrixRef<T> q_land, k_land, sums;
  RowLog<T>* lse_land;
};

/// What a backward pass needs of the forward pass: copies of the factors, and lse, the log-sums of F's rows (n_q).
/// exact: the method was exact attention, and lse are its log-sums.
template <class T>
struct NystromSaved {
  Matrix<T> q_land{}, k_land{}, sums{};
  std::vector<RowLog<T>> lse_land{}, lse{};
  bool exact = false;

  /// For a forward pass of n queries; returns where it is to write lse.
  RowLog<T>* reset(Index n, bool is_exact) {
    exact = is_exact;
    lse.resize(static_cast<std::size_t>(n));
    return lse.data();
  }

  void keep(const NystromFactors<T>& factors) {
    q_land = factors.q_land;
    k_land = factors.k_land;
    sums = factors.sums;
    lse_land.assign(factors.lse_land, factors.lse_land + factors.q_land.rows());
  }
};

/// a (m, m) <- A and its log-sums: A = A I, so that its gradients are those of any streamed product.
template <ScoreKernel Kernel, class T>
void landmark_matrix(const Kernel& kernel, const NystromSaved<T>& saved, const ConstMatrixRef<T>& identity,
                     MatrixRef<T> a, std::span<RowLog<T>> lse, Context& context) {
  const Inputs<T> in{saved.q_land, saved.k_land, identity};
  multiply<Kernel, T>(kernel, sources(in), a, {nullptr, lse.data()}, context);
}

template <class T>
MatrixRef<T> identity_matrix(Index m, Scratch& scratch) {
  MatrixRef<T> identity = scratch.matrix<T>(m, m);
  identity.setIdentity();
  return identity;
}

/// values (m, d_v) <- C (B v).
template <ScoreKernel Kernel, class T, class Inverse>
void landmark_values(const Kernel& kernel, const Inverse& inverse, const NystromSaved<T>& saved, MatrixRef<T> values,
                     Context& context) {
  Scratch scratch = context.scratch();
  MatrixRef<T> a = scratch.matrix<T>(saved.q_land.rows(), saved.k_land.rows());
  kernel_matrix<Kernel, T>(kernel, saved.q_land, saved.k_land, a, context);
  values = saved.sums;
  inverse.apply(a, values, context);
}

/// gradients <- those of F C (B v), which is out with lse the log-sums of F's rows, for its gradient dout.
template <ScoreKernel Kernel, class T, class Landmarks, class Inverse>
void nystrom_backward(const Kernel& kernel, const Landmarks& landmarks, const Inverse& inverse, const Inputs<T>& in,
                      const NystromSaved<T>& saved, const ConstMatrixRef<T>& out, std::span<const RowLog<T>> lse,
                      const ConstMatrixRef<T>& dout, const Gradients<T>& gradients, Context& context) {
  Scratch scratch = context.scratch();
  const Index m = saved.q_land.rows(), d = in.q.cols(), d_v = in.v.cols();
  MatrixRef<T> dq_land = scratch.matrix<T>(m, d), dk_land = scratch.matrix<T>(m, d), added = scratch.matrix<T>(m, d);
  MatrixRef<T> values = scratch.matrix<T>(m, d_v), dvalues = scratch.matrix<T>(m, d_v);
  landmark_values<Kernel, T>(kernel, inverse, saved, values, context);
  multiply_backward<Kernel, T>(kernel, Inputs<T>{in.q, saved.k_land, values, queries_only(in.mask)}, out, lse, dout,
                               {gradients.dq, dk_land, dvalues}, context);  // F
  {
    Scratch core = scratch.nested();
    MatrixRef<T> a = core.matrix<T>(m, m), kept = core.matrix<T>(m, m), da = core.matrix<T>(m, m),
                 dunit = core.matrix<T>(m, m);
    const MatrixRef<T> identity = identity_matrix<T>(m, core);
    const std::span<RowLog<T>> lse_a = core.array<RowLog<T>>(m);
    landmark_matrix<Kernel, T>(kernel, saved, identity, a, lse_a, context);
    kept = a;
    values = saved.sums;
    inverse.backward(a, values, dvalues, da, context);  // C
    multiply_backward<Kernel, T>(kernel, Inputs<T>{saved.q_land, saved.k_land, identity}, kept, lse_a, da,
                                 {dq_land, added, dunit}, context);
  }
  dk_land += added;
  multiply_backward<Kernel, T>(kernel, Inputs<T>{saved.q_land, in.k, in.v, keys_only(in.mask)}, saved.sums,
                               saved.lse_land, dvalues, {added, gradients.dk, gradients.dv}, context);  // B
  dq_land += added;
  if constexpr (requires {
                  landmarks.template scatter<T>(
                      dq_land, [](Index) { return true; }, gradients.dq);
                }) {
    landmarks.template scatter<T>(dq_land, kept_queries(in), gradients.dq);
    landmarks.template scatter<T>(dk_land, kept_keys(in), gradients.dk);
  }
}

}  // namespace attn::detail
