/// Attention matrices as linear operators: known by what they do to a block of columns, never stored.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/approximator.hpp>
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
#include <cstddef>
#include <limits>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

namespace attn {

/// A matrix A that can be multiplied by blocks of b columns, b at least 1.
///   typename A::Scalar          the type of the blocks' elements
///   a.rows(), a.cols()          the shape of A
///   a.apply(x, y, context)      y (rows, b) <- A x for x (cols, b)
/// Optional for a narrow type: a.apply_wide(x, y, context), the same for blocks of float, and a.apply_transpose_wide.
/// Differences and the measures of <attn/metrics.hpp> then round nothing on their way.
template <class A>
concept ForwardOperator =
    requires(const A& a, ConstMatrixRef<typename A::Scalar> x, MatrixRef<typename A::Scalar> y, Context& context) {
      { a.rows() } -> std::same_as<Index>;
      { a.cols() } -> std::same_as<Index>;
      a.apply(x, y, context);
    };

/// One whose transpose can be applied too: a.apply_transpose(x, y, context), y (cols, b) <- A^T x for x (rows, b).
template <class A>
concept LinearOperator =
    ForwardOperator<A> && requires(const A& a, ConstMatrixRef<typename A::Scalar> x, MatrixRef<typename A::Scalar> y,
                                   Context& context) { a.apply_transpose(x, y, context); };

namespace detail {

template <class A>
using WideBlock = Arithmetic<typename A::Scalar>;

/// An operator of narrow blocks that takes wide ones too, without rounding them; every operator of other blocks.
template <class A>
concept TakesWideBlocks =
    !NarrowScalar<typename A::Scalar> || requires(const A& a, ConstMatrixRef<WideBlock<A>> x, MatrixRef<WideBlock<A>> y,
                                                  Context& context) { a.apply_wide(x, y, context); };

/// y <- A x in the type of the arithmetic; an operator of narrow blocks alone gets x rounded.
template <class A>
void apply_wide(const A& a, const ConstMatrixRef<WideBlock<A>>& x, const MatrixRef<WideBlock<A>>& y, Context& context) {
  using T = typename A::Scalar;
  if constexpr (NarrowScalar<T> && TakesWideBlocks<A>) {
    a.apply_wide(x, y, context);
  } else {
    Scratch scratch = context.scratch();
    const MatrixRef<T> to = result_in_type<T>(y, scratch);
    a.apply(in_type<T>(x, scratch, context), to, context);
    set_converted(y, to, context);
  }
}

/// The transpose of an operator, to be applied.
template <LinearOperator A>
struct Transposed {
  using Scalar = typename A::Scalar;

  const A& a;

  void apply(const ConstMatrixRef<Scalar>& x, MatrixRef<Scalar> y, Context& context) const {
    a.apply_transpose(x, y, context);
  }

  void apply_wide(const ConstMatrixRef<WideBlock<A>>& x, MatrixRef<WideBlock<A>> y, Context& context) const
    requires requires { a.apply_transpose_wide(x, y, context); }
  {
    a.apply_transpose_wide(x, y, context);
  }
};

template <class A>
Transposed(const A&) -> Transposed<A>;

/// y <- A x - B x, computed in the type of the arithmetic, for blocks of that type or of the operators'.
template <class A, class B, class Block>
void apply_difference(const A& a, const B& b, const ConstMatrixRef<Block>& x, const MatrixRef<Block>& y,
                      Context& context) {
  using Wide = WideBlock<A>;
  Scratch scratch = context.scratch();
  const ConstMatrixRef<Wide> from = in_type<Wide>(x, scratch, context);
  MatrixRef<Wide> to = result_in_type<Wide>(y, scratch);
  apply_wide(a, from, to, context);  // which refuses a wrong shape
  const MatrixRef<Wide> other = scratch.matrix<Wide>(y.rows(), y.cols());
  apply_wide(b, from, other, context);
  to -= other;
  set_converted(y, to, context);
}

/// A kernel with given parameters and raw rows.
struct RawRows {
  ScoreParameters parameters;

