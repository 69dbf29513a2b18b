/// Seeded families of tokens, the same on every platform, on which methods are tested and compared.
#pragma once

#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <random>
#include <utility>

namespace families {

using attn::Index;
using attn::Matrix;

/// Random numbers that do not depend on the standard library's distributions.
class Random {
 public:
  explicit Random(std::uint64_t seed) : generator_(seed) {}

  /// Uniform in (0, 1).
  double uniform() { return (static_cast<double>(generator_() >> 12) + 0.5) * 0x1p-52; }
  /// Uniform in [0, n).
  Index below(Index n) { return static_cast<Index>(generator_() % static_cast<std::uint64_t>(n)); }
  /// Standard normal, by Box and Muller.
  double normal() { return std::sqrt(-2 * std::log(uniform())) * std::cos(2 * std::numbers::pi * uniform()); }

  Matrix<double> normal(Index rows, Index cols) {
    Matrix<double> m(rows, cols);
    for (Index i = 0; i < m.size(); ++i) m.data()[i] = normal();
    return m;
  }

 private:
  std::mt19937_64 generator_;
};

/// What q (n_q, d) and k (n_k, d) are made of; N is a matrix of independent N(0, 1) draws, a new one wherever it is
/// written.
///   unit      q = N, k = N
///   init      q = .55 N, k = .55 N: a freshly initialised transformer
///   smooth    q = X W_q + .1 N, k = X W_k + .1 N: peaked and of low rank. X (n, 8) are slow processes, x_0 = N and
///             x_t = .99 x_(t-1) + sqrt(1 - .99^2) N; W = (W_0 + .5 N) / sqrt(8) with W_0 = N (8, d) shared by q and k
///   self      q = k = N, as far as both go: tokens attend mostly to themselves
///   clusters  rows c + .4 N, each c drawn anew from 32 centres 1.2 N (32, d) that q and k share
enum class Family { unit, init, smooth, self, clusters };

inline constexpr Family kFamilies[] = {Family::unit, Family::init, Family::smooth, Family::self, Family::clusters};

struct Shape {
  Index n_q, n_k, d, d_v;
};

template <class T>
struct Tokens {
  Matrix<T> q, k, v;
};

namespace detail {

inline Matrix<double> clustered(Random& random, const Matrix<double>& centres, Index n) {
  Matrix<double> x = 0.4 * random.normal(n, centres.cols());
  for (Index i = 0; i < n; ++i) x.row(i) += centres.row(random.below(centres.rows()));
  return x;
}

/// (n, processes): x_t = rho x_(t-1) + sqrt(1 - rho^2) e_t.
inline Matrix<double> slow_processes(Random& random, Index n, Index processes) {
  constexpr double kRho = 0.99;
  Matrix<double> x = random.normal(n, processes);
  for (Index t = 1; t < n; ++t) x.row(t) = kRho * x.row(t - 1) + std::sqrt(1 - kRho * kRho) * x.row(t);
  return x;
}

inline std::pair<Matrix<double>, Matrix<double>> smooth(Random& random, const Shape& s) {
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

inline std::pair<Matrix<double>, Matrix<double>> queries_and_keys(Random& random, Family family, const Shape& s) {
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

}  // namespace detail

/// q, k of a family; v i.i.d. N(0, 1).
template <class T>
Tokens<T> make_tokens(Family family, const Shape& s, std::uint64_t seed = 1) {
  Random random(seed);
  const Matrix<double> v = random.normal(s.n_k, s.d_v);
  const auto [q, k] = detail::queries_and_keys(random, family, s);
  return {q.cast<T>(), k.cast<T>(), v.cast<T>()};
}

}  // namespace families
