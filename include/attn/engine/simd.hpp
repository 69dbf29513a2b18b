/// Packets of the widest vector unit that Eigen was compiled for, as the compilers' own vectors. Which unit that is,
/// Eigen's macros say, not the compiler's: Eigen may be told to leave one alone. Intrinsics stand only where the
/// compilers make more instructions of operators than there need be.
#pragma once

#include <Eigen/Core>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

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

/// Bytes of a vector register; 0 where Eigen does not vectorise.
#if defined(EIGEN_VECTORIZE_AVX512)
inline constexpr std::size_t kRegisterBytes = 64;
#elif defined(EIGEN_VECTORIZE_AVX)
inline constexpr std::size_t kRegisterBytes = 32;
#elif defined(EIGEN_VECTORIZE)
inline constexpr std::size_t kRegisterBytes = 16;
#else
inline constexpr std::size_t kRegisterBytes = 0;
#endif

/// Lanes of a packet; 1 where Eigen does not vectorise.
template <class T>
inline constexpr int kLanes = std::max(1, static_cast<int>(kRegisterBytes / sizeof(T)));

/// x86 before AVX-512 has 16 vector registers, later x86 and AArch64 have 32; the register tile is sized for them.
#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorRegisters = 16;
#endif

/// As many elements as a packet of T has lanes, as a vector that the compilers' operators and shuffles take.
template <class T, class Element = T>
struct VectorOf {
  using Type [[gnu::vector_size(kLanes<T> * sizeof(Element))]] = Element;
};

/// One register of T. A struct rather than the vector itself, so that its template argument is T on every architecture.
template <class T>
struct Packet {
  using Raw = std::conditional_t<kLanes<T> == 1, T, typename VectorOf<T>::Type>;
  using Aligned [[gnu::may_alias]] = Raw;  ///< of elements in memory
  using Unaligned [[gnu::may_alias, gnu::aligned(alignof(T))]] = Raw;
  Raw raw;
};

template <class T>
inline Packet<T> broadcast(T x) {
  return {x - typename Packet<T>::Raw{}};  // x - 0 is x, of -0 too; a loop over lanes triples the code under GCC
}
template <class T>
inline Packet<T> load(const T* aligned) {
  return {*reinterpret_cast<const typename Packet<T>::Aligned*>(aligned)};
}
template <class T>
inline Packet<T> load_unaligned(const T* p) {
  return {*reinterpret_cast<const typename Packet<T>::Unaligned*>(p)};
}
template <class T>
inline void store(T* aligned, Packet<T> x) {
  *reinterpret_cast<typename Packet<T>::Aligned*>(aligned) = x.raw;
}
template <class T>
inline void store_unaligned(T* p, Packet<T> x) {
  *reinterpret_cast<typename Packet<T>::Unaligned*>(p) = x.raw;
}

template <class T>
inline Packet<T> operator+(Packet<T> a, Packet<T> b) {
  return {a.raw + b.raw};
}
template <class T>
inline Packet<T> operator-(Packet<T> a, Packet<T> b) {
  return {a.raw - b.raw};
}
template <class T>
inline Packet<T> operator*(Packet<T> a, Packet<T> b) {
  return {a.raw * b.raw};
}
template <class T>
inline Packet<T> operator/(Packet<T> a, Packet<T> b) {
  return {a.raw / b.raw};
}

/// The larger of a and b, lane by lane; a where either is NaN, for the second operand is what x86's instructions then
/// return. With AVX-512 by a mask of all lanes: without one GCC 12 warns of its own header.
template <class T>
inline Packet<T> max(Packet<T> a, Packet<T> b) {
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (sizeof(T) == 4) return {_mm512_mask_max_ps(a.raw, 0xFFFF, b.raw, a.raw)};
  if constexpr (sizeof(T) == 8) return {_mm512_mask_max_pd(a.raw, 0xFF, b.raw, a.raw)};
#elif defined(EIGEN_VECTORIZE_AVX)
  if constexpr (sizeof(T) == 4) return {_mm256_max_ps(b.raw, a.raw)};
  if constexpr (sizeof(T) == 8) return {_mm256_max_pd(b.raw, a.raw)};
#elif defined(EIGEN_VECTORIZE_SSE)
  if constexpr (sizeof(T) == 4) return {_mm_max_ps(b.raw, a.raw)};
  if constexpr (sizeof(T) == 8) return {_mm_max_pd(b.raw, a.raw)};
#else
  return {a.raw < b.raw ? b.raw : a.raw};
#endif
}