  double scale(Index) const { return parameters.scale; }
  double bias(Index) const { return parameters.bias; }
  Rows rows() const { return Rows::raw; }
};

}  // namespace detail

/// What the library's own operators make of two products of blocks of T or of what T is computed in: multiply(x, y,
/// context), y <- A x, and multiply_transposed(x, y, context), y <- A^T x,
/// unless has_transpose is false.
template <class Operator, class T, bool has_transpose = true>
class OperatorBase {
 public:
  using Scalar = T;                    ///< the type of the blocks' elements
  using Wide = detail::Arithmetic<T>;  ///< what narrow blocks are computed in

  /// As ForwardOperator says.
  void apply(const ConstMatrixRef<T>& x, MatrixRef<T> y, Context& context) const { self().multiply(x, y, context); }

  /// As ForwardOperator says.
  void apply_wide(const ConstMatrixRef<Wide>& x, MatrixRef<Wide> y, Context& context) const {
    self().multiply(x, y, context);
  }

  /// As LinearOperator says.
  void apply_transpose(const ConstMatrixRef<T>& x, MatrixRef<T> y, Context& context) const
    requires has_transpose
  {
    self().multiply_transposed(x, y, context);
  }

  /// As LinearOperator says.
  void apply_transpose_wide(const ConstMatrixRef<Wide>& x, MatrixRef<Wide> y, Context& context) const
    requires has_transpose
  {
    self().multiply_transposed(x, y, context);
  }

 private:
  const Operator& self() const { return static_cast<const Operator&>(*this); }
};

/// The matrix A of exact attention, A_ij = kappa(q_i, k_j), divided by exp(lse_i) = sum_j kappa(q_i, k_j) if the
/// kernel's rows are normalized; zero where the mask drops i or j.
///   (A x)_i   = sum_j A_ij x_j                            the streamed product with v = x
///   (A^T x)_j = sum_i kappa(k_j, q_i) exp(-lse_i) x_i     the same, q and k in each other's place, a bias of -lse_i
/// Under a causal mask a key counts for the queries from one on: with the rows of both in reverse order, for those up
/// to one, which is a causal mask again. q (n_q, d), k (n_k, d), both views that must outlive it, as must the mask.
/// Throws std::invalid_argument when shapes disagree or are empty, the kernel's parameter is out of range, or a window
/// has first keys beside it. Each product costs 2 n_q n_k (d + b) flops, half of it under a causal mask, and O(tile)
/// memory; the operator itself keeps n_q numbers, for narrow types in float.
template <class T, ScoreKernel Kernel>
class ExactOperator : public OperatorBase<ExactOperator<T, Kernel>, T> {
 public:
  using Wide = detail::Arithmetic<T>;                          ///< what narrow blocks are computed in
  static constexpr std::string_view kName = "exact operator";  ///< in error messages

  /// Of q (n_q, d) and k (n_k, d).
  ExactOperator(Kernel kernel, ConstMatrixRef<T> q, ConstMatrixRef<T> k, Mask mask, Context& context)
      : kernel_(kernel), q_(q), k_(k), mask_(mask) {
    const Inputs<T> in{q_, k_, k_, mask};
    detail::check_inputs(kName, in);
    if (mask.window != 0 && mask.num_sinks != 0) {
      detail::refuse(kName, "first keys beside a window are not supported");
    }
    detail::check_kernel<T>(kName, kernel_, q_.cols());
    if (score_parameters(kernel_, q_.cols()).rows == Rows::normalized) find_row_weights(context);
  }

  /// @{ As OperatorBase says.
  Index rows() const { return q_.rows(); }
  Index cols() const { return k_.rows(); }

  template <class Block>
  void multiply(const ConstMatrixRef<Block>& x, const MatrixRef<Block>& y, Context& context) const {
    check_blocks(x, cols(), y, rows());
    const detail::Sources<Wide> in{detail::TokenRows<Wide>(q_), detail::TokenRows<Wide>(k_), detail::TokenRows<Wide>(x),
                                   source_mask()};
    detail::multiply<Kernel, Wide>(kernel_, in, detail::ResultRows<Wide>(y), nullptr, context);
  }

