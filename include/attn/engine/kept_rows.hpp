/// Which tokens take part.
#pragma once

#include <attn/engine/float_bits.hpp>
#include <attn/matrix.hpp>

#include <cstdint>

namespace attn::detail {

/// Which rows count: those that a mask keeps, without those of a bias of minus infinity. Null leaves all.
template <class T>
struct KeptRows {
  const std::uint8_t* keep;
  const T* bias;

  bool operator()(Index row) const {
    return (keep == nullptr || keep[row] != 0) && (bias == nullptr || !is_negative_infinity(bias[row]));
  }
};

template <class In>
auto kept_keys(const In& in) {
  return KeptRows<typename decltype(in.key_bias)::value_type>{data_or_null(in.mask.keep_key),
                                                              data_or_null(in.key_bias)};
}

template <class In>
auto kept_queries(const In& in) {
  return KeptRows<typename decltype(in.key_bias)::value_type>{data_or_null(in.mask.keep_query), nullptr};
}

template <class In>
inline bool keeps_key(const In& in, Index j) {
  return kept_keys(in)(j);
}

template <class In>
inline bool keeps_query(const In& in, Index i) {
  return kept_queries(in)(i);
}

template <class Keeps>
Index count_kept(Index n, const Keeps& keeps) {
  Index kept = 0;
  for (Index i = 0; i < n; ++i) kept += keeps(i) ? 1 : 0;
  return kept;
}

}  // namespace attn::detail
