/// What key biases are counted from. A large bias would take the digits of the scores that it is added to, so biases
/// are counted from the largest one that a query sees: what is far below that has no weight.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/causal.hpp>
#include <attn/engine/float_bits.hpp>
#include <attn/engine/kept_rows.hpp>
#include <attn/engine/token_rows.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <limits>

namespace attn::detail {

/// The largest finite bias so far.
template <class T>
struct LargestBias {
  T value = -std::numeric_limits<T>::infinity();

  void add(T bias) {
    if (is_finite(bias)) value = std::max(value, bias);
  }

  /// What to count from: 0 where no bias is finite.
  T origin() const { return is_finite(value) ? value : T(0); }
};

template <class T>
T largest_origin(const T* bias, Index count) {
  LargestBias<T> largest;
  for (Index j = 0; j < count; ++j) largest.add(bias[j]);
  return largest.origin();
}

/// The largest finite bias that each query sees, 0 for one that sees none: of_queries (n_q) under a causal mask, else
/// null, and all have the common one.
template <class T>
struct BiasOrigins {
  T common = 0;
  const T* of_queries = nullptr;

  T of(Index query) const { return of_queries == nullptr ? common : of_queries[query]; }

  static BiasOrigins of_inputs(const Sources<T>& in, Scratch& scratch) {
    if (in.key_bias.empty()) return {};
    LargestBias<T> largest;
    Index seen = 0;
    const auto see_up_to = [&](Index limit) {
      for (; seen < in.k.rows() && seen <= limit; ++seen) {
        if (keeps_key(in, seen)) largest.add(in.key_bias.data()[seen]);
      }
      return largest.origin();
    };
    if (in.mask.causal == Causal::none) return {see_up_to(CausalLimits::kNone), nullptr};
    const CausalLimits limits = CausalLimits::of_inputs(in);
    T* const origins = scratch.elements<T>(in.q.rows());
    for (Index i = 0; i < in.q.rows(); ++i) origins[i] = see_up_to(limits.of(i));
    return {T(0), origins};
  }
};

}  // namespace attn::detail
