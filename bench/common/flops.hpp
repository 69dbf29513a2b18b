/// How many floating-point operations a method is credited with.
#pragma once

#include <attn/mask.hpp>
#include <attn/matrix.hpp>
#include <attn/multipole.hpp>

#include <string_view>

namespace bench {

/// Of exact attention: 2 for each multiply-add of q k^T and of weights v, 4 n_q n_k d where d_v = d; half of it when
/// causal. The exponentials count nothing.
inline double attention_flops(attn::Index n_q, attn::Index n_k, attn::Index d, attn::Causal causal = {}) {
  const double all = 4.0 * static_cast<double>(n_q) * static_cast<double>(n_k) * static_cast<double>(d);
  return causal == attn::Causal::none ? all : all / 2;
}

/// A backward pass's flops over its forward pass's: exact attention's has five products in place of two,
/// q k^T, dout v^T, weights^T dout, slopes k and slopes^T q, 10 n^2 d flops. The others are credited with the same.
inline constexpr double kBackwardOverForward = 2.5;

/// Of a method with landmarks: its two streamed products, n queries on m landmarks and m landmarks on n keys, 8 n m d.
/// The m x m algebra counts nothing.
inline double landmark_flops(attn::Index n, attn::Index num_landmarks, attn::Index d) {
  return 2 * attention_flops(n, num_landmarks, d);
}

/// Of multipole attention: n queries on the keys of near clusters and one for each cluster, then a query for each group
/// on all keys. Finding clusters and groups counts nothing.
inline double multipole_flops(attn::Index n, const attn::Clusters& options, attn::Index d) {
  const auto counts = attn::detail::FieldCounts::of(options, n, n);
  if (counts.exact(options, n, n)) return attention_flops(n, n, d);
  const attn::Index keys_met = counts.field() + counts.near * n / counts.clusters;
  return attention_flops(n, keys_met, d) + attention_flops(1, counts.summarized(n), d);
}

/// Of the method of this name by its factors alone, with so many landmarks or, for multipole, with its own counts.
inline double forward_flops(std::string_view name, attn::Index n, attn::Index num_landmarks, attn::Index d) {
  if (name == "softmax" || name == "gaussian") return attention_flops(n, n, d);
  return name == "multipole" ? multipole_flops(n, {}, d) : landmark_flops(n, num_landmarks, d);
}

/// Of six steps to the inverse in Nystrom, four products of m x m matrices each: 48 m^3.
inline double pinv_flops(attn::Index num_landmarks) {
  const auto m = static_cast<double>(num_landmarks);
  return 48 * m * m * m;
}

}  // namespace bench
