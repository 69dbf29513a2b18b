/// Questions about one number that its bits answer, whatever the compiler may assume of its value.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace attn::detail {

/// An integer with as many bits as T.
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;

/// The bits of |x|, which are ordered as its values are: those of infinity are above any number's, those of NaN above
/// infinity's.
template <class T>
constexpr BitsOf<T> magnitude_bits(T x) {
  return std::bit_cast<BitsOf<T>>(x) & (~BitsOf<T>{0} >> 1U);
}

template <class T>
inline constexpr BitsOf<T> kInfinityBits = magnitude_bits(std::numeric_limits<T>::infinity());

/// Whether x is neither infinite nor NaN.
template <class T>
constexpr bool is_finite(T x) {
  return magnitude_bits(x) < kInfinityBits<T>;
}

template <class T>
constexpr bool is_nan(T x) {
  return magnitude_bits(x) > kInfinityBits<T>;
}

/// Whether x is -infinity; x may be of a narrow type.
template <class T>
constexpr bool is_negative_infinity(T x) {
  if constexpr (sizeof(T) == 2) {
    return is_negative_infinity(static_cast<float>(x));
  } else {
    return std::bit_cast<BitsOf<T>>(x) == std::bit_cast<BitsOf<T>>(-std::numeric_limits<T>::infinity());
  }
}

}  // namespace attn::detail
