/// The landmark side of Skyformer's product kappa(q, L) (kappa(L, L) + gamma I)^-1 kappa(L, k) v, and its gradients.
#pragma once

#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/detail/divided_rows.hpp>
#include <attn/engine/few_keys.hpp>
#include <attn/detail/landmark_sums.hpp>
#include <attn/detail/nystrom_factors.hpp>
#include <attn/detail/spread_landmarks.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>
#include <vector>

namespace attn::detail {

/// The landmarks (m, d) of n_q queries and n_k keys, and what LandmarkSums has of them; exponents are empty unless the
/// sums are spread.
template <class T>
struct SkyformerSaved {
  Matrix<T> land{}, sums{};
  T top = 0;
  std::vector<double> exponents{};

  void keep(const ConstMatrixRef<T>& landmarks, const LandmarkSums<T>& of_keys) {
    land = landmarks;
    sums = of_keys.sums;
    top = of_keys.top;
    exponents.assign(of_keys.exponents.begin(), of_keys.spread ? of_keys.exponents.end() : of_keys.exponents.begin());
  }
};

/// values (m, d_v + 1) <- (kappa(L, L) + gamma I)^-1 sums. a (m, m) is overwritten.
template <class T, class Inverse>
void solve_landmarks(const GaussianKernel& kernel, const Inverse& inverse, const ConstMatrixRef<T>& land,
                     const ConstMatrixRef<T>& sums, MatrixRef<T> a, MatrixRef<T> values, Context& context) {
  values = sums;
  kernel_matrix<GaussianKernel, T>(with_rows(kernel, Rows::raw), land, land, a, context);
  inverse.apply(a, values, context);
}

/// dq, dland and dvalues (m, d_v + 1) <- the gradients of kappa(q, L) values, its rows divided by their sums if
/// normalized.
template <class T>
void backward_queries(const GaussianKernel& kernel, const Inputs<T>& in, const SkyformerSaved<T>& saved,
                      const MatrixRef<T>& values, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                      MatrixRef<T> dq, MatrixRef<T> dland, MatrixRef<T> dvalues, Context& context) {
  const Index d_v = in.v.cols();
  if (kernel.rows == Rows::normalized) {
    return divide_rows_backward<T>(kernel, in, saved.land, values, out, dout, dq, dland, dvalues, context);
  }
  dvalues.col(d_v).setZero();
  kernel_matmul_backward(kernel, Inputs<T>{in.q, saved.land, values.leftCols(d_v), queries_only(in.mask)}, out, {},
                         dout, {dq, dland, dvalues.leftCols(d_v)}, context);
}

/// dsums: the gradient by values -> that by sums; dland <- that by the landmarks within kappa(L, L).
template <class T, class Inverse>
void backward_core(const GaussianKernel& kernel, const Inverse& inverse, const SkyformerSaved<T>& saved, MatrixRef<T> a,
                   MatrixRef<T> sums, MatrixRef<T> dsums, MatrixRef<T> da, MatrixRef<T> dland, Context& context) {
  Scratch scratch = context.scratch();
  const Index m = a.rows();
  const MatrixRef<T> identity = identity_matrix<T>(m, scratch), unused = scratch.matrix<T>(m, m);
  MatrixRef<T> again = scratch.matrix<T>(dland.rows(), dland.cols());
  const GaussianKernel raw = with_rows(kernel, Rows::raw);
  sums = saved.sums;
  kernel_matrix<GaussianKernel, T>(raw, saved.land, saved.land, a, context);
  inverse.backward(a, sums, dsums, da, context);
  kernel_matmul_backward(raw, Inputs<T>{saved.land, saved.land, identity}, a, {}, da, {dland, again, unused}, context);
  dland += again;
}

/// By the landmarks, k and v: dsums times e^largest of the key biases, or 2^-top, which the key biases take on.
template <class T>
void backward_keys(const GaussianKernel& kernel, const Inputs<T>& in, const KeyBias<T>& bias,
                   const SkyformerSaved<T>& saved, MatrixRef<T> dsums, const Gradients<T>& to, std::span<T> dbias,
                   Context& context) {
  const Index n = in.v.rows(), d_v = in.v.cols();
  if (kernel.rows == Rows::raw) {
    if (bias.largest != 0) dsums *= std::exp(bias.largest);
    const Inputs<T> keys{saved.land, in.k, in.v, keys_only(in.mask), bias.relative};
    return kernel_matmul_backward(kernel, keys, saved.sums.leftCols(d_v), {}, dsums.leftCols(d_v), to, context, dbias);
  }
  Scratch scratch = context.scratch();
  const std::span<T> shifted = scratch.array<T>(n);
  for (std::size_t j = 0; j < shifted.size(); ++j) {
    shifted[j] = (bias.relative.empty() ? T(0) : bias.relative[j]) - std::numbers::ln2_v<T> * saved.top;
  }
  sum_over_keys_backward<T>(with_rows(kernel, Rows::raw), in, shifted, saved.land, saved.sums, {}, dsums, to, dbias,
                            context);
}

template <class T>
void set_zero(Gradients<T> gradients, std::span<T> dbias) {
  for (MatrixRef<T>* gradient : {&gradients.dq, &gradients.dk, &gradients.dv}) gradient->setZero();
  std::fill(dbias.begin(), dbias.end(), T(0));
}

/// to, dland (m, d) and dbias <- the gradients by q, k and v as far as they do not come from the landmarks, by these,
/// and by the key bias.
template <class T, class Inverse>
void multiply_backward(const GaussianKernel& kernel, const Inverse& inverse, const Inputs<T>& in,
                       const KeyBias<T>& bias, const SkyformerSaved<T>& saved, const ConstMatrixRef<T>& out,
                       const ConstMatrixRef<T>& dout, const Gradients<T>& to, MatrixRef<T> dland, std::span<T> dbias,
                       Context& context) {
  Scratch scratch = context.scratch();
  const Index m = saved.land.rows(), columns = saved.sums.cols();
  MatrixRef<T> added = scratch.matrix<T>(m, dland.cols()), dsums = scratch.matrix<T>(m, columns);
  MatrixRef<T> a = scratch.matrix<T>(m, m), da = scratch.matrix<T>(m, m), values = scratch.matrix<T>(m, columns);
  solve_landmarks<T>(kernel, inverse, saved.land, saved.sums, a, values, context);
  backward_queries(kernel, in, saved, values, out, dout, to.dq, dland, dsums, context);  // kappa(q, L) values
  backward_core(kernel, inverse, saved, a, values, dsums, da, added, context);  // (kappa(L, L) + gamma I)^-1 sums
  dland += added;
  backward_keys(kernel, in, bias, saved, dsums, {added, to.dk, to.dv}, dbias, context);  // kappa(L, k) [v 1]
  dland += added;
}

/// gradients <- those of Skyformer, out its result and dout the gradient by that; dbias (n_k), unless empty, <- the
/// gradient by the key bias.
template <class T, class Landmarks, class Inverse>
void skyformer_backward(const GaussianKernel& kernel, const Landmarks& landmarks, const Inverse& inverse,
                        const Inputs<T>& in, const SkyformerSaved<T>& saved, const ConstMatrixRef<T>& out,
                        const ConstMatrixRef<T>& dout, const Gradients<T>& gradients, std::span<T> dbias,
                        Context& context) {
  const Gradients<T> to = gradients;
  if (saved.land.rows() == 0) return set_zero(to, dbias);
  Scratch scratch = context.scratch();
  MatrixRef<T> dland = scratch.matrix<T>(saved.land.rows(), in.q.cols());
  const KeyBias<T> bias = relative_bias(sources(in), scratch);
  if (saved.exponents.empty()) {
    multiply_backward(kernel, inverse, in, bias, saved, out, dout, to, dland, dbias, context);
  } else {
    multiply_spread_backward<T>(kernel, inverse, in, bias, saved.land, saved.sums, saved.exponents, out, dout, to,
                                dland, dbias, context);
  }
  if constexpr (requires { landmarks.scatter(in, dland, to.dq, to.dk, scratch); }) {
    landmarks.scatter(in, dland, to.dq, to.dk, scratch);
  }
}

}  // namespace attn::detail
