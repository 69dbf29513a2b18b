/// Attention by its definitions as graphs of torch's own operations, whose gradients autograd derives: an oracle that
/// shares nothing with attn. One batch item: q (H, n_q, d), k (H, n_k, d), v (H, n_k, d_v); keep_key (n_k) and
/// keep_query (n_q) are boolean.
#pragma once

#include <torch/types.h>

#include <cmath>
#include <limits>
#include <vector>

namespace graphs {

using torch::Tensor;

struct Problem {
  Tensor q, k, v, keep_key, keep_query;

  double scale() const { return 1 / std::sqrt(static_cast<double>(q.size(-1))); }
  /// Dropped queries have rows of zeros.
  Tensor masked(const Tensor& out) const { return out * keep_query.unsqueeze(-1); }
};

inline Tensor transposed(const Tensor& x) {
  return x.transpose(-1, -2);
}

/// softmax(s q k^T) over the keys that are kept.
inline Tensor softmax_matrix(const Tensor& q, const Tensor& k, double scale, const Tensor& keep_key = {}) {
  const Tensor scores = scale * torch::matmul(q, transposed(k));
  if (!keep_key.defined()) return torch::softmax(scores, -1);
  return torch::softmax(scores.masked_fill(~keep_key, -std::numeric_limits<double>::infinity()), -1);
}

/// exp(-|q_i - k_j|^2 s / 2).
inline Tensor gaussian_matrix(const Tensor& q, const Tensor& k, double scale) {
  return torch::exp(-0.5 * scale * (q.unsqueeze(-2) - k.unsqueeze(-3)).pow(2).sum(-1));
}

inline Tensor softmax(const Problem& p) {
  return p.masked(torch::matmul(softmax_matrix(p.q, p.k, p.scale(), p.keep_key), p.v));
}

inline Tensor gaussian(const Problem& p) {
  return p.masked(torch::matmul(gaussian_matrix(p.q, p.k, p.scale()) * p.keep_key, p.v));
}

/// (m, n): row j averages segment j of the kept tokens; the first m - n mod m segments are a token shorter.
inline Tensor segment_averages(const Tensor& keep, long m) {
  const Tensor kept = keep.nonzero().flatten();
  const long n = kept.size(0), length = n / m;
  Tensor averages = torch::zeros({m, keep.size(0)}, torch::kDouble);
  for (long j = 0, row = 0; j < m; ++j) {
    const long rows = length + (j < m - n % m ? 0 : 1);
    for (const long last = row + rows; row < last; ++row)
      averages[j][kept[row].item<long>()] = 1.0 / static_cast<double>(rows);
  }
  return averages;
}

/// Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4 from A^T / (|A|_1 |A|_inf).
inline Tensor iterated_inverse(const Tensor& a, int iterations) {
  const Tensor eye = torch::eye(a.size(-1), torch::kDouble);
  const Tensor largest_column = std::get<0>(a.sum(-2).max(-1)), largest_row = std::get<0>(a.sum(-1).max(-1));
  Tensor z = transposed(a) / (largest_column * largest_row).unsqueeze(-1).unsqueeze(-1);
  for (int i = 0; i < iterations; ++i) {
    const Tensor az = torch::matmul(a, z);
    z = 0.25 * torch::matmul(z, 13 * eye - torch::matmul(az, 15 * eye - torch::matmul(az, 7 * eye - az)));
  }
  return z;
}

inline Tensor nystrom(const Problem& p, long m, int iterations) {
  const Tensor q_land = torch::matmul(segment_averages(p.keep_query, m), p.q);
  const Tensor k_land = torch::matmul(segment_averages(p.keep_key, m), p.k);
  const Tensor z = iterated_inverse(softmax_matrix(q_land, k_land, p.scale()), iterations);
  const Tensor sums = torch::matmul(softmax_matrix(q_land, p.k, p.scale(), p.keep_key), p.v);
  return p.masked(torch::matmul(softmax_matrix(p.q, k_land, p.scale()), torch::matmul(z, sums)));
}

/// The landmarks are these rows of [q; k].
inline Tensor skyformer(const Problem& p, const std::vector<long>& rows, double gamma) {
  const Tensor land = torch::cat({p.q, p.k}, -2).index_select(-2, torch::tensor(rows));
  const Tensor inner = gaussian_matrix(land, land, p.scale()) + gamma * torch::eye(land.size(-2), torch::kDouble);
  const Tensor sums = torch::matmul(gaussian_matrix(land, p.k, p.scale()) * p.keep_key, p.v);
  return p.masked(torch::matmul(gaussian_matrix(p.q, land, p.scale()), torch::linalg_solve(inner, sums)));
}

}  // namespace graphs
