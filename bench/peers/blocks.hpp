/// Attention and Nystromformer as one writes them by hand on a library's matrix products.
#pragma once

#include "peer.hpp"

#include <algorithm>
#include <cmath>

namespace bench {

using ConstView = attn::ConstMatrixRef<float>;
using View = attn::MatrixRef<float>;

/// What the scores are multiplied by.
inline float softmax_scale(Index d) {
  return static_cast<float>(1 / std::sqrt(static_cast<double>(d)));
}

/// Calls attend(q, k, v, weights, out) for 128 queries at a time, weights being memory for one weight a query and key.
/// Causal blocks are given no key after their last query: the last keys are then those of the queries themselves.
template <class Attend>
void in_blocks_of_queries(const attn::Inputs<float>& in, View out, attn::Scratch& scratch, const Attend& attend) {
  constexpr Index kBlock = 128;
  const bool causal = in.mask.causal != attn::Causal::none;
  float* memory = scratch.array<float>(std::min(kBlock, in.q.rows()) * in.k.rows()).data();
  for (Index first = 0; first < in.q.rows(); first += kBlock) {
    const Index rows = std::min(kBlock, in.q.rows() - first), keys = causal ? first + rows : in.k.rows();
    attend(in.q.middleRows(first, rows), in.k.topRows(keys), in.v.topRows(keys), View(memory, rows, keys, keys),
           out.middleRows(first, rows));
  }
}

/// Of each row, the first visible columns <- their stable softmax, the others <- 0. Row i sees one column more than row
/// i - 1 where causal, and the last row all of them.
inline void softmax_rows(View weights, bool causal) {
  for (Index i = 0; i < weights.rows(); ++i) {
    const Index hidden = causal ? weights.rows() - 1 - i : 0;
    auto row = weights.row(i).head(weights.cols() - hidden);
    row = (row.array() - row.maxCoeff()).exp();
    row /= row.sum();
    weights.row(i).tail(hidden).setZero();
  }
}

/// Softmax attention, a block of queries at a time: one product for their scores, a stable softmax of each row, one
/// product with v.
///   Products::multiply_transposed(scale, a, b, c): c <- scale a b^T        Products::multiply(a, b, c): c <- a b
template <class Products>
void attend(const attn::Inputs<float>& in, View out, attn::Context& context) {
  attn::Scratch scratch = context.scratch();
  const bool causal = in.mask.causal != attn::Causal::none;
  const float scale = softmax_scale(in.q.cols());
  in_blocks_of_queries(in, out, scratch, [=](ConstView q, ConstView k, ConstView v, View weights, View block) {
    Products::multiply_transposed(scale, q, k, weights);
    softmax_rows(weights, causal);
    Products::multiply(weights, v, block);
  });
}

/// means <- of as many segments of x, all of one length.
inline void segment_means(ConstView x, View means) {
  const Index length = x.rows() / means.rows();
  for (Index i = 0; i < means.rows(); ++i) means.row(i) = x.middleRows(i * length, length).colwise().mean();
}

/// z <- A^+ by six iterations of Z (13 I - AZ (15 I - AZ (7 I - AZ))) / 4 from A^T / (|A|_1 |A|_inf).
template <class Products>
void iterate_pinv(ConstView a, View z, attn::Scratch& scratch) {
  const Index m = a.rows();
  View az = scratch.matrix<float>(m, m), factor = scratch.matrix<float>(m, m), product = scratch.matrix<float>(m, m);
  const auto subtract_from = [&](float diagonal, ConstView from) {
    factor = -from;
    factor.diagonal().array() += diagonal;
  };
  const float norms = a.cwiseAbs().colwise().sum().maxCoeff() * a.cwiseAbs().rowwise().sum().maxCoeff();
  z = a.transpose() / norms;
  for (int iteration = 0; iteration < 6; ++iteration) {
    Products::multiply(a, z, az);
    subtract_from(7, az);
    Products::multiply(az, factor, product);
    subtract_from(15, product);
    Products::multiply(az, factor, product);
    subtract_from(13, product);
    Products::multiply(z, factor, product);
    z = product / 4;
  }
}

/// Nystromformer, softmax(q k_land^T) Z (softmax(q_land k^T) v): the factors with n weights a landmark are attention
/// themselves, and in blocks. The number of landmarks divides that of queries and that of keys. Xiong et al. 2021.
template <class Products>
void nystrom(const attn::Inputs<float>& in, View out, attn::Context& context) {
  const Index m = kPeerLandmarks, d = in.q.cols();
  attn::Scratch scratch = context.scratch();
  View q_land = scratch.matrix<float>(m, d), k_land = scratch.matrix<float>(m, d), a = scratch.matrix<float>(m, m);
  View z = scratch.matrix<float>(m, m), bv = scratch.matrix<float>(m, d), zbv = scratch.matrix<float>(m, d);
  segment_means(in.q, q_land);
  segment_means(in.k, k_land);
  Products::multiply_transposed(softmax_scale(d), q_land, k_land, a);
  softmax_rows(a, false);
  iterate_pinv<Products>(a, z, scratch);
  attend<Products>({.q = q_land, .k = in.k, .v = in.v}, bv, context);
  Products::multiply(z, bv, zbv);
  attend<Products>({.q = in.q, .k = k_land, .v = zbv}, out, context);
}

}  // namespace bench