/// The smaller of a and b, lane by lane; a where either is NaN.
template <class T>
inline Packet<T> min(Packet<T> a, Packet<T> b) {
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (sizeof(T) == 4) return {_mm512_mask_min_ps(a.raw, 0xFFFF, b.raw, a.raw)};
  if constexpr (sizeof(T) == 8) return {_mm512_mask_min_pd(a.raw, 0xFF, b.raw, a.raw)};
#elif defined(EIGEN_VECTORIZE_AVX)
  if constexpr (sizeof(T) == 4) return {_mm256_min_ps(b.raw, a.raw)};
  if constexpr (sizeof(T) == 8) return {_mm256_min_pd(b.raw, a.raw)};
#elif defined(EIGEN_VECTORIZE_SSE)
  if constexpr (sizeof(T) == 4) return {_mm_min_ps(b.raw, a.raw)};
  if constexpr (sizeof(T) == 8) return {_mm_min_pd(b.raw, a.raw)};
#else
  return {b.raw < a.raw ? b.raw : a.raw};
#endif
}

/// a where x is above 0, else b, lane by lane.
template <class T>
inline Packet<T> select_positive(Packet<T> x, Packet<T> a, Packet<T> b) {
  return {x.raw > typename Packet<T>::Raw{} ? a.raw : b.raw};
}

/// c + a b, in one instruction where there is one, even if the compiler was told to contract nothing.
template <class T>
inline Packet<T> multiply_add(Packet<T> a, Packet<T> b, Packet<T> c) {
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (sizeof(T) == 4) return {_mm512_fmadd_ps(a.raw, b.raw, c.raw)};
  if constexpr (sizeof(T) == 8) return {_mm512_fmadd_pd(a.raw, b.raw, c.raw)};
#elif defined(EIGEN_VECTORIZE_AVX) && defined(EIGEN_VECTORIZE_FMA)
  if constexpr (sizeof(T) == 4) return {_mm256_fmadd_ps(a.raw, b.raw, c.raw)};
  if constexpr (sizeof(T) == 8) return {_mm256_fmadd_pd(a.raw, b.raw, c.raw)};
#elif defined(EIGEN_VECTORIZE_NEON) && defined(__aarch64__)
  if constexpr (sizeof(T) == 4) return {vfmaq_f32(c.raw, a.raw, b.raw)};
  if constexpr (sizeof(T) == 8) return {vfmaq_f64(c.raw, a.raw, b.raw)};
#else
  return a * b + c;
#endif
}

/// x, of which the compiler no longer knows how it was computed: under -ffast-math it would take x + a - a for x. No
/// instruction.
template <class T>
inline Packet<T> opaque(Packet<T> x) {
#if defined(__SSE2__)
  asm("" : "+v"(x.raw));
#elif defined(__aarch64__)
  asm("" : "+w"(x.raw));
#else
  asm("" : "+m"(x.raw));
#endif
  return x;
}

/// Whether fraction and scale_exponent are a few instructions.
#if defined(EIGEN_VECTORIZE_AVX512) && defined(EIGEN_VECTORIZE_AVX512DQ)
inline constexpr bool kScalesExponents = true;

