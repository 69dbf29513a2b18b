/// Where the diagonal of a causal mask lies.
#pragma once

#include <attn/detail/key_tiles.hpp>
#include <attn/mask.hpp>

namespace attn::detail {

/// n without the rows at the end that are dropped.
template <class Keeps>
Index length_kept(Index n, const Keeps& keeps) {
  while (n > 0 && !keeps(n - 1)) --n;
  return n;
}

/// What the causal mask adds to a query's number: query i sees keys j <= i + offset. lower_right counts from the last kept query and the
/// last kept key, so that padding behind them changes nothing; in front of them it moves both by what it adds.
template <class In>
Index causal_offset(const In& in) {
  if (in.mask.causal != Causal::lower_right) return 0;
  return length_kept(in.k.rows(), kept_keys(in)) - length_kept(in.q.rows(), kept_queries(in));
}

}  // namespace attn::detail
