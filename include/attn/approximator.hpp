/// The concept that every method models, exact ones included, and the base that the library's own have in common.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/context.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <concepts>
#include <initializer_list>
#include <string_view>
#include <type_traits>
#include <utility>

namespace attn {

/// A way to compute attention. A small immutable value: copyable, usable from several threads at once (each with a
/// Context of its own), with all scratch memory in the Context.
///   typename A::Scalar                  the type of the matrices' elements
///   A::kName                            its name, for tables and error messages
///   a.supports(inputs)                  whether forward accepts these masks and shapes
///   a.forward(inputs, out, context)     for q (n_q, d), k (n_k, d) and v (n_k, d_v): out (n_q, d_v) is overwritten,
///                                       and must not overlap them; throws std::invalid_argument when shapes disagree
///                                       or are empty, an option is out of range, or inputs are not supported
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

/// What the library's own methods make of their mathematics: an Approximator. For a narrow T arithmetic and all that is
/// saved are float, and results are rounded once: the forward pass converts rows as it reads and writes them, the
/// backward pass holds copies of all its matrices in scratch memory. Method says, in the type of the arithmetic,
///   Method::kMasks                      which masks it takes
///   m.check(in)                         throws where an option is out of range
///   m.attend(in, out, context, saved)   the forward pass, once all is checked; saved is null or a pointer
///   m.pass(in)                          what backward relies on of a forward pass of in, kept as saved.pass
///   m.differentiate(in, out, dout, saved, gradients, context)      the backward pass, likewise
///   m.wide()                            of a narrow T: the same method of float
///   m.choose_products(in, saves, scratch)      optional, of a narrow T: how products of its tokens are computed
template <class Method, class T, class SavedOfMethod>
class MethodBase {
 public:
  using Scalar = T;             ///< the type of the matrices' elements
  using Saved = SavedOfMethod;  ///< what backward needs of forward

  /// As Approximator says.
  bool supports(const Inputs<T>& in) const { return Method::kMasks.lacks(in) == nullptr; }

  /// As Approximator says.
  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const { run(in, out, context, nullptr); }

  /// The same for training.
  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    run(in, out, context, &saved);
  }

  /// As Approximator says.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Context& context) const {
    detail::check_backward(Method::kName, in, out, dout, gradients);
    run_backward(in, out, dout, saved, gradients, context);
  }

 protected:
  /// backward, once shapes are checked; more: what differentiate takes besides.
  template <class... More>
  void run_backward(const Inputs<T>& in, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                    const Saved& saved, const Gradients<T>& gradients, Context& context, const More&... more) const {
    const auto& method = in_arithmetic();
    detail::backward_in_type<detail::Arithmetic<T>>(in, out, dout, gradients, context,
                                                    [&](const auto& x, const auto& o, const auto& d_o, const auto& to) {
                                                      saved.pass.check(Method::kName, method.pass(detail::sources(x)));
                                                      method.differentiate(x, o, d_o, saved, to, context, more...);
                                                    });
  }

 private:
  /// saved: a pointer, or nullptr itself, with which nothing of saving is compiled.
  template <class SavedPointer>
  void run(const Inputs<T>& in, const MatrixRef<T>& out, Context& context, SavedPointer saved) const {
    detail::check(Method::kName, in, out);
    Scratch scratch = context.scratch();
    const auto& method = in_arithmetic();
    using SomeMask = std::conditional_t<Method::kMasks.causal, Mask, detail::RowMask>;
    auto from = detail::arithmetic_sources<SomeMask>(in, scratch);
    Method::kMasks.check(Method::kName, in);
    method.check(from);
    constexpr bool kSaves = !std::is_null_pointer_v<SavedPointer>;
    const auto& self = static_cast<const Method&>(*this);
    if constexpr (requires { self.choose_products(from, kSaves, scratch); }) {
      self.choose_products(from, kSaves, scratch);
    }
    if constexpr (kSaves) saved->pass = {};  // none, should attend throw
    method.attend(from, detail::ResultRows<detail::Arithmetic<T>>(out), context, saved);
    if constexpr (kSaves) saved->pass = method.pass(from);
  }

  decltype(auto) in_arithmetic() const {
    const auto& method = static_cast<const Method&>(*this);
    if constexpr (NarrowScalar<T>) {
      return method.wide();
    } else {
      return (method);
    }
  }
};

namespace detail {

/// Nothing converts to it, not even {}. Methods delete their constructor from a list of them, which does no more than
/// make GCC print the line of the other one for Nystrom<float>{.num_landmarks = 64}, as Clang does.
struct NoOption {
  NoOption(const NoOption&, const NoOption&);
};

/// A method whose tokens are spread over the ranks of MPI, see mpi.hpp.
template <class Method>
struct Distributed;

/// What error messages call a method: its own name, where it holds another one that one's.
template <Approximator A>
std::string_view method_name(const A& a) {
  std::string_view name = A::kName;
  if constexpr (requires { name = a.name(); }) name = a.name();
  return name;
}

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
    return method_.supports(in_type<Narrow>(in, scratch, context));
  }

  /// saved: that of a training pass, or nothing.
  template <std::same_as<Saved>... Training>
  void forward(const Inputs<float>& in, MatrixRef<float> out, Context& context, Training&... saved) const {
    Scratch scratch = context.scratch();
    const MatrixRef<Narrow> to = result_in_type<Narrow>(out, scratch);
    method_.forward(in_type<Narrow>(in, scratch, context), to, context, saved...);
    set_converted(out, to, context);
  }

  void backward(const Inputs<float>& in, ConstMatrixRef<float> out, ConstMatrixRef<float> dout, const Saved& saved,
                const Gradients<float>& gradients, Context& context) const {
    backward_in_type<Narrow>(in, out, dout, gradients, context,
                             [&](const auto& narrow, const auto& o, const auto& d_o, const auto& to) {
                               method_.backward(narrow, o, d_o, saved, to, context);
                             });
  }
  /// @}

 private:
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
    return a.wide();
  } else {
    return Rounded<A>(a);
  }
}

}  // namespace detail

/// out = attention of q (n_q, d) to k (n_k, d) and v (n_k, d_v) by method a, in one line: allocates its result, and
/// takes scratch memory and threads from the context. Throws std::invalid_argument as a.forward does.
template <Approximator A>
Matrix<typename A::Scalar> attention(const A& a, ConstMatrixRef<typename A::Scalar> q,
                                     ConstMatrixRef<typename A::Scalar> k, ConstMatrixRef<typename A::Scalar> v,
                                     const Mask& mask, Context& context) {
  const Inputs<typename A::Scalar> in{.q = q, .k = k, .v = v, .mask = mask};
  detail::check_inputs(detail::method_name(a), in);
  Matrix<typename A::Scalar> out(q.rows(), v.cols());
  a.forward(in, out, context);
  return out;
}

/// The same without a mask.
template <Approximator A>
Matrix<typename A::Scalar> attention(const A& a, ConstMatrixRef<typename A::Scalar> q,
                                     ConstMatrixRef<typename A::Scalar> k, ConstMatrixRef<typename A::Scalar> v,
                                     Context& context) {
  return attention(a, q, k, v, {}, context);
}

/// The same on the calling thread, with scratch memory of its own.
template <Approximator A>
Matrix<typename A::Scalar> attention(const A& a, ConstMatrixRef<typename A::Scalar> q,
                                     ConstMatrixRef<typename A::Scalar> k, ConstMatrixRef<typename A::Scalar> v,
                                     const Mask& mask = {}) {
  Context context;
  return attention(a, q, k, v, mask, context);
}

}  // namespace attn
