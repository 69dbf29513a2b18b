/// Narrow types in memory: Eigen::half and Eigen::bfloat16.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <concepts>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

namespace attn {

/// kernel_matmul for narrow types in memory; the log-sums stay float.
template <ScoreKernel Kernel, NarrowScalar T>
void kernel_matmul(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<MatrixRef<T>> out,
                   std::span<float> lse, Context& context) {
  detail::check(detail::kMatmulName, in, out, lse);
  Scratch scratch = context.scratch();
  detail::multiply<Kernel, float>(kernel, detail::arithmetic_sources(in, scratch), detail::ResultRows<float>(out),
                                  detail::LogSums<float>{detail::data_or_null(lse), nullptr}, context);
}

/// The same without log-sums.
template <ScoreKernel Kernel, NarrowScalar T>
void kernel_matmul(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<MatrixRef<T>> out,
                   Context& context) {
  kernel_matmul(kernel, in, out, std::span<float>{}, context);
}

/// kernel_matmul_partial for narrow types in memory; row states are float, and so merge without loss.
template <ScoreKernel Kernel, NarrowScalar T>
void kernel_matmul_partial(const Kernel& kernel, const Inputs<T>& in, const RowStates<float>& states,
                           Context& context) {
  detail::check_partial(detail::kMatmulName, in, states);
  Scratch scratch = context.scratch();
  detail::multiply_partial<Kernel, float>(kernel, detail::arithmetic_sources(in, scratch), states, context);
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
    const auto row = static_cast<std::size_t>(i);
    for (Index c = 0; c < to.cols(); c += kColumns) {
      const Index count = std::min(kColumns, to.cols() - c);
      float* weighted = states.weighted.data() + i * states.weighted.outerStride() + c;
      const RowStates<float> some{
          states.maximum.subspan(row, 1), states.sum.subspan(row, 1), {weighted, 1, count, count}};
      finish(kernel, some, d, MatrixRef<float>(wide, 1, count, count), lse.empty() ? lse : lse.subspan(row, 1));
      detail::convert_row(wide, to.data() + i * to.outerStride() + c, count);
    }
  }
}

/// kernel_matmul_backward for narrow types in memory: on float copies of all matrices, gradients rounded once. lse and
/// dbias are float.
template <ScoreKernel Kernel, NarrowScalar T>
void kernel_matmul_backward(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<ConstMatrixRef<T>> out,
                            std::span<const float> lse, std::type_identity_t<ConstMatrixRef<T>> dout,
                            const std::type_identity_t<Gradients<T>>& gradients, Context& context,
                            std::span<float> dbias = {}) {
  detail::check_backward<T>("kernel_matmul_backward", in, out, dout, gradients, lse, dbias);
  detail::backward_in_type<float>(
      in, out, dout, gradients, context,
      [&](const Inputs<float>& wide, const auto& o, const auto& d_o, const Gradients<float>& to) {
        kernel_matmul_backward(kernel, wide, o, lse, d_o, to, context, dbias);
      });
}

/// The same with dbias of T.
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
