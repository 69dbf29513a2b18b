/// Which keys a query sees under a causal mask.
#pragma once

#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <limits>

namespace attn::detail {

/// Query i sees the keys of rows up to of(i), which without a causal mask is beyond all.
struct CausalLimits {
  static constexpr Index kNone = std::numeric_limits<Index>::max();

  bool causal = false;
  Index offset = 0;

  template <class In>
  static CausalLimits of_inputs(const In& in) {
    return {in.mask.causal != Causal::none, in.mask.causal == Causal::lower_right ? in.k.rows() - in.q.rows() : 0};
  }

  Index of(Index query) const { return causal ? query + offset : kNone; }

  /// How many of n keys every query sees.
  Index seen_by_all(Index n) const { return causal ? std::clamp<Index>(of(0) + 1, 0, n) : n; }
};

}  // namespace attn::detail
