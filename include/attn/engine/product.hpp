/// One streamed product: what is multiplied, the kernel in units of log2, and how the work is cut.
#pragma once

#include <attn/engine/causal.hpp>
#include <attn/engine/far_pairs.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/partition.hpp>
#include <attn/engine/row_states.hpp>
#include <attn/engine/strip.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <limits>
#include <numbers>

namespace attn::detail {

/// The log of a row's sum of weights as the kernels count them, which keeps digits that log sum_j kappa_ij would lose:
/// relative to Product::origin, and to base, see far_pairs.hpp.
template <class T>
struct RowLog {
  T value, base;
};

/// Where log-sums of rows go, each null if it is not wanted: absolute, log sum_j kappa_ij, and relative.
template <class T>
struct LogSums {
  T* absolute = nullptr;
  RowLog<T>* relative = nullptr;
};

/// in must outlive it. bounded: the kernel is at most 1.
template <class T>
struct Product {
  const Sources<T>& in;
  KeySpace<T> space;
  CausalLimits limits;
  Rows rows;
  bool bounded;
  Maximum maximum;
  Partition partition;

  /// log2 of what a query's weights are multiplied by in kappa: they are relative to its origin. query_bias: -bias
  /// |q|^2, what log2 kappa has beyond the score, plus the base of that.
  double origin(Index query, T query_bias) const {
    return static_cast<double>(query_bias) + std::numbers::log2e * static_cast<double>(space.bias_origins.of(query));
  }

  /// What the weighted sums of so many queries, a multiple of kLanes, from the given one on, are multiplied by at the
  /// end.
  [[gnu::noinline]] void set_scales(Index query, const T* relative, const T* sum, const T* query_bias, Index lanes,
                                    RowScales<T>* scales) const {
    for (Index p = 0; p < lanes; p += kLanes<T>) {  // a row without keys has sum 0 and weighted 0, and stays 0
      const auto divisor = max(load(sum + p), broadcast(std::numeric_limits<T>::min()));
      store(scales->first + p, broadcast(T(1)) / (rows == Rows::normalized ? divisor : broadcast(T(1))));
    }
    if (rows == Rows::normalized || maximum == Maximum::fixed) return;
    for (Index i = 0; i < lanes && query + i < in.q.rows(); ++i) {
      scales->set(i, row_scale(rows, absolute_maximum(query + i, relative[i], query_bias[i]), sum[i]));
    }
  }

  /// Of a query, whose sum of weights is relative to a maximum.
  [[gnu::noinline]] void write_log_sums(const LogSums<T>& to, Index query, T relative, T sum, T query_bias,
                                        T base) const {
    const bool keeps = keeps_query(in, query);
    const T none = -std::numeric_limits<T>::infinity();
    if (to.relative != nullptr) to.relative[query] = {keeps ? row_log_sum(relative, sum) : none, base};
    if (to.absolute == nullptr) return;
    const double log_sum =
        row_log_sum(kernel_maximum(relative, static_cast<double>(query_bias)), static_cast<double>(sum));
    to.absolute[query] = keeps ? static_cast<T>(log_sum + static_cast<double>(space.bias_origins.of(query))) : none;
  }

  /// log2 of the largest weight of a row but for the origin of key biases: not above 0 where the kernel is at most 1,
  /// which rounding must not hide where squares are large. query_bias may be more precise than the kernels'.
  double kernel_maximum(T relative, double query_bias) const {
    const double maximum_so_far = static_cast<double>(relative) + query_bias;
    return bounded ? std::min(maximum_so_far, 0.0) : maximum_so_far;
  }

 private:
  double absolute_maximum(Index query, T relative, T query_bias) const {
    return kernel_maximum(relative, static_cast<double>(query_bias)) +
           std::numbers::log2e * static_cast<double>(space.bias_origins.of(query));
  }
};

}  // namespace attn::detail
