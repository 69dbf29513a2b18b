/// The landmark side of Skyformer's product kappa(q, L) (kappa(L, L) + gamma I)^-1 kappa(L, k) v, and its gradients.
#pragma once

#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/detail/divided_rows.hpp>
#include <attn/detail/kernel_matrix.hpp>
#include <attn/detail/nystrom_factors.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>

namespace attn::detail {

/// The landmarks (m, d), and sums = kappa(L, k) [v 1] (m, d_v + 1), divided by 2^top where
/// rows are normalized.
template <class T>
struct SkyformerSaved {
  Matrix<T> land{}, sums{};
  T top = 0;

  void keep(const ConstMatrixRef<T>& landmarks, const ConstMatrixRef<T>& their_sums, T their_top) {
    land = landmarks;
    sums = their_sums;
    top = their_top;
  }
};

/// kappa(L, L) has raw rows whatever those of the result are.
inline GaussianKernel raw_rows(const GaussianKernel& kernel) {
  return {.bandwidth = kernel.bandwidth, .rows = Rows::raw};
}

/// sums (m, d_v + 1) <- kappa(L, k) [v 1]; where the rows of the result are normalized, relative to the largest of kappa's maxima, a
/// factor that cancels, so that large key biases do not overflow. Returns log2 of it.
template <class T>
T sum_over_keys(const GaussianKernel& kernel, const Sources<T>& in, const ConstMatrixRef<T>& land, MatrixRef<T> sums,
                Context& context) {
  Scratch scratch = context.scratch();
  const Index m = land.rows(), d_v = in.v.cols();
  const RowStates<T> states{scratch.array<T>(m), scratch.array<T>(m), sums.leftCols(d_v)};
  multiply_partial(kernel, Sources<T>{land, in.k, in.v, keys_only(in.mask), in.key_bias}, states, context);
  T top = 0;
  if (kernel.rows == Rows::normalized) top = *std::max_element(states.maximum.begin(), states.maximum.end());
  for (Index j = 0; j < m; ++j) {
    const T factor = std::exp2(states.maximum[static_cast<std::size_t>(j)] - top);
    sums.row(j).head(d_v) *= factor;
    sums(j, d_v) = factor * states.sum[static_cast<std::size_t>(j)];
  }
  return top;
}

/// values (m, d_v + 1) <- (kappa(L, L) + gamma I)^-1 sums. a (m, m) is overwritten.
template <class T, class Inverse>
void solve_landmarks(const GaussianKernel& kernel, const Inverse& inverse, const ConstMatrixRef<T>& land,
                     const ConstMatrixRef<T>& sums, MatrixRef<T> a, MatrixRef<T> values, Context& context) {
  values = sums;
  kernel_matrix<GaussianKernel, T>(raw_rows(kernel), land, land, a, context);
  inverse.apply(a, values, context);
}

/// dq, dland and dvalues (m, d_v + 1) <- the gradients of kappa(q, L) values, its rows divided by their sums if normalized.
template <class T>
void backward_queries(const GaussianKernel& kernel, const Inputs<T>& in, const SkyformerSaved<T>& saved, const MatrixRef<T>& values,
                      const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout, MatrixRef<T> dq, MatrixRef<T> dland,
                      MatrixRef<T> dvalues, Context& context) {
  const Index d_v = in.v.cols();
  if (kernel.rows == Rows::normalized) {
    return divide_rows_backward<T>(kernel, in, saved.land, values, out, dout, dq, dland, dvalues, context);
  }
  dvalues.col(d_v).setZero();
  kernel_matmul_backward(kernel, Inputs<T>{in.q, saved.land, values.leftCols(d_v), queries_only(in.mask)}, out, {}, dout,
                         {dq, dland, dvalues.leftCols(d_v)}, context);
}

/// dsums: the gradient by values -> that by sums; dland <- that by the landmarks within kappa(L, L).
template <class T, class Inverse>
void backward_core(const GaussianKernel& kernel, const Inverse& inverse, const SkyformerSaved<T>& saved, MatrixRef<T> a,
                   MatrixRef<T> sums, MatrixRef<T> dsums, MatrixRef<T> da, MatrixRef<T> dland, Context& context) {
  Scratch scratch = context.scratch();
  const Index m = a.rows();
  const MatrixRef<T> identity = identity_matrix<T>(m, scratch), unused = scratch.matrix<T>(m, m);
  MatrixRef<T> again = scratch.matrix<T>(dland.rows(), dland.cols());
  sums = saved.sums;
  kernel_matrix<GaussianKernel, T>(raw_rows(kernel), saved.land, saved.land, a, context);
  inverse.backward(a, sums, dsums, da, context);
  kernel_matmul_backward(raw_rows(kernel), Inputs<T>{saved.land, saved.land, identity}, a, {}, da, {dland, again, unused}, context);
  dland += again;
}

/// By the landmarks, k and v: dsums times 2^-top, which the key biases take on.
template <class T>
void backward_keys(const GaussianKernel& kernel, const Inputs<T>& in, const SkyformerSaved<T>& saved, const MatrixRef<T>& dsums,
                   const Gradients<T>& to, std::span<T> dbias, Context& context) {
  const Index n = in.v.rows(), d_v = in.v.cols();
  if (kernel.rows == Rows::raw) {
    const Inputs<T> keys{saved.land, in.k, in.v, keys_only(in.mask), in.key_bias};
    return kernel_matmul_backward(kernel, keys, saved.sums.leftCols(d_v), {}, dsums.leftCols(d_v), to, context, dbias);
  }
  Scratch scratch = context.scratch();
  MatrixRef<T> v = scratch.matrix<T>(n, d_v + 1), dv = scratch.matrix<T>(n, d_v + 1);
  const std::span<T> bias = scratch.array<T>(n);
  v.leftCols(d_v) = in.v;
  v.col(d_v).setOnes();
  for (std::size_t j = 0; j < bias.size(); ++j) {
    bias[j] = (in.key_bias.empty() ? T(0) : in.key_bias[j]) - std::numbers::ln2_v<T> * saved.top;
  }
  const Inputs<T> keys{saved.land, in.k, v, keys_only(in.mask), bias};
  kernel_matmul_backward(raw_rows(kernel), keys, saved.sums, {}, dsums, {to.dq, to.dk, dv}, context, dbias);
  MatrixRef<T>(to.dv) = dv.leftCols(d_v);
}

template <class T>
void set_zero(Gradients<T> gradients, std::span<T> dbias) {
  for (MatrixRef<T>* gradient : {&gradients.dq, &gradients.dk, &gradients.dv}) gradient->setZero();
  std::fill(dbias.begin(), dbias.end(), T(0));
}

/// gradients <- those of Skyformer, out its result and dout the gradient by that; dbias (n_k), unless empty, <- the gradient by the key
/// bias.
template <class T, class Landmarks, class Inverse>
void skyformer_backward(const GaussianKernel& kernel, const Landmarks& landmarks, const Inverse& inverse, const Inputs<T>& in,
                        const SkyformerSaved<T>& saved, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                        const Gradients<T>& gradients, std::span<T> dbias, Context& context) {
  const Gradients<T> to = gradients;
  if (saved.land.rows() == 0) return set_zero(to, dbias);
  Scratch scratch = context.scratch();
  const Index m = saved.land.rows(), d = in.q.cols();
  MatrixRef<T> dland = scratch.matrix<T>(m, d), added = scratch.matrix<T>(m, d), dsums = scratch.matrix<T>(m, in.v.cols() + 1);
  MatrixRef<T> a = scratch.matrix<T>(m, m), da = scratch.matrix<T>(m, m), values = scratch.matrix<T>(m, in.v.cols() + 1);
  solve_landmarks<T>(kernel, inverse, saved.land, saved.sums, a, values, context);
  backward_queries(kernel, in, saved, values, out, dout, to.dq, dland, dsums, context);  // kappa(q, L) values
  backward_core(kernel, inverse, saved, a, values, dsums, da, added, context);           // (kappa(L, L) + gamma I)^-1 sums
  dland += added;
  backward_keys(kernel, in, saved, dsums, {added, to.dk, to.dv}, dbias, context);  // kappa(L, k) [v 1]
  dland += added;
  if constexpr (requires { landmarks.scatter(in, dland, to.dq, to.dk, scratch); }) {
    landmarks.scatter(in, dland, to.dq, to.dk, scratch);
  }
}

}  // namespace attn::detail