  template <class Block>
  void multiply_transposed(const ConstMatrixRef<Block>& x, const MatrixRef<Block>& y, Context& context) const {
    check_blocks(x, rows(), y, cols());
    const detail::RawRows raw{score_parameters(kernel_, q_.cols())};
    if (mask_.causal != Causal::none) return multiply_reversed(raw, x, y, context);
    const detail::RowMask swapped(mask_.keep_query, mask_.keep_key);
    const detail::Sources<Wide> in{detail::TokenRows<Wide>(k_), detail::TokenRows<Wide>(q_), detail::TokenRows<Wide>(x),
                                   swapped, log_row_weights_};
    detail::multiply<detail::RawRows, Wide>(raw, in, detail::ResultRows<Wide>(y), nullptr, context);
  }
  /// @}

 private:
  /// A causal mask brings its kernels along.
  detail::SourceMask<Wide> source_mask() const {
    if (mask_.causal == Causal::none) return detail::RowMask(mask_);
    return mask_;
  }

  /// multiply_transposed under a causal mask: where query i saw keys j <= i + offset, key r = n_k - 1 - j now sees
  /// queries s = n_q - 1 - i with s <= r + n_q - n_k + offset, and of these a window leaves as many.
  template <class Block>
  void multiply_reversed(const detail::RawRows& raw, const ConstMatrixRef<Block>& x, const MatrixRef<Block>& y,
                         Context& context) const {
    Scratch scratch = context.scratch();
    const Inputs<T> in{q_, k_, k_, mask_};
    const Index offset = rows() - cols() + detail::CausalLimits::of_inputs(in).offset;
    const Mask reversed{.causal = Causal::upper_left,
                        .keep_key = in_reverse(mask_.keep_query, scratch),
                        .keep_query = in_reverse(mask_.keep_key, scratch),
                        .window = mask_.window,
                        .first_query = std::max<Index>(offset, 0),
                        .first_key = std::max<Index>(-offset, 0)};
    const detail::Sources<Wide> from{detail::TokenRows<Wide>(k_).reversed(), detail::TokenRows<Wide>(q_).reversed(),
                                     detail::TokenRows<Wide>(x).reversed(), reversed,
                                     in_reverse(std::span<const Wide>(log_row_weights_), scratch)};
    detail::multiply<detail::RawRows, Wide>(raw, from, detail::ResultRows<Wide>(y).reversed(), nullptr, context);
  }

  template <class E>
  static std::span<const E> in_reverse(std::span<const E> x, Scratch& scratch) {
    const std::span<E> copy = scratch.array<E>(static_cast<Index>(x.size()));
    std::reverse_copy(x.begin(), x.end(), copy.begin());
    return copy;
  }

  /// x (n_x, b) and y (n_y, b), apart.
  template <class Block>
  void check_blocks(const ConstMatrixRef<Block>& x, Index n_x, const MatrixRef<Block>& y, Index n_y) const {
    detail::check_not_empty(kName, "x", x);
    detail::check_shape(kName, "x", x, n_x, x.cols());
    detail::check_shape(kName, "y", y, n_y, x.cols());
    const detail::Memory result = detail::Memory::of("y", y);
    const detail::Memory inputs[] = {detail::Memory::of("x", x), detail::Memory::of("q", q_),
                                     detail::Memory::of("k", k_), detail::Memory::of("keep_key", mask_.keep_key),
                                     detail::Memory::of("keep_query", mask_.keep_query)};
    detail::check_apart(kName, {&result, 1}, inputs);
  }

  /// log_row_weights_ <- -lse; a row that sees no key has no weight.
  void find_row_weights(Context& context) {
    Scratch scratch = context.scratch();
    log_row_weights_.resize(static_cast<std::size_t>(q_.rows()));
    const ConstMatrixRef<T> column = k_.leftCols(1);
    const detail::Sources<Wide> in{detail::TokenRows<Wide>(q_), detail::TokenRows<Wide>(k_),
                                   detail::TokenRows<Wide>(column), source_mask()};
    detail::multiply<Kernel, Wide>(kernel_, in, scratch.matrix<Wide>(q_.rows(), 1), log_row_weights_.data(), context);
    constexpr Wide kInfinity = std::numeric_limits<Wide>::infinity();
    for (Wide& x : log_row_weights_) x = x == -kInfinity ? -kInfinity : -x;
  }

