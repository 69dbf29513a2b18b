/// Narrow types in memory: Eigen::half and Eigen::bfloat16.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/checks.hpp>
#include <attn/detail/token_rows.hpp>
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

inline constexpr Index kConvertedRows = 256;  ///< by one task

/// to <- from, of the same shape and another type.
template <class To, class From>
void convert(const ConstMatrixRef<From>& from, MatrixRef<To> to, Context& context) {
  context.for_each((from.rows() + kConvertedRows - 1) / kConvertedRows, [&](Index item, int) {
    const Index first = item * kConvertedRows, rows = std::min(kConvertedRows, from.rows() - first);
    for (Index i = first; i < first + rows; ++i) convert_row(from.row(i).data(), to.row(i).data(), from.cols());
  });
}

/// Key biases as float, in scratch memory.
template <NarrowScalar T>
std::span<const float> widen_bias(std::span<const T> bias, Scratch& scratch) {
  const std::span<float> wide = scratch.array<float>(static_cast<Index>(bias.size()));
  std::transform(bias.begin(), bias.end(), wide.begin(), [](T x) { return static_cast<float>(x); });
  return wide;
}

/// Inputs of T to be read as float, a tile at a time.
template <NarrowScalar T>
Sources<float> widened_sources(const Inputs<T>& in, Scratch& scratch) {
  return {TokenRows<float>(in.q), TokenRows<float>(in.k), TokenRows<float>(in.v), in.mask, widen_bias(in.key_bias, scratch)};
}

/// Inputs of T as float: copies in scratch memory.
template <NarrowScalar T>
Inputs<float> widen_inputs(const Inputs<T>& in, Scratch& scratch, Context& context) {
  const auto widened = [&](const ConstMatrixRef<T>& m) {
    const MatrixRef<float> copy = scratch.matrix<float>(m.rows(), m.cols());
    convert<float, T>(m, copy, context);
    return copy;
  };
  const MatrixRef<float> q = widened(in.q), k = widened(in.k), v = widened(in.v);
  return {q, k, v, in.mask, widen_bias(in.key_bias, scratch)};
}

/// Method A of float for matrices of T: its arithmetic and all that it keeps are float, results are rounded once. The forward pass
/// converts rows as it reads and writes them; the backward pass holds copies of all its matrices in float in scratch memory.
template <NarrowScalar T, class A>
class Widened {
 public:
  using Scalar = T;
  using Saved = typename A::Saved;
  static constexpr std::string_view kName = A::kName;

  explicit constexpr Widened(A method) : method_(std::move(method)) {}

  /// Depends on shapes and masks, and on whether there is a key bias; values are not read.
  bool supports(const Inputs<T>& in) const {
    const auto shape = [](const ConstMatrixRef<T>& m) {
      return ConstMatrixRef<float>(nullptr, m.rows(), m.cols(), m.outerStride());
    };
    const float* none = nullptr;
    return method_.supports({shape(in.q), shape(in.k), shape(in.v), in.mask, {none, in.key_bias.size()}});
  }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const { run(in, out, context, nullptr); }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const { run(in, out, context, &saved); }

  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Context& context) const {
    check_backward(kName, in, out, dout, gradients);
    Scratch scratch = context.scratch();
    const Inputs<float> wide = widen_inputs(in, scratch, context);
    const auto like = [&](const auto& m) { return scratch.matrix<float>(m.rows(), m.cols()); };
    const MatrixRef<float> wide_out = like(out), wide_dout = like(dout);
    convert<float, T>(out, wide_out, context);
    convert<float, T>(dout, wide_dout, context);
    const Gradients<float> to{like(gradients.dq), like(gradients.dk), like(gradients.dv)};
    method_.backward(wide, wide_out, wide_dout, saved, to, context);
    convert<T, float>(to.dq, gradients.dq, context);
    convert<T, float>(to.dk, gradients.dk, context);
    convert<T, float>(to.dv, gradients.dv, context);
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
void kernel_matmul(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<MatrixRef<T>> out, std::span<float> lse,
                   Context& context) {
  detail::check(detail::kMatmulName, in, out, lse);
  Scratch scratch = context.scratch();
  detail::multiply<Kernel, float>(kernel, detail::widened_sources(in, scratch), detail::ResultRows<float>(out), detail::data_or_null(lse),
                                  context);
}

/// The same without log-sums.
template <ScoreKernel Kernel, NarrowScalar T>
void kernel_matmul(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<MatrixRef<T>> out, Context& context) {
  kernel_matmul(kernel, in, out, std::span<float>{}, context);
}

}  // namespace attn
