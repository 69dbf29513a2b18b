/// Methods of narrow matrices as methods of float: for sums and products of results that are to be rounded once.
#pragma once

#include <attn/approximator.hpp>
#include <attn/context.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/matrix.hpp>

#include <concepts>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

namespace attn::detail {

/// Method A of narrow matrices, for float ones: these are rounded to A's type, and its results are widened.
template <Approximator A>
class Rounded {
  using Narrow = typename A::Scalar;

 public:
  /// @{ As Approximator says.
  using Scalar = float;
  using Saved = typename A::Saved;
  static constexpr std::string_view kName = A::kName;

  explicit Rounded(A method) : method_(std::move(method)) {}

  bool supports(const Inputs<float>& in) const {
    Context context;
    Scratch scratch = context.scratch();
    return method_.supports(rounded(in, scratch, context));
  }

  void forward(const Inputs<float>& in, MatrixRef<float> out, Context& context) const {
    run(in, out, context, [&](const auto& narrow, const auto& to) { method_.forward(narrow, to, context); });
  }

  void forward(const Inputs<float>& in, MatrixRef<float> out, Context& context, Saved& saved) const {
    run(in, out, context, [&](const auto& narrow, const auto& to) { method_.forward(narrow, to, context, saved); });
  }

  void backward(const Inputs<float>& in, ConstMatrixRef<float> out, ConstMatrixRef<float> dout, const Saved& saved,
                const Gradients<float>& gradients, Context& context) const {
    Scratch scratch = context.scratch();
    const Gradients<Narrow> to{like(gradients.dq, scratch), like(gradients.dk, scratch), like(gradients.dv, scratch)};
    method_.backward(rounded(in, scratch, context), rounded(out, scratch, context), rounded(dout, scratch, context),
                     saved, to, context);
    convert<float, Narrow>(to.dq, gradients.dq, context);
    convert<float, Narrow>(to.dk, gradients.dk, context);
    convert<float, Narrow>(to.dv, gradients.dv, context);
  }
  /// @}

 private:
  static MatrixRef<Narrow> like(const ConstMatrixRef<float>& m, Scratch& scratch) {
    return scratch.matrix<Narrow>(m.rows(), m.cols());
  }

  static MatrixRef<Narrow> rounded(const ConstMatrixRef<float>& m, Scratch& scratch, Context& context) {
    const MatrixRef<Narrow> copy = like(m, scratch);
    convert<Narrow, float>(m, copy, context);
    return copy;
  }

  static Inputs<Narrow> rounded(const Inputs<float>& in, Scratch& scratch, Context& context) {
    const std::span<Narrow> bias = scratch.array<Narrow>(static_cast<Index>(in.key_bias.size()));
    convert_row(in.key_bias.data(), bias.data(), static_cast<Index>(bias.size()));
    return {rounded(in.q, scratch, context), rounded(in.k, scratch, context), rounded(in.v, scratch, context), in.mask,
            bias};
  }

  template <class Forward>
  static void run(const Inputs<float>& in, MatrixRef<float> out, Context& context, const Forward& forward) {
    Scratch scratch = context.scratch();
    const MatrixRef<Narrow> to = like(out, scratch);
    forward(rounded(in, scratch, context), to);
    convert<float, Narrow>(to, out, context);
  }

  A method_;
};

/// a.wide() is the method of float behind a narrow one, which saves the same.
template <class A>
concept HasWideMethod = NarrowScalar<typename A::Scalar> && requires(const A& a) {
  requires Approximator<std::remove_cvref_t<decltype(a.wide())>>;
  requires std::same_as<typename std::remove_cvref_t<decltype(a.wide())>::Scalar, float>;
  requires std::same_as<typename std::remove_cvref_t<decltype(a.wide())>::Saved, typename A::Saved>;
};

/// Method a in the type of its arithmetic.
template <Approximator A>
decltype(auto) wide_method(const A& a) {
  if constexpr (!NarrowScalar<typename A::Scalar>) {
    return (a);
  } else if constexpr (HasWideMethod<A>) {
    return (a.wide());
  } else {
    return Rounded<A>(a);
  }
}

}  // namespace attn::detail
