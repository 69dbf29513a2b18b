#include "common/reference.hpp"

#include <Eigen/Eigenvalues>
#include <Eigen/LU>

#include <algorithm>
#include <limits>
#include <utility>

namespace reference {
namespace {

/// All decompositions are this one, since each takes the compiler long.
using Spectrum = Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>;

/// (0 A; A^T 0), whose eigenvalues are A's singular values, with either sign, and zeros. The eigenvectors to the
/// positive ones are A's left singular vectors above its right ones, divided by sqrt(2).
Matrix symmetric_of(const Matrix& a) {
  Matrix s = Matrix::Zero(a.rows() + a.cols(), a.rows() + a.cols());
  s.topRightCorner(a.rows(), a.cols()) = a;
  s.bottomLeftCorner(a.cols(), a.rows()) = a.transpose();
  return s;
}

/// z (13 - a z (15 - a z (7 - a z))) / 4
Matrix next_inverse(const Matrix& a, const Matrix& z) {
  const Matrix eye = Matrix::Identity(a.rows(), a.cols()), az = a * z;
  return z * (13 * eye - az * (15 * eye - az * (7 * eye - az))) / 4;
}

/// How many are above what rounding leaves of zeros. In ascending order.
Index count_positive(const Vector& values) {
  constexpr double kEpsilon = std::numeric_limits<double>::epsilon();
  return (values.array() > kEpsilon * static_cast<double>(values.size()) * values.cwiseAbs().maxCoeff()).count();
}

/// s x.k_j + a_j, the logarithm of kappa(x, k_j) but for what depends on x alone.
double key_score(const Kernel& kernel, const Problem& p, const Vector& x, Index j) {
  const double key_bias = p.key_bias.size() > 0 ? p.key_bias[j] : 0;
  return kernel.scale * p.k.row(j).dot(x) - kernel.bias * p.k.row(j).squaredNorm() + key_bias;
}

}  // namespace

Matrix log_kernel(const Kernel& kernel, const Matrix& q, const Matrix& k) {
  Matrix s = Matrix::Zero(q.rows(), k.rows());
  if (kernel.scale != 2 * kernel.bias) s = (kernel.scale - 2 * kernel.bias) * (q * k.transpose());
  if (kernel.bias != 0) {
    for (Index i = 0; i < q.rows(); ++i)
      s.row(i) -= kernel.bias * (k.rowwise() - q.row(i)).rowwise().squaredNorm().transpose();
  }
  return s;
}

Vector bias_origins(const Problem& p) {
  Vector origins = Vector::Zero(p.q.rows());
  for (Index i = 0; i < origins.size() && p.key_bias.size() > 0; ++i) {
    double largest = -kInfinity;
    for (Index j = 0; j < p.k.rows(); ++j) {
      if (visible(p.mask, p.q.rows(), p.k.rows(), i, j) && std::isfinite(p.key_bias[j]))
        largest = std::max(largest, p.key_bias[j]);
    }
    if (std::isfinite(largest)) origins[i] = largest;
  }
  return origins;
}

Matrix log_weights(const Kernel& kernel, const Problem& p, const Vector& origins) {
  Matrix s = log_kernel(kernel, p.q, p.k);
  for (Index i = 0; i < s.rows() && p.key_bias.size() > 0; ++i) {
    for (Index j = 0; j < s.cols(); ++j) s(i, j) += p.key_bias[j] - (origins.size() > 0 ? origins[i] : 0);
  }
  for (Index i = 0; i < s.rows(); ++i) {
    for (Index j = 0; j < s.cols(); ++j) {
      if (!visible(p.mask, s.rows(), s.cols(), i, j)) {
        s(i, j) = -kInfinity;
      } else if (p.alibi_slope != 0) {
        s(i, j) -= p.alibi_slope * static_cast<double>(rows_ahead(p.mask, s.rows(), s.cols(), i, j));
      }
    }
  }
  return s;
}

Result attend(const Kernel& kernel, const Problem& p) {
  const Vector origins = bias_origins(p);
  const Matrix s = log_weights(kernel, p, origins);
  Result result{Matrix::Zero(p.q.rows(), p.v.cols()), Vector::Constant(p.q.rows(), -kInfinity)};
  for (Index i = 0; i < s.rows(); ++i) {
    const double top = s.row(i).maxCoeff();
    if (top == -kInfinity) continue;
    double sum = 0;
    for (Index j = 0; j < s.cols(); ++j) {
      if (s(i, j) == -kInfinity) continue;
      const double w = std::exp(s(i, j) - top);
      sum += w;
      result.out.row(i) += w * p.v.row(j);
    }
    result.out.row(i) *= kernel.normalized ? 1 / sum : std::exp(top + origins[i]);
    result.lse[i] = top + std::log(sum) + origins[i];
  }
  return result;
}

Gradients attend_backward(const Kernel& kernel, const Problem& p, const Matrix& dout) {
  const Vector origins = bias_origins(p);
  const Matrix s = log_weights(kernel, p, origins);
  const auto zeros = [](const Matrix& m) -> Matrix { return Matrix::Zero(m.rows(), m.cols()); };
  Gradients g{zeros(p.q), zeros(p.k), zeros(p.v), Vector::Zero(p.k.rows())};
  for (Index i = 0; i < s.rows(); ++i) {
    Vector weights = Vector::Zero(s.cols()), slopes = Vector::Zero(s.cols());
    const double top = kernel.normalized ? s.row(i).maxCoeff() : -origins[i];
    for (Index j = 0; j < s.cols(); ++j) {
      if (s(i, j) == -kInfinity) continue;
      weights[j] = std::exp(s(i, j) - top);
      slopes[j] = dout.row(i).dot(p.v.row(j));
    }
    if (kernel.normalized && top != -kInfinity) weights /= weights.sum();
    const double origin = kernel.normalized ? weights.dot(slopes) : 0;
    for (Index j = 0; j < s.cols(); ++j) {
      if (s(i, j) == -kInfinity) continue;
      const double slope = weights[j] * (slopes[j] - origin);
      g.dv.row(j) += weights[j] * dout.row(i);
      g.dq.row(i) += slope * (kernel.scale * p.k.row(j) - 2 * kernel.bias * p.q.row(i));
      g.dk.row(j) += slope * (kernel.scale * p.q.row(i) - 2 * kernel.bias * p.k.row(j));
      g.dbias[j] += slope;
    }
  }
  return g;
}

Matrix kept_rows(const Matrix& x, std::span<const std::uint8_t> keep) {
  std::vector<Index> rows;
  for (Index i = 0; i < x.rows(); ++i) {
    if (kept(keep, i)) rows.push_back(i);
  }
  return x(rows, Eigen::indexing::all);
}

Matrix segment_means(const Matrix& x, Index m) {
  Matrix means(m, x.cols());
  Index first = 0;
  for (Index j = 0; j < m; ++j) {
    const Index length = x.rows() / m + (j < m - x.rows() % m ? 0 : 1);
    means.row(j) = x.middleRows(first, length).colwise().mean();
    first += length;
  }
  return means;
}

Matrix iterated_inverse(const Matrix& a, int iterations) {
  Matrix z = a.transpose() / (a.cwiseAbs().colwise().sum().maxCoeff() * a.cwiseAbs().rowwise().sum().maxCoeff());
  for (int i = 0; i < iterations; ++i) z = next_inverse(a, z);
  return z;
}

Matrix nystrom(const Kernel& kernel, const Problem& p, Index m, int iterations) {
  const Matrix q_land = segment_means(kept_rows(p.q, p.mask.keep_query), m);
  const Matrix k_land = segment_means(kept_rows(p.k, p.mask.keep_key), m);
  const Matrix bv = attend(kernel, {q_land, p.k, p.v, {.keep_key = p.mask.keep_key}}).out;
  const Matrix a = attend(kernel, {q_land, k_land, Matrix::Identity(m, m)}).out;
  return attend(kernel, {p.q, k_land, iterated_inverse(a, iterations) * bv, {.keep_query = p.mask.keep_query}}).out;
}

std::vector<Index> strided_rows(Index n, Index m) {
  std::vector<Index> rows;
  for (Index j = 0; j < m; ++j) rows.push_back((2 * j + 1) * n / (2 * m));
  return rows;
}

bool key_kept(const Problem& p, Index j) {
  return kept(p.mask.keep_key, j) && (p.key_bias.size() == 0 || p.key_bias[j] != -kInfinity);
}

Matrix strided_landmarks(const Problem& p, Index m) {
  std::vector<Index> of_q, of_k;
  for (Index i = 0; i < p.q.rows(); ++i) {
    if (kept(p.mask.keep_query, i)) of_q.push_back(i);
  }
  for (Index j = 0; j < p.k.rows(); ++j) {
    if (key_kept(p, j)) of_k.push_back(j);
  }
  const auto n_q = static_cast<Index>(of_q.size()), n_k = static_cast<Index>(of_k.size());
  const Index m_q = std::min(m / 2, n_q), m_k = std::min(m - m_q, n_k);
  Matrix landmarks(m_q + m_k, p.q.cols());
  Index row = 0;
  for (const Index rank : strided_rows(n_q, m_q)) landmarks.row(row++) = p.q.row(of_q[static_cast<std::size_t>(rank)]);
  for (const Index rank : strided_rows(n_k, m_k)) landmarks.row(row++) = p.k.row(of_k[static_cast<std::size_t>(rank)]);
  return landmarks;
}

Matrix ridge_inverse(const Matrix& a, double gamma) {
  return (a + gamma * Matrix::Identity(a.rows(), a.cols())).inverse();
}

Matrix preconditioned_pinv(const Matrix& a, double gamma, int iterations) {
  const Matrix w = a + gamma * Matrix::Identity(a.rows(), a.cols());
  const Vector r = w.rowwise().sum().cwiseSqrt().cwiseInverse();
  const Matrix p = r.asDiagonal() * w * r.asDiagonal();
  Matrix z = p.transpose() / p.cwiseAbs().colwise().sum().maxCoeff();
  for (int i = 0; i < iterations; ++i) z = next_inverse(p, z);
  return r.asDiagonal() * z * r.asDiagonal();
}

Matrix skyformer(const Kernel& kernel, const Problem& p, const Matrix& landmarks,
                 const std::function<Matrix(const Matrix&)>& inverse) {
  if (landmarks.rows() == 0) return Matrix::Zero(p.q.rows(), p.v.cols());  // nothing is kept
  Problem from_landmarks{landmarks, p.k, p.v, {.keep_key = p.mask.keep_key}, p.key_bias};
  const Matrix b = log_weights(kernel, from_landmarks).unaryExpr([](double x) {
    return std::exp(x);
  });  // 0 at -infinity, unlike Eigen's
  const Matrix f = log_kernel(kernel, p.q, landmarks).array().exp();
  const Matrix z = inverse(Matrix(log_kernel(kernel, landmarks, landmarks).array().exp()));
  Matrix bv = Matrix::Zero(b.rows(), p.v.cols());
  for (Index j = 0; j < p.k.rows(); ++j) {
    if (key_kept(p, j)) bv += b.col(j) * p.v.row(j);
  }
  Matrix out = f * (z * bv);
  if (kernel.normalized) {
    const Vector total = z * b.rowwise().sum();
    const Vector divisor = (f * total).cwiseMax(1e-6 * (f * total.cwiseAbs()));
    for (Index i = 0; i < out.rows(); ++i)
      out.row(i) *= divisor[i] == 0 ? 0 : 1 / divisor[i];  // 0 where no key is kept
  }
  for (Index i = 0; i < out.rows(); ++i) {
    if (!kept(p.mask.keep_query, i)) out.row(i).setZero();
  }
  return out;
}

Matrix lifted_softmax(double scale, Problem p, const Matrix& landmarks, double gamma) {
  if (p.key_bias.size() == 0) p.key_bias = Vector::Zero(p.k.rows());
  p.key_bias += scale / 2 * p.k.rowwise().squaredNorm();
  p.key_bias.array() -= p.key_bias.maxCoeff();
  return skyformer({scale, scale / 2, true}, p, landmarks, [&](const Matrix& a) { return ridge_inverse(a, gamma); });
}

std::vector<std::vector<Index>> bisect(const Matrix& x, Index parts, const std::vector<Index>& rows) {
  if (parts <= 1) return {rows};
  const Matrix some = x(rows, Eigen::indexing::all);
  const Matrix centered = some.rowwise() - some.colwise().mean();
  Index widest = 0;
  centered.colwise().squaredNorm().maxCoeff(&widest);
  Vector direction = Spectrum(centered.transpose() * centered).eigenvectors().rightCols(1);
  if (direction[widest] < 0) direction = -direction;
  std::vector<Index> order = rows, second;
  std::stable_sort(order.begin(), order.end(),
                   [&](Index a, Index b) { return x.row(a).dot(direction) < x.row(b).dot(direction); });
  const auto cut = order.begin() + static_cast<Index>(rows.size()) * (parts / 2) / parts;
  second.assign(cut, order.end());
  order.erase(cut, order.end());
  std::sort(order.begin(), order.end());
  std::sort(second.begin(), second.end());
  auto all = bisect(x, parts / 2, order);
  for (const auto& part : bisect(x, parts - parts / 2, second)) all.push_back(part);
  return all;
}

Summary summarize(const Kernel& kernel, const Problem& p, const std::vector<Index>& cluster, const Vector& landmark) {
  Vector scores(cluster.size());
  for (Index i = 0; i < scores.size(); ++i)
    scores[i] = key_score(kernel, p, landmark, cluster[static_cast<std::size_t>(i)]);
  const double top = scores.maxCoeff();
  const Vector weights = (scores.array() - top).exp();
  const Vector key = p.k(cluster, Eigen::indexing::all).transpose() * weights / weights.sum();
  const Vector value = p.v(cluster, Eigen::indexing::all).transpose() * weights / weights.sum();
  return {key, value, top + std::log(weights.sum()) - kernel.scale * landmark.dot(key)};
}

Vector landmark_of(const Problem& p, const std::vector<Index>& group) {
  Vector sum = Vector::Zero(p.q.cols());
  double count = 0;
  for (const Index i : group) {
    if (!p.q.row(i).allFinite()) continue;
    sum += p.q.row(i).transpose();
    ++count;
  }
  return sum / std::max(count, 1.0);
}

Vector error_terms(const Kernel& kernel, const Problem& p, const Fields& fields, const Fields::Block& block) {
  const Vector landmark = landmark_of(p, block.group);
  const auto n = static_cast<Index>(block.queries.size()), m = static_cast<Index>(fields.clusters.size());
  Matrix weights(n, m);
  Vector square = Vector::Zero(p.q.cols()), terms(m);
  for (Index c = 0; c < m; ++c) {
    const Summary summary = summarize(kernel, p, fields.clusters[static_cast<std::size_t>(c)], landmark);
    weights.col(c) = (kernel.scale * (p.q(block.queries, Eigen::indexing::all) * summary.key)).array() + summary.bias;
  }
  for (Index i = 0; i < n; ++i) {
    weights.row(i) = (weights.row(i).array() - weights.row(i).maxCoeff()).exp();
    weights.row(i) /= weights.row(i).sum();
    const Vector query = p.q.row(block.queries[static_cast<std::size_t>(i)]);
    square += (kernel.scale * (query - landmark)).cwiseAbs2();
  }
  for (Index c = 0; c < m; ++c) {
    const auto& cluster = fields.clusters[static_cast<std::size_t>(c)];
    const Matrix keys = p.k(cluster, Eigen::indexing::all), values = p.v(cluster, Eigen::indexing::all);
    const Vector variance = (keys.rowwise() - keys.colwise().mean()).cwiseAbs2().colwise().mean();
    const double spread = (values.rowwise() - values.colwise().mean()).rowwise().squaredNorm().mean();
    terms[c] = weights.col(c).norm() * std::sqrt(variance.dot(square) * spread);
  }
  return terms;
}

Matrix multipole(const Kernel& kernel, const Problem& p, const Fields& fields) {
  Matrix out = Matrix::Zero(p.q.rows(), p.v.cols());
  for (const Fields::Block& block : fields.blocks) {
    const auto has = [](const std::vector<Index>& all, std::size_t x) {
      return std::find(all.begin(), all.end(), static_cast<Index>(x)) != all.end();
    };
    const Vector of_group = landmark_of(p, block.group), of_region = landmark_of(p, block.region);
    const auto in_a_branch = static_cast<std::size_t>(fields.clusters_in_a_branch);
    std::vector<Summary> far;
    std::vector<Index> near;
    for (std::size_t c = 0; c < fields.clusters.size(); ++c) {
      const auto& cluster = fields.clusters[c];
      if (!fields.all_open && !has(block.open, c / in_a_branch)) {
        if (c % in_a_branch != 0) continue;
        std::vector<Index> branch;
        for (std::size_t i = c; i < c + in_a_branch; ++i)
          branch.insert(branch.end(), fields.clusters[i].begin(), fields.clusters[i].end());
        far.push_back(summarize(kernel, p, branch, of_region));
      } else if (has(block.near, c)) {
        near.insert(near.end(), cluster.begin(), cluster.end());
      } else {
        far.push_back(summarize(kernel, p, cluster, of_group));
      }
    }
    for (const Index i : block.queries) {
      const Vector query = p.q.row(i);
      std::vector<std::pair<double, Vector>> terms;  // a score, and what it weighs
      for (const Summary& c : far) terms.emplace_back(kernel.scale * query.dot(c.key) + c.bias, c.value);
      for (const Index j : near) terms.emplace_back(key_score(kernel, p, query, j), p.v.row(j));
      double top = -kInfinity, sum = 0;
      for (const auto& [score, value] : terms) top = std::max(top, score);
      for (const auto& [score, value] : terms) {
        sum += std::exp(score - top);
        out.row(i) += std::exp(score - top) * value;
      }
      out.row(i) *= kernel.normalized ? 1 / sum : std::exp(top - kernel.bias * query.squaredNorm());
    }
  }
  return out;
}

Vector eigenvalues(const Matrix& a) {
  return Spectrum(a, Eigen::EigenvaluesOnly).eigenvalues();
}

Vector singular_values(const Matrix& a) {
  return Spectrum(symmetric_of(a), Eigen::EigenvaluesOnly).eigenvalues().tail(std::min(a.rows(), a.cols())).reverse();
}

Matrix pseudo_inverse(const Matrix& a) {
  const Spectrum spectrum(symmetric_of(a));
  const Index r = count_positive(spectrum.eigenvalues());
  const Matrix vectors = spectrum.eigenvectors().rightCols(r);
  const Vector inverses = 2 * spectrum.eigenvalues().tail(r).cwiseInverse();
  return vectors.bottomRows(a.cols()) * inverses.asDiagonal() * vectors.topRows(a.rows()).transpose();
}

Vector least_squares(const Matrix& a, const Vector& b) {
  return pseudo_inverse(a) * b;
}

Index rank(const Matrix& a) {
  return count_positive(Spectrum(symmetric_of(a), Eigen::EigenvaluesOnly).eigenvalues());
}

Matrix orthogonal(const Matrix& a) {
  return Spectrum(a + a.transpose()).eigenvectors();
}

}  // namespace reference
