/// Seeded tokens to measure on.
#pragma once

#include <attn/matrix.hpp>

#include <cmath>
#include <cstdint>
#include <random>

namespace bench {

/// q, k, v and the output of one head, all (n, d).
template <class T>
struct Tokens {
  attn::Matrix<T> q, k, v, out;

  attn::Inputs<T> inputs(attn::Causal causal = attn::Causal::none) const {
    return {.q = q, .k = k, .v = v, .mask = {.causal = causal}};
  }
};

/// (rows, cols) independent draws from N(0, 1).
template <class T>
attn::Matrix<T> normal_matrix(attn::Index rows, attn::Index cols, std::mt19937_64& generator) {
  std::normal_distribution<double> normal;
  return attn::Matrix<T>::NullaryExpr(rows, cols, [&] { return static_cast<T>(normal(generator)); });
}

/// Independent N(0, 1) tokens: what exact attention takes does not depend on the values much.
template <class T>
Tokens<T> normal_tokens(attn::Index n, attn::Index d, std::uint64_t seed = 1) {
  std::mt19937_64 generator(seed);
  const auto draw = [&] { return normal_matrix<T>(n, d, generator); };
  return {.q = draw(), .k = draw(), .v = draw(), .out = attn::Matrix<T>::Zero(n, d)};
}

/// Tokens that follow 8 slow random walks (autoregressive, 0.99 a step), seen by q and k through projections that share
/// a part, and a little noise: weights are peaked and of low rank, so that landmarks can work. v is N(0, 1).
template <class T>
Tokens<T> smooth_tokens(attn::Index n, attn::Index d, std::uint64_t seed = 1) {
  constexpr attn::Index kWalks = 8;
  constexpr double kKept = 0.99;
  std::mt19937_64 generator(seed);
  const auto normal = [&](attn::Index rows, attn::Index cols) { return normal_matrix<double>(rows, cols, generator); };
  attn::Matrix<double> walks = normal(n, kWalks);
  for (attn::Index i = 1; i < n; ++i) walks.row(i) = kKept * walks.row(i - 1) + std::sqrt(1 - kKept * kKept) * walks.row(i);
  const attn::Matrix<double> shared = normal(kWalks, d);
  const auto observe = [&]() -> attn::Matrix<T> {
    const attn::Matrix<double> projection = (shared + 0.5 * normal(kWalks, d)) / std::sqrt(static_cast<double>(kWalks));
    return (walks * projection + 0.1 * normal(n, d)).template cast<T>();
  };
  return {.q = observe(), .k = observe(), .v = normal_matrix<T>(n, d, generator), .out = attn::Matrix<T>::Zero(n, d)};
}

}  // namespace bench
