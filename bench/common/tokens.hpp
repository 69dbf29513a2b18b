/// Tokens to measure on: the families that the tests use, with room for the output.
#pragma once

#include "common/families.hpp"

#include <attn/matrix.hpp>

#include <map>
#include <tuple>
#include <utility>

namespace bench {

using families::Family;

/// q, k, v and the output of one head, all (n, d).
template <class T>
struct Tokens {
  attn::Matrix<T> q, k, v, out;

  attn::Inputs<T> inputs(attn::Causal causal = attn::Causal::none) const {
    return {.q = q, .k = k, .v = v, .mask = {.causal = causal}};
  }
};

/// n tokens of a family, seeded: Family::unit for what depends little on the values, Family::smooth for landmarks.
template <class T>
Tokens<T> make_tokens(Family family, attn::Index n, attn::Index d) {
  families::Tokens<T> drawn = families::make_tokens<T>(family, {.n_q = n, .n_k = n, .d = d, .d_v = d});
  return {std::move(drawn.q), std::move(drawn.k), std::move(drawn.v), attn::Matrix<T>::Zero(n, d)};
}

/// The same, drawn once for a whole program: Google Benchmark enters each benchmark several times.
template <class T>
Tokens<T>& kept_tokens(Family family, attn::Index n, attn::Index d) {
  static std::map<std::tuple<Family, attn::Index, attn::Index>, Tokens<T>> kept;
  const auto [place, is_new] = kept.try_emplace({family, n, d});
  if (is_new) place->second = make_tokens<T>(family, n, d);
  return place->second;
}

}  // namespace bench
