/// Which keys a query sees under a causal mask.
#pragma once

#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>

namespace attn::detail {

/// n without the rows at the end that a mask drops.
inline Index length_kept(Index n, std::span<const std::uint8_t> keep) {
  while (n > 0 && !keep.empty() && keep[static_cast<std::size_t>(n - 1)] == 0) --n;
  return n;
}

/// Query i sees the keys of rows up to of(i), which without a causal mask is beyond all. lower_right counts from the
/// last query and the last key that the masks keep, so that padding behind them changes nothing; in front of them it
/// moves both by what it adds.
struct CausalLimits {
  static constexpr Index kNone = std::numeric_limits<Index>::max();

  bool causal = false;
  Index offset = 0;

  template <class In>
  static CausalLimits of_inputs(const In& in) {
    const Mask& mask = in.mask;
    if (mask.causal != Causal::lower_right) return {mask.causal != Causal::none, 0};
    return {true, length_kept(in.k.rows(), mask.keep_key) - length_kept(in.q.rows(), mask.keep_query)};
  }

  Index of(Index query) const { return causal ? query + offset : kNone; }

  /// How many of n keys every query sees.
  Index seen_by_all(Index n) const { return causal ? std::clamp<Index>(of(0) + 1, 0, n) : n; }
};

}  // namespace attn::detail
