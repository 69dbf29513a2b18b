/// The peer: attention as one writes it by hand with Eigen.
#pragma once

#include <attn/context.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <string_view>

namespace bench {

/// Softmax attention, 128 queries at a time: one Eigen product for their scores, a stable softmax of each row, one
/// product with v. Causal blocks stop at their last visible key. Takes no key mask and no bias, and causal only with
/// n_q = n_k.
template <class T>
struct EigenBlocks {
  using Scalar = T;
  static constexpr std::string_view kName = "eigen_blocks";
  static constexpr attn::Index kBlock = 128;

  bool supports(const attn::Inputs<T>& in) const {
    return in.mask.keep_key.empty() && in.mask.keep_query.empty() && in.key_bias.empty() &&
           (in.mask.causal == attn::Causal::none || in.q.rows() == in.k.rows());
  }

  void forward(const attn::Inputs<T>& in, attn::MatrixRef<T> out, attn::Context& context) const {
    const bool causal = in.mask.causal != attn::Causal::none;
    const T scale = static_cast<T>(1 / std::sqrt(static_cast<double>(in.q.cols())));
    attn::Scratch scratch = context.scratch();
    T* memory = scratch.array<T>(kBlock * in.k.rows()).data();
    for (attn::Index first = 0; first < in.q.rows(); first += kBlock) {
      const attn::Index rows = std::min(kBlock, in.q.rows() - first);
      const attn::Index keys = causal ? first + rows : in.k.rows();
      attn::MatrixRef<T> weights(memory, rows, keys, keys);
      weights.noalias() = (scale * in.q.middleRows(first, rows)) * in.k.topRows(keys).transpose();
      for (attn::Index i = 0; i < rows; ++i) softmax_row(weights, i, causal ? first + i + 1 : keys);
      out.middleRows(first, rows).noalias() = weights * in.v.topRows(keys);
    }
  }

 private:
  static void softmax_row(attn::MatrixRef<T> weights, attn::Index i, attn::Index visible) {
    auto row = weights.row(i).head(visible);
    row = (row.array() - row.maxCoeff()).exp();
    row /= row.sum();
    weights.row(i).tail(weights.cols() - visible).setZero();
  }
};

}  // namespace bench
