/// Matrices in another type, in scratch memory: narrow ones in float, in which arithmetic is, or float ones rounded.
/// Where the type stays the same they stand for themselves.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <concepts>
#include <span>
#include <type_traits>

namespace attn::detail {

/// double, as a type that depends on T: compilers instantiate views of it with the functions of T that use them, not
/// wherever it is named.
template <class T>
using DoubleWith = std::conditional_t<true, double, T>;

/// to <- from, n elements of another type.
template <class From, class To>
void convert_row(const From* from, To* to, Index n) {
  std::transform(from, from + n, to, [](From x) { return static_cast<To>(x); });
}

/// to <- from, of the same shape and another type.
template <class To, class From>
void convert(const ConstMatrixRef<From>& from, MatrixRef<To> to, Context& context) {
  constexpr Index kRows = 256;  // by one task
  context.for_each((from.rows() + kRows - 1) / kRows, [&](Index item, int) {
    const Index last = std::min((item + 1) * kRows, from.rows());
    for (Index i = item * kRows; i < last; ++i) convert_row(from.row(i).data(), to.row(i).data(), from.cols());
  });
}

/// Where to compute in To what m will hold: m itself, or a matrix of its shape, from which set_converted is to follow.
template <class To, class T>
MatrixRef<To> result_in_type(const MatrixRef<T>& m, Scratch& scratch) {
  if constexpr (std::same_as<To, T>) {
    return m;
  } else {
    return scratch.matrix<To>(m.rows(), m.cols());
  }
}

/// A view m in type To: itself or one of a copy.
template <class To, class M>
  requires requires { typename M::Scalar; }
auto in_type(const M& m, Scratch& scratch, Context& context) {
  if constexpr (std::same_as<To, typename M::Scalar>) {
    return m;
  } else {
    const MatrixRef<To> copy = scratch.matrix<To>(m.rows(), m.cols());
    convert<To, typename M::Scalar>(m, copy, context);
    return copy;
  }
}

/// m <- its result_in_type.
template <class T, class From>
void set_converted(const MatrixRef<T>& m, const MatrixRef<From>& from, Context& context) {
  if constexpr (!std::same_as<T, From>) convert<T, From>(from, m, context);
}

template <class To, class From>
std::span<const To> in_type(std::span<const From> x, Scratch& scratch) {
  if constexpr (std::same_as<To, From>) {
    return x;
  } else {
    const std::span<To> copy = scratch.array<To>(static_cast<Index>(x.size()));
    convert_row(x.data(), copy.data(), static_cast<Index>(x.size()));
    return copy;
  }
}

template <class To, class From>
Inputs<To> in_type(const Inputs<From>& in, Scratch& scratch, Context& context) {
  return {in_type<To>(in.q, scratch, context), in_type<To>(in.k, scratch, context),
          in_type<To>(in.v, scratch, context), in.mask,
          in_type<To>(in.key_bias, scratch),   in.alibi_slope};
}

/// Inputs to be read in the type of their arithmetic, a tile at a time. SomeMask: RowMask where no mask is causal.
template <class SomeMask = Mask, class T>
Sources<Arithmetic<T>> arithmetic_sources(const Inputs<T>& in, Scratch& scratch) {
  using Wide = Arithmetic<T>;
  return {TokenRows<Wide>(in.q),
          TokenRows<Wide>(in.k),
          TokenRows<Wide>(in.v),
          SomeMask(in.mask),
          in_type<Wide>(in.key_bias, scratch),
          in.alibi_slope};
}

/// Those with a cache of another type.
template <class SomeMask = Mask, NarrowScalar Cache>
Sources<float> arithmetic_sources(const CacheInputs<Cache>& in, Scratch&) {
  return {TokenRows<float>(in.q), TokenRows<float>(in.k), TokenRows<float>(in.v), SomeMask(in.mask), in.key_bias,
          in.alibi_slope};
}

/// A backward pass in To: backward(inputs, out, dout, gradients) is of matrices of that type, whose results are
/// converted once.
template <class To, class T, class Backward>
void backward_in_type(const Inputs<T>& in, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                      const Gradients<T>& gradients, Context& context, const Backward& backward) {
  Scratch scratch = context.scratch();
  const Gradients<To> to{result_in_type<To>(gradients.dq, scratch), result_in_type<To>(gradients.dk, scratch),
                         result_in_type<To>(gradients.dv, scratch)};
  const Inputs<To> copies = in_type<To>(in, scratch, context);
  backward(copies, in_type<To>(out, scratch, context), in_type<To>(dout, scratch, context), to);
  set_converted(gradients.dq, to.dq, context);
  set_converted(gradients.dk, to.dk, context);
  set_converted(gradients.dv, to.dv, context);
}

/// x <- set(wide), computed there in float.
template <NarrowScalar T, class Set>
void set_rounded(std::span<T> x, Context& context, const Set& set) {
  Scratch scratch = context.scratch();
  const std::span<float> wide = scratch.array<float>(static_cast<Index>(x.size()));
  set(wide);
  convert_row(wide.data(), x.data(), static_cast<Index>(x.size()));
}

}  // namespace attn::detail
