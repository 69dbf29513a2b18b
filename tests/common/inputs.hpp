/// Seeded tokens and masks, the same on every platform.
#pragma once

#include "common/families.hpp"

#include <attn/matrix.hpp>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace test {

using attn::Index;
using attn::Matrix;
using families::Family;
using families::kFamilies;
using families::make_tokens;
using families::Random;
using families::Shape;
using families::Tokens;

/// The tokens with q and k times size.
template <class T>
Tokens<T> scaled(Tokens<T> x, double size) {
  x.q *= static_cast<T>(size);
  x.k *= static_cast<T>(size);
  return x;
}

/// Keeps each of n entries with the given probability; kept entries hold values other than 1 too.
inline std::vector<std::uint8_t> random_keep(Index n, double probability, std::uint64_t seed) {
  Random random(seed);
  std::vector<std::uint8_t> keep(static_cast<std::size_t>(n));
  for (auto& x : keep)
    x = random.uniform() < probability ? static_cast<std::uint8_t>(1 + random.below(255)) : std::uint8_t{0};
  return keep;
}

/// n log-weights from N(0, 1), each replaced by -infinity with the given probability.
template <class T>
std::vector<T> random_key_bias(Index n, double removed, std::uint64_t seed) {
  Random random(seed);
  std::vector<T> bias(static_cast<std::size_t>(n));
  for (auto& x : bias)
    x = random.uniform() < removed ? -std::numeric_limits<T>::infinity() : static_cast<T>(random.normal());
  return bias;
}

/// Tokens along smooth curves: a kernel of theirs is of far lower rank, but for rounding, than they are many. v i.i.d.
/// N(0, 1).
template <class T>
Tokens<T> curve_tokens(const Shape& s, std::uint64_t seed) {
  const Matrix<double> v = Random(seed).normal(s.n_k, s.d_v);
  const auto curve = [&](Index n, double frequency, double phase) {
    Matrix<T> x(n, s.d);
    for (Index i = 0; i < n; ++i) {
      const double t = 6 * static_cast<double>(i) / static_cast<double>(n);
      for (Index c = 0; c < s.d; ++c) {
        const auto number = static_cast<double>(c);
        x(i, c) = static_cast<T>(std::sin(t * (1 + frequency * number) + phase * number));
      }
    }
    return x;
  };
  return {curve(s.n_q, 0.5, 1), curve(s.n_k, 0.3, 0.7), v.cast<T>()};
}

}  // namespace test
