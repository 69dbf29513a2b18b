/// The streamed primitive: out = [kappa] v without ever storing [kappa]. Everything else in the library is calls of it.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/context.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/run.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <span>
#include <string_view>
#include <type_traits>

namespace attn {

/// States of n_q rows after some keys. With kappa_ij the kernel's entries (key bias included),
///   sum_i = sum_j kappa_ij 2^-maximum_i     weighted_i = sum_j kappa_ij 2^-maximum_i v_j
/// A row that has seen no key has sum 0, and its maximum means nothing. States of disjoint sets of keys merge.
template <class T>
struct RowStates {
  std::span<T> maximum;   ///< (n_q), in units of log2
  std::span<T> sum;       ///< (n_q)
  MatrixRef<T> weighted;  ///< (n_q, d_v)
};

/// into <- the states of both sets of keys together. Associative up to rounding. Throws std::invalid_argument when
/// shapes disagree, or into overlaps from or itself.
template <class T>
void merge(const RowStates<T>& into, const std::type_identity_t<RowStates<T>>& from) {
  detail::check_merge("merge", into, from);
  for (std::size_t i = 0; i < into.sum.size(); ++i) {
    const T top = detail::merged_maximum(into.maximum[i], into.sum[i], from.maximum[i], from.sum[i]);
    const T of_into = detail::merge_factor(into.maximum[i], into.sum[i], top),
            of_from = detail::merge_factor(from.maximum[i], from.sum[i], top);
    into.maximum[i] = top;
    into.sum[i] = into.sum[i] * of_into + from.sum[i] * of_from;
    T* row = into.weighted.data() + static_cast<Index>(i) * into.weighted.outerStride();
    detail::scale_row(of_into, row, row, into.weighted.cols());
    detail::add_row(of_from, from.weighted.data() + static_cast<Index>(i) * from.weighted.outerStride(), row,
                    into.weighted.cols());
  }
}

/// out (n_q, d_v) <- what states add up to, rows divided by their sums or raw as the kernel's are; lse as in
/// kernel_matmul. out may be states.weighted itself; nothing else may overlap. d: features of the tokens, which the
/// kernel's parameters may depend on.
template <ScoreKernel Kernel, class T>
void finish(const Kernel& kernel, const RowStates<T>& states, Index d, std::type_identity_t<MatrixRef<T>> out,
            std::type_identity_t<std::span<T>> lse = {}) {
  detail::check_finish<T>("finish", states, out, lse);
  const Rows rows = score_parameters(kernel, d).rows;
  for (std::size_t i = 0; i < states.sum.size(); ++i) {
    const detail::RowScale<T> scale = detail::row_scale(rows, static_cast<double>(states.maximum[i]), states.sum[i]);
    if (!lse.empty()) lse[i] = detail::row_log_sum(states.maximum[i], states.sum[i]);
    const Index row = static_cast<Index>(i);
    const T* weighted = detail::row_of(states.weighted, row);
    T* to = detail::row_of(out, row);
    detail::scale_row(scale.first, weighted, to, out.cols());
    if (scale.second != 1) detail::scale_row(scale.second, to, to, out.cols());
  }
}

/// finish for a narrow out, any matrix or view that can be written to; the log-sums stay float.
template <ScoreKernel Kernel, class Out>
  requires NarrowScalar<typename detail::EigenType<Out>::Scalar>
void finish(const Kernel& kernel, const RowStates<float>& states, Index d, Out&& out, std::span<float> lse = {}) {
  using T = typename detail::EigenType<Out>::Scalar;
  constexpr Index kColumns = 256;  // of one row, at a time
  float wide[kColumns];
  const MatrixRef<T> to(out);
  detail::check_finish("finish", states, to, lse);
  for (Index i = 0; i < to.rows(); ++i) {
    for (Index c = 0; c < to.cols(); c += kColumns) {
      const Index count = std::min(kColumns, to.cols() - c);
      float* weighted = detail::row_of(states.weighted, i) + c;
      const RowStates<float> some{
          detail::part_of(states.maximum, i, 1), detail::part_of(states.sum, i, 1), {weighted, 1, count, count}};
      finish(kernel, some, d, MatrixRef<float>(wide, 1, count, count), lse.empty() ? lse : detail::part_of(lse, i, 1));
      detail::convert_row(wide, detail::row_of(to, i) + c, count);
    }
  }
}

/// out <- [kappa] v with kappa(q_i, k_j) = exp(scale q_i.k_j - bias (|q_i|^2 + |k_j|^2) + a_j), rows divided by their
/// sum if the kernel's are normalized. q (n_q, d), k (n_k, d), v (n_k, d_v), out (n_q, d_v), overwritten; a_j the key
/// bias. lse: empty, or n_q entries that receive log sum_j kappa_ij, -infinity for a row that sees no key, whose out is
/// 0. Throws std::invalid_argument when shapes disagree or are empty, or out or lse overlaps an input, the other or
/// itself. 2 n_q n_k (d + d_v) flops; O(tile) memory a worker, and for few queries up to 16 row states. Of narrow types
/// lse is float. Milakov and Gimelshein 2018; Dao et al. 2022, Alg. 1.
template <ScoreKernel Kernel, class T>
void kernel_matmul(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<MatrixRef<T>> out,
                   std::span<detail::Arithmetic<T>> lse, Context& context) {
  using Wide = detail::Arithmetic<T>;
  detail::check(detail::kMatmulName, in, out, lse);
  Scratch scratch = context.scratch();
  detail::multiply<Kernel, Wide>(kernel, detail::arithmetic_sources(in, scratch), detail::ResultRows<Wide>(out),
                                 {detail::data_or_null(lse), nullptr}, context);
}

/// The same with keys and values of a narrow type beside float queries.
template <ScoreKernel Kernel, NarrowScalar Cache>
void kernel_matmul(const Kernel& kernel, const CacheInputs<Cache>& in, std::type_identity_t<MatrixRef<float>> out,
                   std::span<float> lse, Context& context) {
  detail::check(detail::kMatmulName, in, out, lse);
  Scratch scratch = context.scratch();
  detail::multiply<Kernel, float>(kernel, detail::arithmetic_sources(in, scratch), detail::ResultRows<float>(out),
                                  {detail::data_or_null(lse), nullptr}, context);
}

/// kernel_matmul without log-sums.
template <ScoreKernel Kernel, class T>
void kernel_matmul(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<MatrixRef<T>> out,
                   Context& context) {
  kernel_matmul(kernel, in, out, std::span<detail::Arithmetic<T>>{}, context);
}

/// states <- the row states of these keys alone, of which there may be none: for keys that are spread over machines, or
/// that arrive in parts (decoding with a cache). Merge the parts, then finish. Causal limits count the rows of this
/// call's k. Throws std::invalid_argument when shapes disagree, q is empty, or states overlap an input, one another or
/// themselves. Of narrow types states are float, and so merge without loss.
template <ScoreKernel Kernel, class T>
void kernel_matmul_partial(const Kernel& kernel, const Inputs<T>& in, const RowStates<detail::Arithmetic<T>>& states,
                           Context& context) {
  using Wide = detail::Arithmetic<T>;
  detail::check_partial(detail::kMatmulName, in, states);
  Scratch scratch = context.scratch();
  detail::multiply_partial<Kernel, Wide>(kernel, detail::arithmetic_sources(in, scratch), states, context);
}

/// The same with keys and values of a narrow type beside float queries.
template <ScoreKernel Kernel, NarrowScalar Cache>
void kernel_matmul_partial(const Kernel& kernel, const CacheInputs<Cache>& in, const RowStates<float>& states,
                           Context& context) {
  detail::check_partial(detail::kMatmulName, in, states);
  Scratch scratch = context.scratch();
  detail::multiply_partial<Kernel, float>(kernel, detail::arithmetic_sources(in, scratch), states, context);
}

/// gradients <- those of a loss by q, k and v, given its gradient dout (n_q, d_v) by out, for out and lse as
/// kernel_matmul gave them for the same inputs. lse (n_q) may be empty if the kernel's rows are raw. dbias: empty, or
/// n_k entries that receive the gradient by the key bias. Throws std::invalid_argument when shapes disagree, or a
/// result overlaps an argument or another. 2 n_q n_k (3 d + 2 d_v) flops, where biases or tokens are so large that lse
/// has lost digits 2 n_q n_k (d + 1) more; memory for up to 7 partial dq, or dk and dv. Of narrow types lse and dbias
/// are float, all matrices are copied to float, and gradients are rounded once. Dao et al. 2022, Alg. 4.
template <ScoreKernel Kernel, class T>
void kernel_matmul_backward(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<ConstMatrixRef<T>> out,
                            std::span<const detail::Arithmetic<T>> lse, std::type_identity_t<ConstMatrixRef<T>> dout,
                            const std::type_identity_t<Gradients<T>>& gradients, Context& context,
                            std::span<detail::Arithmetic<T>> dbias = {}) {
  using Wide = detail::Arithmetic<T>;
  constexpr std::string_view kName = "kernel_matmul_backward";
  detail::check_backward(kName, in, out, dout, gradients, lse, dbias);
  const bool normalized = score_parameters(kernel, in.q.cols()).rows == Rows::normalized;
  if (normalized && lse.empty())
    detail::refuse(kName, "lse is empty, should have %td entries, for rows are normalized", in.q.rows());
  detail::backward_in_type<Wide>(
      in, out, dout, gradients, context, [&](const auto& x, const auto& o, const auto& d_o, const auto& to) {
        Scratch scratch = context.scratch();
        std::span<const detail::RowLog<Wide>> relative{};
        if (normalized) relative = detail::relative_log_sums<Kernel, Wide>(kernel, x, lse, context, scratch);
        detail::multiply_backward<Kernel, Wide>(kernel, x, o, relative, d_o, to, context, dbias);
      });
}

/// The same with dbias of a narrow T.
template <ScoreKernel Kernel, NarrowScalar T, std::convertible_to<std::span<T>> Bias>
void kernel_matmul_backward(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<ConstMatrixRef<T>> out,
                            std::span<const float> lse, std::type_identity_t<ConstMatrixRef<T>> dout,
                            const std::type_identity_t<Gradients<T>>& gradients, Context& context, Bias&& dbias) {
  detail::check_backward<T>("kernel_matmul_backward", in, out, dout, gradients, lse, std::span<T>(dbias));
  detail::set_rounded(std::span<T>(dbias), context, [&](std::span<float> wide) {
    kernel_matmul_backward(kernel, in, out, lse, dout, gradients, context, wide);
  });
}

}  // namespace attn
