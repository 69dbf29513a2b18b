/// Attention as one writes it by hand on a library's matrix product.
#pragma once

#include <attn/context.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>

namespace bench {

/// weights <- the stable softmax of its first columns, as many as are visible, row by row; 0 in the others.
inline void softmax_row(attn::MatrixRef<float> weights, attn::Index i, attn::Index visible) {
  auto row = weights.row(i).head(visible);
  row = (row.array() - row.maxCoeff()).exp();
  row /= row.sum();
  weights.row(i).tail(weights.cols() - visible).setZero();
}

/// Softmax attention, 128 queries at a time: one product for their scores, a stable softmax of each row, one product
/// with v. Causal blocks stop at their last visible key.
///   multiply_transposed(a, b, c): c <- a b^T / sqrt(d)        multiply(a, b, c): c <- a b
template <class MultiplyTransposed, class Multiply>
void attend_in_blocks(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context& context,
                      const MultiplyTransposed& multiply_transposed, const Multiply& multiply) {
  constexpr attn::Index kBlock = 128;
  const bool causal = in.mask.causal != attn::Causal::none;
  attn::Scratch scratch = context.scratch();
  float* memory = scratch.array<float>(kBlock * in.k.rows()).data();
  for (attn::Index first = 0; first < in.q.rows(); first += kBlock) {
    const attn::Index rows = std::min(kBlock, in.q.rows() - first);
    const attn::Index keys = causal ? first + rows : in.k.rows();
    attn::MatrixRef<float> weights(memory, rows, keys, keys);
    multiply_transposed(in.q.middleRows(first, rows), in.k.topRows(keys), weights);
    for (attn::Index i = 0; i < rows; ++i) softmax_row(weights, i, causal ? first + i + 1 : keys);
    multiply(weights, in.v.topRows(keys), out.middleRows(first, rows));
  }
}

/// What the scores are multiplied by.
inline float softmax_scale(attn::Index d) {
  return static_cast<float>(1 / std::sqrt(static_cast<double>(d)));
}

}  // namespace bench