/// x minus the nearest integer, in [-1/2, 1/2]; 0 where x is infinite.
inline Packet<float> fraction(Packet<float> x) {
  return {_mm512_reduce_ps(x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Packet<double> fraction(Packet<double> x) {
  return {_mm512_reduce_pd(x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

/// a 2^n for whole n; 0 where x is below lowest.
inline Packet<float> scale_exponent(Packet<float> a, Packet<float> n, Packet<float> x, float lowest) {
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.raw, _mm512_set1_ps(lowest), _CMP_NLT_UQ), a.raw, n.raw)};
}
inline Packet<double> scale_exponent(Packet<double> a, Packet<double> n, Packet<double> x, double lowest) {
  return {_mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(x.raw, _mm512_set1_pd(lowest), _CMP_NLT_UQ), a.raw, n.raw)};
}
#else
inline constexpr bool kScalesExponents = false;
#endif

/// Each lane's bits moved left by kBits: puts an integer's low bits where the exponent is.
template <int kBits, class T>
inline Packet<T> shift_left(Packet<T> x) {
  if constexpr (kLanes<T> == 1) {
    return {std::bit_cast<T>(std::bit_cast<BitsOf<T>>(x) << kBits)};
  } else {
    return std::bit_cast<Packet<T>>(std::bit_cast<typename VectorOf<T, BitsOf<T>>::Type>(x) << kBits);
  }
}

/// Whether all lanes of some packets are finite, from their bits.
template <class T>
class FiniteLanes {
 public:
  void add(Packet<T> x) { seen_ |= (std::bit_cast<Lanes>(x) & kMagnitude) + (kMagnitude + 1 - kInfinityBits<T>); }

  bool all() const {
    BitsOf<T> any = 0;
    for (const BitsOf<T> bits : std::bit_cast<std::array<BitsOf<T>, kLanes<T>>>(seen_)) any |= bits;
    return any <= kMagnitude;
  }

 private:
  using Lanes = typename VectorOf<T, BitsOf<T>>::Type;
  static constexpr BitsOf<T> kMagnitude = ~BitsOf<T>{0} >> 1U;

  Lanes seen_{};  ///< the highest bit is set in each lane that has had an infinity or a NaN
};

/// As many bfloat16 as a packet of floats has lanes: the upper halves of these.
using BfloatBits = VectorOf<float, std::uint16_t>::Type;
using FloatBits = VectorOf<float, std::uint32_t>::Type;

/// As many floats as a packet has lanes, from a narrow type in memory and, rounded to nearest, to it.
inline Packet<float> widen(const Eigen::bfloat16* p) {
  BfloatBits bits;
  std::memcpy(&bits, p, sizeof bits);
  return std::bit_cast<Packet<float>>(__builtin_convertvector(bits, FloatBits) << 16);
}
inline void store_narrow(Eigen::bfloat16* p, Packet<float> x) {
  const auto wide = std::bit_cast<FloatBits>(x), upper = wide >> 16;
  const FloatBits nearest = (wide + 0x7fff + (upper & 1)) >> 16, nan = (upper & 0x8000) | 0x7fc0;
  const auto bits = __builtin_convertvector((wide & 0x7fffffff) > 0x7f800000 ? nan : nearest, BfloatBits);
  std::memcpy(static_cast<void*>(p), &bits, sizeof bits);
}
#if defined(EIGEN_VECTORIZE_AVX512)
inline Packet<float> widen(const Eigen::half* p) {
  return {_mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline void store_narrow(Eigen::half* p, Packet<float> x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xFFFF, x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(EIGEN_VECTORIZE_AVX) && defined(__F16C__)
inline Packet<float> widen(const Eigen::half* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline void store_narrow(Eigen::half* p, Packet<float> x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(x.raw, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
inline Packet<float> widen(const Eigen::half* p) {
  alignas(64) float lanes[kLanes<float>];
  std::transform(p, p + kLanes<float>, lanes, [](Eigen::half x) { return static_cast<float>(x); });
  return load(lanes);
}
inline void store_narrow(Eigen::half* p, Packet<float> x) {
  alignas(64) float lanes[kLanes<float>];
  store(lanes, x);
  std::transform(lanes, lanes + kLanes<float>, p, [](float y) { return static_cast<Eigen::half>(y); });
}
#endif

/// Exchanges the off-diagonal quarters of every 2 kStep x 2 kStep block that lies in rows a and b = a + kStep.
template <int kStep, class T, int... kLane>
inline void exchange(Packet<T>& a, Packet<T>& b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = kLanes<T>;
  const auto x = a.raw, y = b.raw;
  a = {__builtin_shufflevector(x, y, ((kLane & kStep) != 0 ? kCount + kLane - kStep : kLane)...)};
  b = {__builtin_shufflevector(x, y, ((kLane & kStep) != 0 ? kCount + kLane : kLane + kStep)...)};
}

template <int kStep, class T, int... kLane>
inline Packet<T> rotate(Packet<T> a, std::integer_sequence<int, kLane...>) {
  return {__builtin_shufflevector(a.raw, a.raw, ((kLane + kStep) % kLanes<T>)...)};
}

/// All lanes, combined by op.
template <int kStep = 1, class T, class Op>
inline T combine(Packet<T> x, const Op& op) {
  if constexpr (kStep < kLanes<T>) {
    return combine<2 * kStep>(op(x, rotate<kStep>(x, std::make_integer_sequence<int, kLanes<T>>{})), op);
  } else {
    alignas(64) T lanes[kLanes<T>];
    store(lanes, x);
    return lanes[0];
  }
}

/// The sum of all lanes.
template <class T>
inline T sum(Packet<T> x) {
  return combine(x, [](Packet<T> a, Packet<T> b) { return a + b; });
}

/// The largest lane.
template <class T>
inline T largest(Packet<T> x) {
  return combine(x, [](Packet<T> a, Packet<T> b) { return max(a, b); });
}

/// Whether any lane is above 0.
template <class T>
inline bool any_positive(Packet<T> x) {
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask(x.raw, _mm512_setzero_ps(), _CMP_GT_OQ) != 0;
  if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask(x.raw, _mm512_setzero_pd(), _CMP_GT_OQ) != 0;
#elif defined(EIGEN_VECTORIZE_AVX)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps(_mm256_cmp_ps(x.raw, _mm256_setzero_ps(), _CMP_GT_OQ)) != 0;
  if constexpr (sizeof(T) == 8) return _mm256_movemask_pd(_mm256_cmp_pd(x.raw, _mm256_setzero_pd(), _CMP_GT_OQ)) != 0;
#elif defined(EIGEN_VECTORIZE_SSE)
  if constexpr (sizeof(T) == 4) return _mm_movemask_ps(_mm_cmpgt_ps(x.raw, _mm_setzero_ps())) != 0;
  if constexpr (sizeof(T) == 8) return _mm_movemask_pd(_mm_cmpgt_pd(x.raw, _mm_setzero_pd())) != 0;
#else
  return largest(select_positive(x, broadcast(T(1)), broadcast(T(0)))) > 0;
#endif
}

/// In lane i the lanes of x[i] combined by op, in the same order for all; x is overwritten. In pairs, which become half
/// as many at each step: half the shuffles of a transposed block.
template <int kStep = 1, class T, class Op>
[[gnu::always_inline]] inline Packet<T> combine_lanes(Packet<T> (&x)[kLanes<T>], const Op& op) {
  if constexpr (kStep < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; i += 2 * kStep) {
      exchange<kStep>(x[i], x[i + kStep], std::make_integer_sequence<int, kLanes<T>>{});
      x[i] = op(x[i], x[i + kStep]);
    }
    return combine_lanes<2 * kStep>(x, op);
  } else {
    return x[0];
  }
}

/// In lane i the sum of the lanes of x[i], as combine_lanes.
template <class T>
[[gnu::always_inline]] inline Packet<T> sums_of_lanes(Packet<T> (&x)[kLanes<T>]) {
  return combine_lanes(x, [](Packet<T> a, Packet<T> b) { return a + b; });
}

/// Transposes a square block of kLanes packets in registers.
template <int kStep = 1, class T>
inline void transpose(Packet<T> (&rows)[kLanes<T>]) {
  if constexpr (kStep < kLanes<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if ((i & kStep) == 0) exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes<T>>{});
    }
    transpose<2 * kStep>(rows);
  }
}

}  // namespace attn::detail
