/// WildCat, a baseline that the library does not have: attention to a weighted coreset of the keys.
#pragma once

#include <attn/context.hpp>
#include <attn/matrix.hpp>

#include <cstdint>

namespace accuracy {

using attn::Index;
using attn::Matrix;

/// Schröder and Mackey 2026 (arXiv 2602.10056), by the formulas of the authors' description and released program:
///   out = exp(s q k_S^T) (W v) / (exp(s q k_S^T) W 1),   W = h(k_S, k_S)^-1 h(k_S, k),   h(x, y) = exp(s x.y / tau^2),
/// clipped to the range of v, with keys less their mean. S is drawn by randomly pivoted Cholesky on h: each key with a
/// probability in proportion to what is left of its diagonal entry. tau balances the rank of h against the queries,
///   tau^2 = R_k / R_q b / (2 W_0(b / (2 rho))),   b = log n / (s R_q R_k) + 2,   rho^2 = 1 + exp(W_0(2 / e^2) + 2),
/// with the largest norms R and Lambert's W_0. Keys are cut into bins of neighbours, each of which draws its share. In
/// float, as theirs; exponents are kept small, so that norms of keys may be any. s = 1 / sqrt(d).
struct WildCat {
  Index num_keys = 128;  ///< size of the coreset; as many as keys is exact attention
  Index num_bins = 1;
  std::uint64_t seed = 0;

  /// out <- the result, without masks and biases.
  void forward(const attn::Inputs<float>& in, Matrix<float>& out, attn::Context& context) const;
};

}  // namespace accuracy
