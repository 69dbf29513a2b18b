/// One streamed product: what is multiplied, the kernel in units of log2, and how the work is cut.
#pragma once

#include <attn/detail/key_tiles.hpp>
#include <attn/detail/partition.hpp>
#include <attn/detail/row_states.hpp>
#include <attn/detail/strip.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <limits>
#include <numbers>

namespace attn::detail {

/// in must outlive it. bounded: no weight is above 1. causal_offset: of the causal mask, where there is one.
template <class T>
struct Product {
  const Sources<T>& in;
  KeySpace<T> space;
  Rows rows;
  bool bounded;
  Maximum maximum;
  Partition partition;
  Index causal_offset = 0;

  /// The largest row number of the keys that query i may see.
  [[gnu::noinline]] Index limit(Index i) const {
    return in.mask.causal == Causal::none ? StripKernel<T>::kNoLimit : i + causal_offset;
  }

  /// log2 of the factor between sums of weights relative to a maximum and those of kappa. query_bias: -bias |q|^2, what log2 kappa
  /// has beyond the score.
  [[gnu::noinline]] T absolute_maximum(T relative, T sum, T query_bias) const {
    if (maximum == Maximum::fixed) return 0;
    if (sum == 0) return kNoMaximum<T>;
    const T absolute = relative + query_bias + std::numbers::log2e_v<T> * space.bias_origin;
    return bounded && rows == Rows::raw ? std::min(absolute, T(0)) : absolute;
  }

  /// What the weighted sums of so many queries, a multiple of kLanes, are multiplied by at the end.
  [[gnu::noinline]] void set_factors(const T* relative, const T* sum, const T* query_bias, Index lanes, T* factor) const {
    for (Index p = 0; p < lanes; p += kLanes<T>) {
      if (rows == Rows::normalized) {  // a row without keys has sum 0 and weighted 0, and stays 0
        store(factor + p, broadcast(T(1)) / max(load(sum + p), broadcast(std::numeric_limits<T>::min())));
      } else {
        for (Index i = p; i < p + kLanes<T>; ++i)
          factor[i] = row_factor(rows, absolute_maximum(relative[i], sum[i], query_bias[i]), sum[i]);
      }
    }
  }

  /// log sum_j kappa_ij of a query; -infinity where it is dropped.
  [[gnu::noinline]] T log_sum(bool keeps, T relative, T sum, T query_bias) const {
    return keeps ? row_log_sum(absolute_maximum(relative, sum, query_bias), sum) : -std::numeric_limits<T>::infinity();
  }
};

}  // namespace attn::detail
