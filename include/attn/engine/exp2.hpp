/// 2^x on packets: the library's own exponential.
#pragma once

#include <attn/engine/simd.hpp>

#include <cstddef>

namespace attn::detail {

/// Coefficients of 2^r on [-1/2, 1/2], lowest degree first: minimax in relative error (Remez), but for the first, which
/// is rounded to 1 so that 2^0 is exact; and the constants of the range reduction.
template <class T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr float kBias = 127, kRound = 1.5F * (1 << 23);
  static constexpr float kCoefficients[] = {
      1.0F, 0.69314696706526F, 0.24022119723969F, 0.05550713272875F, 0.00967554133102F, 0.00132764721678F};
};

template <>
struct Exp2<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr double kBias = 1023, kRound = 1.5 * (1LL << 52);
  static constexpr double kCoefficients[] = {1.0,
                                             0.6931471805599452862,
                                             0.2402265069591009717,
                                             0.05550410866482159970,
                                             0.009618129107606888245,
                                             0.001333355814641693556,
                                             0.0001540353044173604989,
                                             1.525273382983611924e-05,
                                             1.321544258792168930e-06,
                                             1.017806244584577367e-07,
                                             7.072585949269223387e-09,
                                             4.454960598186518564e-10};
};

/// A polynomial with the given coefficients, lowest degree first, at r.
template <class T, std::size_t kCount>
inline Packet<T> polynomial(const T (&coefficients)[kCount], Packet<T> r) {
  auto p = broadcast(coefficients[kCount - 1]);
  for (std::size_t i = kCount - 1; i-- > 0;) p = multiply_add(p, r, broadcast(coefficients[i]));
  return p;
}

/// exp2 where x is known to be at most 127 (float) or 1023 (double), as it is of every weight relative to a maximum.
///   n = round(x);  r = x - n in [-1/2, 1/2];  2^x = 2^n p(r)
/// Without instructions for that, adding kRound + kBias leaves n + kBias in the lowest mantissa bits, which moved into
/// the exponent's place are 2^n; n = -kBias makes that 0. Only these sums' own rounding makes n whole, whatever the
/// compiler may assume.
template <class T>
inline Packet<T> exp2_bounded(Packet<T> x) {
  using C = Exp2<T>;
  if constexpr (kScalesExponents) {
    const auto r = fraction(x);
    return scale_exponent(polynomial(C::kCoefficients, r), x - r, x, 1 - C::kBias);
  } else {
    const auto magic = broadcast<T>(C::kRound + C::kBias);
    x = max(x, broadcast<T>(-C::kBias));
    const auto shifted = opaque(x + magic), n = opaque(shifted - magic);
    return polynomial(C::kCoefficients, x - n) * shift_left<C::kMantissaBits>(shifted);
  }
}

/// 2^x within 3 units in the last place (float) or 1 (double); infinite from 128 (1024) on, exactly 0 below -126.5
/// (-1022.5), at most the smallest normal number from there to -126 (-1022). NaN stays NaN. Subnormal weights would
/// make products take many times as long. Above kBias, where 2^n may be infinite although 2^x is not, it is 2 2^(x -
/// 1), in that order whatever the compiler may assume.
template <class T>
inline Packet<T> exp2(Packet<T> x) {
  if constexpr (kScalesExponents) {
    return exp2_bounded(x);
  } else {
    using C = Exp2<T>;
    const auto one = broadcast(T(1));
    x = min(x, broadcast<T>(C::kBias + 1));
    const auto above = min(max(x - broadcast(C::kBias), broadcast(T(0))) * broadcast(C::kRound), one);  // 0 or 1
    return opaque(exp2_bounded(x - above)) * (one + above);
  }
}

/// exp2 of one number.
template <class T>
inline T exp2_scalar(T x) {
  alignas(64) T lanes[kLanes<T>];
  store(lanes, exp2(broadcast(x)));
  return lanes[0];
}

}  // namespace attn::detail
