/// Attention by its definitions, in double and pair by pair: the oracle that the library's results are compared with.
/// Written for reading; shares no code with the library but the types Mask and Causal.
#pragma once

#include <attn/mask.hpp>

#include <Eigen/Core>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <vector>

namespace reference {

using Eigen::Index;
using Matrix = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Vector = Eigen::VectorXd;

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// kappa(q, k) = exp(scale q.k - bias (|q|^2 + |k|^2)), rows divided by their sum if normalized.
struct Kernel {
  double scale, bias;
  bool normalized;
};

inline Kernel softmax_kernel(Index d, std::optional<double> scale = {}) {
  return {scale.value_or(std::pow(static_cast<double>(d), -0.5)), 0, true};
}

inline Kernel gaussian_kernel(Index d, std::optional<double> bandwidth = {}, bool normalized = false) {
  const double h2 = bandwidth ? *bandwidth * *bandwidth : std::pow(static_cast<double>(d), 0.5);
  return {1 / h2, 1 / (2 * h2), normalized};
}

/// One head. key_bias is empty or has an entry for each key.
struct Problem {
  Matrix q, k, v;
  attn::Mask mask{};
  Vector key_bias{};
  double alibi_slope = 0;
};

inline bool kept(std::span<const std::uint8_t> keep, Index i) {
  return keep.empty() || keep[static_cast<std::size_t>(i)] != 0;
}

/// How many rows the last key that query i of n_q sees under a causal mask, if the sequence went on, lies behind key j
/// of n_k: negative where the query does not see it. lower_right: the last kept query sees the last kept key, and a
/// query so many rows before it does not see as many rows of keys. Both are kept.
inline Index rows_ahead(const attn::Mask& mask, Index n_q, Index n_k, Index i, Index j) {
  if (mask.causal == attn::Causal::upper_left) return mask.first_query + i - (mask.first_key + j);
  Index last_query = n_q - 1, last_key = n_k - 1;
  while (!kept(mask.keep_query, last_query)) --last_query;  // ends at i or before
  while (!kept(mask.keep_key, last_key)) --last_key;        // at j or before
  return last_key - j - (last_query - i);
}

/// Whether query i of n_q sees key j of n_k. A window leaves its last rows and the first ones.
inline bool visible(const attn::Mask& mask, Index n_q, Index n_k, Index i, Index j) {
  if (!kept(mask.keep_query, i) || !kept(mask.keep_key, j)) return false;
  if (mask.causal == attn::Causal::none) return true;
  const Index ahead = rows_ahead(mask, n_q, n_k, i, j);
  if (ahead < 0 || mask.window == 0) return ahead >= 0;
  Index first_key = 0;
  while (mask.first_key == 0 && !kept(mask.keep_key, first_key)) ++first_key;
  return ahead < mask.window || mask.first_key + j < first_key + mask.num_sinks;
}

/// log kappa of every pair, written as -bias |q - k|^2 + (scale - 2 bias) q.k: a Gaussian kernel has the first term
/// alone, softmax the second.
Matrix log_kernel(const Kernel& kernel, const Matrix& q, const Matrix& k);

/// The largest finite key bias that each query sees, 0 where there is none: added to a score, a large one would take
/// its digits.
Vector bias_origins(const Problem& p);

/// log_kernel plus key_bias and what distances weigh, less an origin of the query unless there are none; -infinity
/// where the query does not see the key.
Matrix log_weights(const Kernel& kernel, const Problem& p, const Vector& origins = {});

struct Result {
  Matrix out;
  Vector lse;  // log of the row's sum of weights, before any division
};

/// out_i = sum_j w_ij v_j over the keys that i sees, divided by sum_j w_ij if normalized; zeros where it sees none.
Result attend(const Kernel& kernel, const Problem& p);

struct Gradients {
  Matrix dq, dk, dv;
  Vector dbias;  // by the key bias, for every key
};

/// The gradients of attend's sum_i dout_i.out_i. With P_ij what multiplies v_j in out_i, and D_i = sum_j P_ij
/// dout_i.v_j where rows are normalized, else 0:
///   dv_j = sum_i P_ij dout_i        slope_ij = P_ij (dout_i.v_j - D_i)        dbias_j = sum_i slope_ij
///   dq_i = sum_j slope_ij (scale k_j - 2 bias q_i)        dk_j = sum_i slope_ij (scale q_i - 2 bias k_j)
Gradients attend_backward(const Kernel& kernel, const Problem& p, const Matrix& dout);

Matrix kept_rows(const Matrix& x, std::span<const std::uint8_t> keep);

/// Means of m consecutive segments: m - n mod m of floor(n / m) rows, then the longer ones.
Matrix segment_means(const Matrix& x, Index m);

/// Z <- Z (13 I - AZ (15 I - AZ (7 I - AZ))) / 4 from A^T / (|A|_1 |A|_inf).
Matrix iterated_inverse(const Matrix& a, int iterations);

/// F (Z (B v)) with m segment means of the kept queries and of the kept keys, for fewer of them than kept rows.
Matrix nystrom(const Kernel& kernel, const Problem& p, Index m, int iterations);

/// m rows spread evenly over n: floor((2 j + 1) n / (2 m)).
std::vector<Index> strided_rows(Index n, Index m);

/// Whether key j takes part: a key bias of -infinity removes it as a mask does.
bool key_kept(const Problem& p, Index j);

/// min(m / 2, kept queries) rows of q above min(the rest of m, kept keys) rows of k, evenly spread over the kept ones.
Matrix strided_landmarks(const Problem& p, Index m);

/// (A + gamma I)^-1.
Matrix ridge_inverse(const Matrix& a, double gamma);

/// P = D^-1/2 (A + gamma I) D^-1/2, D = diag((A + gamma I) 1);  Z <- Z (13 I - PZ (15 I - PZ (7 I - PZ))) / 4 from P^T
/// / |P|_1; D^-1/2 Z D^-1/2.
Matrix preconditioned_pinv(const Matrix& a, double gamma, int iterations);

/// F (Z (B v)) with F = kappa(q, L), B = kappa(L, k) over the kept keys, Z = inverse(kappa(L, L)). Normalized rows are
/// divided by F (Z (B 1)), which is kept above 1e-6 of the sum of its terms' magnitudes.
Matrix skyformer(const Kernel& kernel, const Problem& p, const Matrix& landmarks,
                 const std::function<Matrix(const Matrix&)>& inverse);

/// (A~ v) / (A~ 1) for A = exp(scale q k^T): a normalised Gaussian lift whose keys weigh exp(scale |k|^2 / 2).
Matrix lifted_softmax(double scale, Problem p, const Matrix& landmarks, double gamma);

/// Rows of x in so many parts: a node of w rows and p parts is cut into floor(w floor(p / 2) / p) rows and the others,
/// by their order along the principal direction of all its rows, which points to where the coordinate of largest
/// variance grows. Ascending in each part; parts are at most the rows.
std::vector<std::vector<Index>> bisect(const Matrix& x, Index parts, const std::vector<Index>& rows);

/// What multipole attention decides before it computes: clusters of keys, of which each branch has some that are
/// neighbours, and blocks of queries that share their near clusters, each a part of a group, at whose mean the clusters
/// of open branches are summed up, and so of a region, at whose mean the other branches are. Without branches all
/// clusters are open.
struct Fields {
  struct Block {
    std::vector<Index> queries, group, near, region{}, open{};
  };
  std::vector<std::vector<Index>> clusters;
  std::vector<Block> blocks;
  Index clusters_in_a_branch = 1;
  bool all_open = true;
};

/// What a query l knows of a cluster c: k_c = sum r_j k_j, v_c = sum r_j v_j with r_j = softmax_{j in c}(s l.k_j +
/// a_j), and e_c = log sum_{j in c} exp(s l.k_j + a_j) - s l.k_c. a_j = key_bias_j - bias |k_j|^2.
struct Summary {
  Vector key, value;
  double bias;
};
Summary summarize(const Kernel& kernel, const Problem& p, const std::vector<Index>& cluster, const Vector& landmark);

/// The mean of the queries whose entries are all finite.
Vector landmark_of(const Problem& p, const std::vector<Index>& group);

/// For every cluster the root of the summed squares of the weights that the block's queries give to its summary, times
/// the spread of its keys' scores about the landmark's, times the spread of its values: what the summary may err by.
/// near is not read.
Vector error_terms(const Kernel& kernel, const Problem& p, const Fields& fields, const Fields::Block& block);

/// out(q) = sum_{c far} exp(s q.k_c + e_c) v_c + sum_{j near} exp(s q.k_j + a_j) v_j, divided by the same sums without
/// v if normalized, else times exp(-bias |q|^2). Zeros for queries of no block.
Matrix multipole(const Kernel& kernel, const Problem& p, const Fields& fields);

/// All singular values, in descending order.
Vector singular_values(const Matrix& a);

/// All eigenvalues of a symmetric matrix, in ascending order.
Vector eigenvalues(const Matrix& a);

Matrix pseudo_inverse(const Matrix& a);

/// The x of the smallest |a x - b|.
Vector least_squares(const Matrix& a, const Vector& b);

Index rank(const Matrix& a);

/// An orthogonal matrix: the eigenvectors of a + a^T, where a is square.
Matrix orthogonal(const Matrix& a);

}  // namespace reference
