#include "common/families.hpp"

#include <algorithm>
#include <cmath>

namespace families {
namespace {

Matrix<double> clustered(Random& random, const Matrix<double>& centres, Index n) {
  Matrix<double> x = 0.4 * random.normal(n, centres.cols());
  for (Index i = 0; i < n; ++i) x.row(i) += centres.row(random.below(centres.rows()));
  return x;
}

/// (n, processes): x_t = rho x_(t-1) + sqrt(1 - rho^2) e_t.
Matrix<double> slow_processes(Random& random, Index n, Index processes) {
  constexpr double kRho = 0.99;
  Matrix<double> x = random.normal(n, processes);
  for (Index t = 1; t < n; ++t) x.row(t) = kRho * x.row(t - 1) + std::sqrt(1 - kRho * kRho) * x.row(t);
  return x;
}

std::pair<Matrix<double>, Matrix<double>> smooth(Random& random, const Shape& s) {
  constexpr Index kProcesses = 8;
  const Matrix<double> latent = slow_processes(random, std::max(s.n_q, s.n_k), kProcesses);
  const Matrix<double> base = random.normal(kProcesses, s.d);
  const auto project = [&](Index n) -> Matrix<double> {
    const Matrix<double> w = (base + 0.5 * random.normal(kProcesses, s.d)) / std::sqrt(static_cast<double>(kProcesses));
    return latent.topRows(n) * w + 0.1 * random.normal(n, s.d);
  };
  Matrix<double> q = project(s.n_q);
  return {std::move(q), project(s.n_k)};
}

}  // namespace

Matrix<double> Random::normal(Index rows, Index cols) {
  Matrix<double> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = normal();
  return m;
}

std::pair<Matrix<double>, Matrix<double>> queries_and_keys(Random& random, Family family, const Shape& s) {
  if (family == Family::smooth) return smooth(random, s);
  if (family == Family::clusters) {
    const Matrix<double> centres = 1.2 * random.normal(32, s.d);
    Matrix<double> q = clustered(random, centres, s.n_q);
    return {std::move(q), clustered(random, centres, s.n_k)};
  }
  const double deviation = family == Family::init ? 0.55 : 1.0;
  const Matrix<double> x = deviation * random.normal(s.n_q + s.n_k, s.d);
  return {x.topRows(s.n_q), family == Family::self ? x.topRows(s.n_k) : x.bottomRows(s.n_k)};
}

}  // namespace families