  Kernel kernel_;
  ConstMatrixRef<T> q_, k_;
  Mask mask_;
  std::vector<Wide> log_row_weights_;  // empty: the rows are raw
};

/// The matrix of any method that is linear in v: A x is the method with v = x (cols, b). Not ShiftedNystrom in its row
/// mode, whose gate depends on v, nor Multipole, whose choice of near clusters does. q (n_q, d) and k (n_k, d) are
/// views that must outlive it, as must the mask; the method checks them.
template <Approximator Method>
class ApproximatorOperator : public OperatorBase<ApproximatorOperator<Method>, typename Method::Scalar> {
 public:
  using Scalar = typename Method::Scalar;  ///< the type of q and k

  /// Of q (n_q, d) and k (n_k, d).
  ApproximatorOperator(Method method, ConstMatrixRef<Scalar> q, ConstMatrixRef<Scalar> k, Mask mask = {})
      : method_(std::move(method)), q_(q), k_(k), mask_(mask) {}

  /// @{ As OperatorBase says.
  Index rows() const { return q_.rows(); }
  Index cols() const { return k_.rows(); }

  template <class Block>
  void multiply(const ConstMatrixRef<Block>& x, const MatrixRef<Block>& y, Context& context) const {
    with_method_of<Block>(context, [&](const auto& method, const auto& q, const auto& k) {
      method.forward(Inputs<Block>{q, k, x, mask_}, y, context);
    });
  }

  /// The gradient by v for x as the gradient by out; costs a forward and a backward pass, with matrices of its own.
  template <class Block>
  void multiply_transposed(const ConstMatrixRef<Block>& x, const MatrixRef<Block>& y, Context& context) const {
    constexpr std::string_view kName = "approximator operator";
    with_method_of<Block>(context, [&](const auto& method, const auto& q, const auto& k) {
      detail::check_inputs(kName, Inputs<Block>{q, k, y, mask_});
      detail::check_shape(kName, "x", x, rows(), y.cols());
      const Matrix<Block> v = Matrix<Block>::Zero(y.rows(), y.cols());
      Matrix<Block> out(x.rows(), x.cols()), dq(q.rows(), q.cols()), dk(k.rows(), k.cols());
      typename Method::Saved saved;
      const Inputs<Block> in{q, k, v, mask_};
      method.forward(in, out, context, saved);
      method.backward(in, out, x, saved, {dq, dk, y}, context);
    });
  }
  /// @}

 private:
  /// product(method, q, k) in the type of Block: that of the arithmetic, on copies of narrow q and k, or the method's.
  template <class Block, class Product>
  void with_method_of(Context& context, const Product& product) const {
    if constexpr (std::same_as<Block, Scalar>) {
      product(method_, q_, k_);
    } else {
      Scratch scratch = context.scratch();
      product(detail::wide_method(method_), detail::in_type<Block>(q_, scratch, context),
              detail::in_type<Block>(k_, scratch, context));
    }
  }

  Method method_;
  ConstMatrixRef<Scalar> q_, k_;
  Mask mask_;
};

/// A - B, for example an approximation's error. Has a transpose where both have. Throws std::invalid_argument when
/// shapes disagree.
template <ForwardOperator A, ForwardOperator B>
  requires std::same_as<typename A::Scalar, typename B::Scalar>
class Difference : public OperatorBase<Difference<A, B>, typename A::Scalar, LinearOperator<A> && LinearOperator<B>> {
 public:
  /// Of operators of one shape.
  Difference(A a, B b) : a_(std::move(a)), b_(std::move(b)) {
    if (a_.rows() == b_.rows() && a_.cols() == b_.cols()) return;
    detail::refuse("difference", "a is %td x %td, b is %td x %td", a_.rows(), a_.cols(), b_.rows(), b_.cols());
  }

  /// @{ As OperatorBase says.
  Index rows() const { return a_.rows(); }
  Index cols() const { return a_.cols(); }

  template <class Block>
  void multiply(const ConstMatrixRef<Block>& x, const MatrixRef<Block>& y, Context& context) const {
    detail::apply_difference(a_, b_, x, y, context);
  }

  template <class Block>
  void multiply_transposed(const ConstMatrixRef<Block>& x, const MatrixRef<Block>& y, Context& context) const {
    detail::apply_difference(detail::Transposed{a_}, detail::Transposed{b_}, x, y, context);
  }
  /// @}

 private:
  A a_;
  B b_;
};

}  // namespace attn
