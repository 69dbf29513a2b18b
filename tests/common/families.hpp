/// Seeded families of tokens, the same on every platform, on which methods are tested and compared.
#pragma once

#include <attn/matrix.hpp>

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

  Matrix<double> normal(Index rows, Index cols);

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

/// q and k of a family, drawn after v.
std::pair<Matrix<double>, Matrix<double>> queries_and_keys(Random& random, Family family, const Shape& s);

/// q, k of a family; v i.i.d. N(0, 1).
template <class T>
Tokens<T> make_tokens(Family family, const Shape& s, std::uint64_t seed = 1) {
  Random random(seed);
  const Matrix<double> v = random.normal(s.n_k, s.d_v);
  const auto [q, k] = queries_and_keys(random, family, s);
  return {q.cast<T>(), k.cast<T>(), v.cast<T>()};
}

}  // namespace families
