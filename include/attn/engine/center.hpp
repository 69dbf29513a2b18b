/// The origin that tokens are measured from where a kernel depends on their distances alone: it changes none, but keeps
/// digits.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/causal.hpp>
#include <attn/engine/float_bits.hpp>
#include <attn/engine/kept_rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/token_rows.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <bit>
#include <limits>

namespace attn::detail {

/// x with half of its digits: where tokens are measured from such a number, differences to it are mostly exact.
template <class T>
T with_few_digits(T x) {
  return std::bit_cast<T>(std::bit_cast<BitsOf<T>>(x) & (~BitsOf<T>{0} << (std::numeric_limits<T>::digits / 2)));
}

/// Row 0 of count rows, a power of three, <- of each feature the median of medians of three rows ..., which reorders
/// them (the remedian of P. J. Rousseeuw and G. W. Bassett, 1990).
template <class T>
void reduce_to_medians(T* rows, Index count, Index stride) {
  for (; count > 1; count /= 3) {
    for (Index i = 0; i < count / 3; ++i) {
      const T* const three = rows + 3 * i * stride;
      for (Index c = 0; c < stride; c += kLanes<T>) {
        const auto x = load(three + c), y = load(three + stride + c), z = load(three + 2 * stride + c);
        store(rows + i * stride + c, max(min(x, y), min(max(x, y), z)));
      }
    }
  }
}

/// An origin amid the keys, d numbers: of each feature about the median over some kept keys that every query sees,
/// which tokens far from all others do not move; or the first kept key, where no other is seen by all, as under a
/// causal mask: results must not depend on later tokens.
template <class T>
const T* choose_center(const Sources<T>& in, Scratch& scratch) {
  constexpr Index kMost = 81, kFewQueries = 8, kMostForFew = 27;  // a few queries take no longer than many samples
  const Index d = in.k.cols(), most = in.q.rows() < kFewQueries ? kMostForFew : kMost;
  const Index stride = (d + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  T* const center = scratch.elements<T>(d);
  Scratch temporary = scratch.nested();
  const Index seen = CausalLimits::of_inputs(in).seen_by_all(in.k.rows()), kept = count_kept(seen, kept_keys(in));
  Index count = 1;
  while (3 * count <= std::min(kept, most)) count *= 3;
  T* const samples = temporary.elements<T>(count * stride);
  std::fill_n(samples, count * stride, T(0));
  const Index step = std::max<Index>(1, kept / count);
  for (Index j = 0, taken = 0, until_next = step / 2; j < in.k.rows() && taken < count; ++j) {
    if (!keeps_key(in, j) || until_next-- > 0) continue;
    in.k.copy_row(j, samples + taken++ * stride);
    until_next = step - 1;
  }
  reduce_to_medians(samples, count, stride);
  std::transform(samples, samples + d, center, [](T x) { return is_finite(x) ? with_few_digits(x) : T(0); });
  return center;
}

}  // namespace attn::detail
