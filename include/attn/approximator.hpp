/// The concept that every method models, exact ones included.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/checks.hpp>
#include <attn/matrix.hpp>

#include <concepts>
#include <string_view>

namespace attn {

/// A way to compute attention. A small immutable value: copyable, usable from several threads at once (each with a
/// Context of its own), with all scratch memory in the Context.
///   typename A::Scalar                  the type of the matrices' elements
///   A::kName                            its name, for tables and error messages
///   a.supports(inputs)                  whether forward accepts these masks and shapes
///   a.forward(inputs, out, context)     out (n_q, d_v) is overwritten, and must not overlap q, k or v; throws
///                                       std::invalid_argument when it does not support them
/// and for training:
///   typename A::Saved                   what backward needs of forward; made once, then reused from step to step
///   a.forward(inputs, out, context, saved)
///   a.backward(inputs, out, dout, saved, gradients, context)
///                                       for the same inputs, the out and the saved of that forward, and dout
///                                       (n_q, d_v), the gradient of a loss by out: gradients of it by q, k and v
/// Optional for a narrow type: a.wide(), the same method of float, with the same Saved. What adds up its results then
/// rounds sums once.
template <class A>
concept Approximator =
    std::copyable<A> && std::default_initializable<typename A::Saved> &&
    requires(const A& a, const Inputs<typename A::Scalar>& inputs, MatrixRef<typename A::Scalar> out,
             ConstMatrixRef<typename A::Scalar> dout, typename A::Saved& saved, const typename A::Saved& kept,
             const Gradients<typename A::Scalar>& gradients, Context& context) {
      { A::kName } -> std::convertible_to<std::string_view>;
      { a.supports(inputs) } -> std::same_as<bool>;
      a.forward(inputs, out, context);
      a.forward(inputs, out, context, saved);
      a.backward(inputs, dout, dout, kept, gradients, context);
    };

namespace detail {

/// What error messages call a method: its own name, where it holds another one that one's.
template <Approximator A>
std::string_view method_name(const A& a) {
  std::string_view name = A::kName;
  if constexpr (requires { name = a.name(); }) name = a.name();
  return name;
}

}  // namespace detail

/// out = attention of q (n_q, d) to k (n_k, d) and v (n_k, d_v) by method a, in one line: allocates its result, runs
/// serially. Throws std::invalid_argument as a.forward does.
template <Approximator A>
Matrix<typename A::Scalar> attention(const A& a, ConstMatrixRef<typename A::Scalar> q,
                                     ConstMatrixRef<typename A::Scalar> k, ConstMatrixRef<typename A::Scalar> v,
                                     const Mask& mask = {}) {
  const Inputs<typename A::Scalar> in{.q = q, .k = k, .v = v, .mask = mask};
  detail::check_inputs(detail::method_name(a), in);
  Matrix<typename A::Scalar> out(q.rows(), v.cols());
  Context context;
  a.forward(in, out, context);
  return out;
}

}  // namespace attn
