/// Row states: what is known of a row of weights after some of its keys, and how two such states make one.
#pragma once

#include <attn/detail/checks.hpp>
#include <attn/detail/exp2.hpp>
#include <attn/detail/strip.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <cmath>
#include <numbers>
#include <span>
#include <string_view>
#include <utility>

namespace attn {

/// States of n_q rows after some keys. With kappa_ij the kernel's entries (key bias included),
///   sum_i = sum_j kappa_ij 2^-maximum_i     weighted_i = sum_j kappa_ij 2^-maximum_i v_j
/// maximum (n_q), sum (n_q), weighted (n_q, d_v); a row that has seen no key has sum 0. States of disjoint sets of keys merge.
template <class T>
struct RowStates {
  std::span<T> maximum, sum;
  MatrixRef<T> weighted;
};

namespace detail {

/// What a row of weights is multiplied by at the end: 1 over its sum, or for raw rows 2^maximum. A row without keys becomes 0.
template <class T>
inline T row_factor(Rows rows, T maximum, T sum) {
  if (rows == Rows::raw) return maximum == 0 ? T(1) : std::exp2(maximum);
  return sum == 0 ? T(0) : 1 / sum;
}

/// log sum_j kappa_ij, -infinity for a row without keys.
template <class T>
inline T row_log_sum(T maximum, T sum) {
  return std::numbers::ln2_v<T> * (maximum + std::log2(sum));
}

/// total <- total and recent together, for lanes whose weighted has d_v rows.
template <class T>
inline void merge_lanes(const LaneState<T>& total, const LaneState<T>& recent, Index lanes, Index d_v) {
  for (Index p = 0; p < lanes; p += kLanes<T>) {
    const auto a = load(total.maximum + p), b = load(recent.maximum + p), top = max(a, b);
    const auto keep = exp2_bounded(a - top), add = exp2_bounded(b - top);
    store(total.maximum + p, top);
    store(total.sum + p, multiply_add(load(recent.sum + p), add, load(total.sum + p) * keep));
    for (Index c = 0; c < d_v; ++c) {
      T* to = total.weighted + c * lanes + p;
      store(to, multiply_add(load(recent.weighted + c * lanes + p), add, load(to) * keep));
    }
  }
}

/// states have the lengths and the shape of results of rows x cols.
template <class T>
void check_states(std::string_view who, const RowStates<T>& states, Index rows, Index cols) {
  check_shape(who, "weighted", states.weighted, rows, cols);
  for (const auto& [name, values] : {std::pair{"maximum", states.maximum}, std::pair{"sum", states.sum}}) {
    const auto entries = static_cast<Index>(values.size());
    if (entries != rows) refuse(who, "%s has %td entries, weighted has %td rows", name, entries, rows);
  }
}

}  // namespace detail
}  // namespace attn
