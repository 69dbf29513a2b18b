/// Narrow types in memory: Eigen::half and Eigen::bfloat16.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/detail/wide_copies.hpp>
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

namespace detail {

/// Inputs of T to be read as float, a tile at a time.
template <NarrowScalar T>
Sources<float> widened_sources(const Inputs<T>& in, Scratch& scratch) {
  return {TokenRows<float>(in.q), TokenRows<float>(in.k), TokenRows<float>(in.v), in.mask,
          widen_bias(in.key_bias, scratch)};
}

/// dbias <- of_float(d), computed there in float.
template <NarrowScalar T, class OfFloat>
void round_bias_gradient(std::span<T> dbias, Context& context, const OfFloat& of_float) {
  Scratch scratch = context.scratch();
  const std::span<float> wide = scratch.array<float>(static_cast<Index>(dbias.size()));
  of_float(wide);
  std::transform(wide.begin(), wide.end(), dbias.begin(), [](float x) { return static_cast<T>(x); });
}

/// The backward pass of narrow matrices, once it is checked: of_float(inputs, out, dout, gradients) is that of float,
/// on copies in scratch memory, whose results are rounded once.
template <NarrowScalar T, class OfFloat>
void round_backward(const Inputs<T>& in, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                    const Gradients<T>& gradients, Context& context, const OfFloat& of_float) {
  Scratch scratch = context.scratch();
  const Inputs<float> wide = widen_inputs(in, scratch, context);
  const ConstMatrixRef<float> wide_out = widened(out, scratch, context), wide_dout = widened(dout, scratch, context);
  const Gradients<float> to{wide_result(gradients.dq, scratch), wide_result(gradients.dk, scratch),
                            wide_result(gradients.dv, scratch)};
  of_float(wide, wide_out, wide_dout, to);
  set_rounded(gradients.dq, to.dq, context);
  set_rounded(gradients.dk, to.dk, context);
  set_rounded(gradients.dv, to.dv, context);
}

/// Method A of float for matrices of T: its arithmetic and all that it keeps are float, results are rounded once. The
/// forward pass converts rows as it reads and writes them; the backward pass holds copies of all its matrices in float
/// in scratch memory.
template <NarrowScalar T, class A>
class Widened {
 public:
  using Scalar = T;
  using Saved = typename A::Saved;
  static constexpr std::string_view kName = A::kName;

  explicit constexpr Widened(A method) : method_(std::move(method)) {}

  /// The same of float, which saves the same.
  constexpr const A& wide() const { return method_; }

  bool supports(const Inputs<T>& in) const { return method_.supports(in); }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const { run(in, out, context, nullptr); }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    run(in, out, context, &saved);
  }

  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Context& context) const {
    check_backward(kName, in, out, dout, gradients);
    round_backward<T>(in, out, dout, gradients, context,
                      [&](const auto& wide, const auto& o, const auto& d_o, const auto& to) {
                        method_.backward(wide, o, d_o, saved, to, context);
                      });
  }

 private:
  /// saved: a pointer or nullptr.
  template <class SavedPointer>
  void run(const Inputs<T>& in, MatrixRef<T> out, Context& context, SavedPointer saved) const {
    check(kName, in, out);
    Scratch scratch = context.scratch();
    method_.run(widened_sources(in, scratch), ResultRows<float>(out), context, saved);
  }

  A method_;
};

}  // namespace detail

/// kernel_matmul for narrow types in memory; the log-sums stay float.
template <ScoreKernel Kernel, NarrowScalar T>
void kernel_matmul(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<MatrixRef<T>> out,
                   std::span<float> lse, Context& context) {
  detail::check(detail::kMatmulName, in, out, lse);
  Scratch scratch = context.scratch();
  detail::multiply<Kernel, float>(kernel, detail::widened_sources(in, scratch), detail::ResultRows<float>(out),
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
  detail::multiply_partial<Kernel, float>(kernel, detail::widened_sources(in, scratch), states, context);
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
  detail::round_backward<T>(in, out, dout, gradients, context,
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
  detail::round_bias_gradient(std::span<T>(dbias), context, [&](std::span<float> wide) {
    kernel_matmul_backward(kernel, in, out, lse, dout, gradients, context, wide);
  });
}

}  // namespace attn
