/// Pairs of bfloat16 numbers, and what the units that multiply them do: c + a_0 b_0 + a_1 b_1 in every lane of floats,
/// in the time of one multiply-add.
#pragma once

#include <attn/engine/exp2.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/matrix.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <utility>

#if defined(EIGEN_VECTORIZE_AVX512) && defined(EIGEN_VECTORIZE_AVX512DQ) && defined(__AVX512BF16__)

namespace attn::detail {

/// Two bfloat16 numbers, the first one in the lower half.
using BfloatPair = std::uint32_t;

constexpr Index pair_count(Index n) {
  return (n + 1) / 2;
}

/// c + a_0 b_0 + a_1 b_1: what the register tile adds up.
inline Packet<float> multiply_add(Packet<BfloatPair> a, Packet<BfloatPair> b, Packet<float> c) {
  return {_mm512_dpbf16_ps(c.raw, std::bit_cast<__m512bh>(a.raw), std::bit_cast<__m512bh>(b.raw))};
}

/// Lane i has both a_i and b_i, rounded to nearest.
inline Packet<BfloatPair> round_pairs(Packet<float> a, Packet<float> b) {
  alignas(64) static constexpr std::uint16_t kPlaces[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const auto rounded = std::bit_cast<__m512i>(_mm512_cvtne2ps_pbh(b.raw, a.raw));
  return std::bit_cast<Packet<BfloatPair>>(_mm512_permutexvar_epi16(_mm512_load_si512(kPlaces), rounded));
}

/// Numbers [first, first + 32) of a row of d in memory, as pairs; zeros beyond it, and for a null row.
inline Packet<BfloatPair> load_pairs(const char* row, Index first, Index d) {
  constexpr Index kNumbers = 2 * kLanes<float>;
  const Index count = row == nullptr ? 0 : std::min(kNumbers, d - first);
  const auto mask = static_cast<__mmask32>((std::uint64_t{1} << count) - 1);
  return std::bit_cast<Packet<BfloatPair>>(_mm512_maskz_loadu_epi16(mask, row + 2 * first));
}

/// count lanes to memory.
inline void store_pairs(BfloatPair* to, Index count, Packet<BfloatPair> x) {
  const auto mask = static_cast<__mmask16>((1U << std::min<Index>(count, kLanes<float>)) - 1);
  _mm512_mask_storeu_epi32(to, mask, std::bit_cast<__m512i>(x));
}

/// panel[c] <- pair c of row_i, with signs flipped by flip, in lane i, for kLanes rows of d numbers; null rows are
/// zeros. stride: pairs between two rows of the panel. Returns |row_i|^2 in lane i.
[[gnu::noinline]] inline Packet<float> pack_pairs(const char* const (&rows)[kLanes<float>], Index d, BfloatPair flip,
                                                  BfloatPair* panel, Index stride) {
  auto squares = broadcast(0.0F);
  const Index pairs = pair_count(d);
  for (Index first = 0; first < pairs; first += kLanes<float>) {
    Packet<BfloatPair> block[kLanes<float>];
    for (int i = 0; i < kLanes<float>; ++i) block[i] = load_pairs(rows[i], 2 * first, d);
    transpose(block);
    for (Index c = 0; c < std::min<Index>(kLanes<float>, pairs - first); ++c) {
      squares = multiply_add(block[c], block[c], squares);
      store(panel + (first + c) * stride, Packet<BfloatPair>{block[c].raw ^ broadcast(flip).raw});
    }
  }
  return squares;
}

/// |row_i|^2 in lane i, for kLanes rows of d numbers.
[[gnu::noinline]] inline Packet<float> squared_norms(const char* const (&rows)[kLanes<float>], Index d) {
  Packet<float> squares[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) {
    squares[i] = broadcast(0.0F);
    for (Index c = 0; c < d; c += 2 * kLanes<float>) {
      const auto x = load_pairs(rows[i], c, d);
      squares[i] = multiply_add(x, x, squares[i]);
    }
  }
  return sums_of_lanes(squares);
}

/// to <- the pairs (a_c, b_c) of two rows of d numbers; a null row is zeros.
inline void interleave_rows(const char* a, const char* b, Index d, BfloatPair* to) {
  alignas(64) static constexpr std::uint16_t kLower[] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const auto lower = _mm512_load_si512(kLower), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(kLanes<float>));
  for (Index c = 0; c < d; c += 2 * kLanes<float>) {
    const auto x = std::bit_cast<__m512i>(load_pairs(a, c, d)), y = std::bit_cast<__m512i>(load_pairs(b, c, d));
    store_pairs(to + c, d - c, std::bit_cast<Packet<BfloatPair>>(_mm512_permutex2var_epi16(x, lower, y)));
    if (c + kLanes<float> >= d) return;
    store_pairs(to + c + kLanes<float>, d - c - kLanes<float>,
                std::bit_cast<Packet<BfloatPair>>(_mm512_permutex2var_epi16(x, upper, y)));
  }
}

/// Each half of a pair as a float.
inline float first_of(BfloatPair x) {
  return std::bit_cast<float>(x << 16);
}
inline float second_of(BfloatPair x) {
  return std::bit_cast<float>(x & 0xffff0000U);
}

/// 2^x within 1.1e-4 of itself, which is a twentieth of what rounding to bfloat16 takes: as exp2_bounded, by a
/// polynomial of degree 3. 2^0 is exact.
inline Packet<float> exp2_for_bfloat16(Packet<float> x) {
  constexpr float kCoefficients[] = {1.0F, 0.69328293F, 0.24221096F, 0.05500893F};
  const auto r = fraction(x);
  return scale_exponent(polynomial(kCoefficients, r), x - r, x, 1 - Exp2<float>::kBias);
}

/// Scores of count keys, packets that lie step floats apart, <- pairs of weights 2^(score - top), no exponent above
/// limit, likewise; the last of an odd count stands beside 0. Returns the sums of the rounded weights.
inline Packet<float> weigh_pairs(float* panel, Index count, Index step, Packet<float> top, float limit) {
  const auto ones = broadcast(BfloatPair{0x3f803f80});
  const auto weight = [&](Index j) { return exp2_for_bfloat16(min(load(panel + j * step) - top, broadcast(limit))); };
  auto* to = reinterpret_cast<BfloatPair*>(panel);
  auto total = broadcast(0.0F);
  for (Index j = 0; j + 1 < count; j += 2, to += step) {
    const auto pairs = round_pairs(weight(j), weight(j + 1));
    total = multiply_add(pairs, ones, total);
    store(to, pairs);
  }
  if (count % 2 == 0) return total;
  const auto last = round_pairs(weight(count - 1), broadcast(0.0F));
  store(to, last);
  return multiply_add(last, ones, total);
}

}  // namespace attn::detail

#endif
