/// Row states: what is known of a row of weights after some of its keys, and how two such states make one.
#pragma once

#include <attn/engine/checks.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/strip.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

namespace attn {

namespace detail {

/// What a row of weights, relative to a maximum, is multiplied by at the end: first second. By itself 2^maximum may be
/// out of T's range where the result is not.
template <class T>
struct RowScale {
  T first, second = 1;
};

/// 1 over the sum of a row, or 2^maximum for a raw one. A row without keys, whose sum is 0, becomes 0.
template <class T>
RowScale<T> row_scale(Rows rows, std::type_identity_t<double> maximum, T sum) {
  constexpr double kMost = std::numeric_limits<T>::max_exponent - 2;
  if (sum == 0) return {0};
  if (rows == Rows::normalized) return {1 / sum};
  const double once = std::clamp(maximum, -kMost, kMost), again = std::clamp(maximum - once, -kMost, kMost);
  return {static_cast<T>(std::exp2(once)), static_cast<T>(std::exp2(again))};
}

/// Those of a strip.
template <class T>
struct RowScales {
  alignas(64) T first[extent(kTileWidth<T>)], second[extent(kTileWidth<T>)];
  bool twice = false;  ///< whether any second_i is not 1

  void set(Index i, const RowScale<T>& scale) {
    first[i] = scale.first;
    second[i] = scale.second;
    twice = twice || scale.second != 1;
  }
};

/// The maximum of two states together: a state of sum 0 has none.
template <class T>
T merged_maximum(T maximum, T sum, T other_maximum, T other_sum) {
  if (other_sum == 0) return maximum;
  return sum == 0 ? other_maximum : std::max(maximum, other_maximum);
}

/// What a state is multiplied by to be relative to another maximum.
template <class T>
T merge_factor(T maximum, T sum, T merged) {
  return sum == 0 ? T(0) : std::exp2(maximum - merged);
}

/// log of a sum relative to a maximum, -infinity for a row without keys.
template <class T>
inline T row_log_sum(T maximum, T sum) {
  return sum == 0 ? -std::numeric_limits<T>::infinity() : std::numbers::ln2_v<T> * (maximum + std::log2(sum));
}

/// Where one of two states has a base, both get it.
template <class T>
void align_bases(const LaneState<T>& a, const LaneState<T>& b, Index lanes) {
  for (Index i = 0; i < lanes; ++i) {
    const T base = std::max(a.base[i], b.base[i]);
    a.maximum[i] -= base - a.base[i];
    b.maximum[i] -= base - b.base[i];
    a.base[i] = b.base[i] = base;
  }
}

/// total <- total and recent together, for lanes whose weighted has d_v rows.
template <class T>
inline void merge_lanes(const LaneState<T>& total, const LaneState<T>& recent, Index lanes, Index d_v) {
  align_bases(total, recent, lanes);
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
