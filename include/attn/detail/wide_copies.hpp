/// Copies of narrow matrices in float, and the way back. Matrices of other types stand for themselves.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <span>

namespace attn::detail {

inline constexpr Index kConvertedRows = 256;  ///< by one task

/// to <- from, of the same shape and another type.
template <class To, class From>
void convert(const ConstMatrixRef<From>& from, MatrixRef<To> to, Context& context) {
  context.for_each((from.rows() + kConvertedRows - 1) / kConvertedRows, [&](Index item, int) {
    const Index first = item * kConvertedRows, rows = std::min(kConvertedRows, from.rows() - first);
    for (Index i = first; i < first + rows; ++i) convert_row(from.row(i).data(), to.row(i).data(), from.cols());
  });
}

/// m as arithmetic reads it: itself, or a copy in float.
template <class T>
ConstMatrixRef<Arithmetic<T>> widened(const ConstMatrixRef<T>& m, Scratch& scratch, Context& context) {
  if constexpr (NarrowScalar<T>) {
    const MatrixRef<float> copy = scratch.matrix<float>(m.rows(), m.cols());
    convert<float, T>(m, copy, context);
    return copy;
  } else {
    return m;
  }
}

/// Where to compute what m will hold: m itself, or a matrix of its shape in float, from which set_rounded is to follow.
template <class T>
MatrixRef<Arithmetic<T>> wide_result(const MatrixRef<T>& m, Scratch& scratch) {
  if constexpr (NarrowScalar<T>) {
    return scratch.matrix<float>(m.rows(), m.cols());
  } else {
    return m;
  }
}

/// m <- the wide_result of it.
template <class T>
void set_rounded(const MatrixRef<T>& m, const MatrixRef<Arithmetic<T>>& wide, Context& context) {
  if constexpr (NarrowScalar<T>) convert<T, float>(wide, m, context);
}

/// Key biases as float, in scratch memory.
template <NarrowScalar T>
std::span<const float> widen_bias(std::span<const T> bias, Scratch& scratch) {
  const std::span<float> wide = scratch.array<float>(static_cast<Index>(bias.size()));
  std::transform(bias.begin(), bias.end(), wide.begin(), [](T x) { return static_cast<float>(x); });
  return wide;
}

/// Inputs as float: copies in scratch memory.
template <NarrowScalar T>
Inputs<float> widen_inputs(const Inputs<T>& in, Scratch& scratch, Context& context) {
  return {widened(in.q, scratch, context), widened(in.k, scratch, context), widened(in.v, scratch, context), in.mask,
          widen_bias(in.key_bias, scratch)};
}

}  // namespace attn::detail
