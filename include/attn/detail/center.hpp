/// The origin that tokens are measured from where a kernel depends on their distances alone: it changes none, but keeps digits.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/causal.hpp>
#include <attn/detail/float_bits.hpp>
#include <attn/detail/kept_rows.hpp>
#include <attn/detail/token_rows.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <bit>
#include <limits>

namespace attn::detail {

/// The median of the finite ones among count values, which it reorders; 0 if there are none.
template <class T>
T median_of_finite(T* values, Index count) {
  T* const end = std::partition(values, values + count, [](T x) { return is_finite(x); });
  if (end == values) return 0;
  T* const middle = values + (end - values) / 2;
  std::nth_element(values, middle, end);
  return *middle;
}

/// x with half of its digits: where tokens are measured from such a number, differences to it are mostly exact.
template <class T>
T with_few_digits(T x) {
  return std::bit_cast<T>(std::bit_cast<BitsOf<T>>(x) & (~BitsOf<T>{0} << (std::numeric_limits<T>::digits / 2)));
}

/// An origin amid the keys, d numbers: of each feature the median over some kept keys that every query sees, which tokens far from all
/// others do not move; or the first kept key, where no other is seen by all, as under a causal mask: results must not depend
/// on later tokens.
template <class T>
const T* choose_center(const Sources<T>& in, Scratch& scratch) {
  constexpr Index kMost = 63, kFewQueries = 8, kMostForFew = 15;  // medians take longer than a few queries
  const Index d = in.k.cols(), most = in.q.rows() < kFewQueries ? kMostForFew : kMost;
  T* const center = scratch.elements<T>(d);
  Scratch temporary = scratch.nested();
  T *const samples = temporary.elements<T>(most * d), *const buffer = temporary.elements<T>(d);  // feature by feature
  const Index seen = CausalLimits::of_inputs(in).seen_by_all(in.k.rows());
  const Index step = std::max<Index>(1, count_kept(seen, kept_keys(in)) / most);
  Index count = 0;
  for (Index j = 0, until_next = step / 2; j < in.k.rows() && (j < seen || count == 0) && count < most; ++j) {
    if (!keeps_key(in, j) || until_next-- > 0) continue;
    const T* const row = in.k.row(j, buffer);
    for (Index c = 0; c < d; ++c) samples[c * most + count] = row[c];
    until_next = step - 1;
    ++count;
  }
  for (Index c = 0; c < d; ++c) center[c] = with_few_digits(median_of_finite(samples + c * most, count));
  return center;
}

}  // namespace attn::detail
