#include "common/reference.hpp"

#include <Eigen/Eigenvalues>
#include <Eigen/LU>

#include <algorithm>
#include <limits>

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
      if (!visible(p.mask, s.rows(), s.cols(), i, j)) s(i, j) = -kInfinity;
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
