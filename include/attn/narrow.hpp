/// Narrow types in memory: Eigen::half and Eigen::bfloat16.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/checks.hpp>
#include <attn/detail/panel.hpp>
#include <attn/detail/simd.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <concepts>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

namespace attn {

/// A type that matrices may hold and that arithmetic does not use.
template <class T>
concept NarrowScalar = std::same_as<T, Eigen::half> || std::same_as<T, Eigen::bfloat16>;

namespace detail {

inline constexpr Index kConvertedRows = 256;  ///< by one task

/// to <- from, n elements.
template <NarrowScalar T>
void convert_row(const T* from, float* to, Index n) {
  const Index whole = n - n % kLanes<float>;
  for (Index i = 0; i < whole; i += kLanes<float>) store_unaligned(to + i, widen(from + i));
  std::transform(from + whole, from + n, to + whole, [](T x) { return static_cast<float>(x); });
}

/// to <- from, n elements, rounded to nearest.
template <NarrowScalar T>
void convert_row(const float* from, T* to, Index n) {
  const Index whole = n - n % kLanes<float>;
  for (Index i = 0; i < whole; i += kLanes<float>) store_narrow(to + i, load_unaligned(from + i));
  T lanes[kLanes<float>];
  store_narrow(lanes, load_row(from, whole, n));
  std::copy_n(lanes, n - whole, to + whole);
}

/// to <- from, of the same shape and another type.
template <class To, class From>
void convert(const ConstMatrixRef<From>& from, MatrixRef<To> to, Context& context) {
  context.for_each((from.rows() + kConvertedRows - 1) / kConvertedRows, [&](Index item, int) {
    const Index first = item * kConvertedRows, rows = std::min(kConvertedRows, from.rows() - first);
    for (Index i = first; i < first + rows; ++i) convert_row(from.row(i).data(), to.row(i).data(), from.cols());
  });
}

/// Inputs of T as float: copies in scratch memory.
template <NarrowScalar T>
Inputs<float> widen(const Inputs<T>& in, Scratch& scratch, Context& context) {
  const auto widened = [&](const ConstMatrixRef<T>& m) {
    const MatrixRef<float> copy = scratch.matrix<float>(m.rows(), m.cols());
    convert<float, T>(m, copy, context);
    return copy;
  };
  const std::span<float> bias = scratch.array<float>(static_cast<Index>(in.key_bias.size()));
  std::transform(in.key_bias.begin(), in.key_bias.end(), bias.begin(), [](T x) { return static_cast<float>(x); });
  const MatrixRef<float> q = widened(in.q), k = widened(in.k), v = widened(in.v);
  return {q, k, v, in.mask, bias};
}

/// Method A of float for matrices of T: its arithmetic and all that it keeps are float, results are rounded once. Copies of the inputs
/// and of the results in float, 4 (n_q + n_k) (d + d_v) bytes, are held in scratch memory.
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

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    with_wide_out(in, out, context, [&](const Inputs<float>& wide, MatrixRef<float> to) { method_.forward(wide, to, context); });
  }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    with_wide_out(in, out, context,
                  [&](const Inputs<float>& wide, MatrixRef<float> to) { method_.forward(wide, to, context, saved); });
  }

  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Context& context) const {
    check_backward(kName, in, out, dout, gradients);
    Scratch scratch = context.scratch();
    const Inputs<float> wide = widen(in, scratch, context);
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
  template <class Body>
  static void with_wide_out(const Inputs<T>& in, MatrixRef<T> out, Context& context, const Body& body) {
    check(kName, in, out);
    Scratch scratch = context.scratch();
    const Inputs<float> wide = widen(in, scratch, context);
    const MatrixRef<float> to = scratch.matrix<float>(out.rows(), out.cols());
    body(wide, to);
    convert<T, float>(to, out, context);
  }

  A method_;
};

}  // namespace detail

/// kernel_matmul for narrow types in memory; the log-sums stay float.
template <ScoreKernel Kernel, NarrowScalar T>
void kernel_matmul(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<MatrixRef<T>> out, std::span<float> lse,
                   Context& context) {
  detail::check(detail::kMatmulName, in, out);
  Scratch scratch = context.scratch();
  const Inputs<float> wide = detail::widen(in, scratch, context);
  const MatrixRef<float> to = scratch.matrix<float>(out.rows(), out.cols());
  kernel_matmul(kernel, wide, to, lse, context);
  detail::convert<T, float>(to, out, context);
}

/// The same without log-sums.
template <ScoreKernel Kernel, NarrowScalar T>
void kernel_matmul(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<MatrixRef<T>> out, Context& context) {
  kernel_matmul(kernel, in, out, std::span<float>{}, context);
}

}  // namespace attn
