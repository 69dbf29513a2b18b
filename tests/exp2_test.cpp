#include <attn/engine/exp2.hpp>

#include "common/inputs.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

namespace {

using attn::detail::exp2_scalar;

constexpr double kMaxUlpFloat = 3, kMaxUlpDouble = 2;

/// |y - 2^x| in units of the last place of 2^x, computed in Wide.
template <class Wide, class T>
double ulp_error(T x) {
  const Wide exact = std::exp2(static_cast<Wide>(x));
  const int digits = std::numeric_limits<T>::digits;
  const Wide ulp = std::ldexp(Wide(1), std::ilogb(exact) + 1 - digits);
  return static_cast<double>(std::abs(static_cast<Wide>(exp2_scalar(x)) - exact) / ulp);
}

TEST(Exp2, FloatIsAccurateOverItsWholeRange) {
  constexpr std::uint32_t kStride = 397;  // prime: meets every exponent and all kinds of mantissas
  double worst = 0;
  for (const float limit : {std::nextafter(128.0F, 0.0F), -126.0F}) {
    const std::uint32_t sign = std::bit_cast<std::uint32_t>(limit) & 0x80000000U,
                        end = std::bit_cast<std::uint32_t>(limit);
    for (std::uint32_t bits = sign; bits <= end; bits += kStride) {
      worst = std::max(worst, ulp_error<double>(std::bit_cast<float>(bits)));
    }
    worst = std::max(worst, ulp_error<double>(limit));
  }
  EXPECT_LE(worst, kMaxUlpFloat);
  RecordProperty("max_ulp", std::to_string(worst));
}

TEST(Exp2, DoubleIsAccurateOverItsWholeRange) {
  test::Random random(1);
  double worst = 0;
  for (int i = 0; i < 1'000'000; ++i) {
    const double uniform = random.uniform();
    worst = std::max(worst, ulp_error<long double>(-1022 + 2046 * uniform));
    worst = std::max(worst, ulp_error<long double>(-2 * uniform));
    worst = std::max(worst, ulp_error<long double>(uniform * std::exp2(-60 * random.uniform())));
  }
  EXPECT_LE(worst, kMaxUlpDouble);
  RecordProperty("max_ulp", std::to_string(worst));
}

TEST(Exp2, IsWithinItsBoundAroundHalfIntegers) {
  double worst_float = 0, worst_double = 0;
  for (int n = -126; n < 128; ++n) {
    const float half = static_cast<float>(n) + 0.5F;
    for (const float x : {std::nextafter(half, -1000.0F), half, std::nextafter(half, 1000.0F)}) {
      worst_float = std::max(worst_float, ulp_error<double>(x));
    }
  }
  for (int n = -1022; n < 1024; ++n) {
    const double half = n + 0.5;
    for (const double x : {std::nextafter(half, -2000.0), half, std::nextafter(half, 2000.0)}) {
      worst_double = std::max(worst_double, ulp_error<long double>(x));
    }
  }
  EXPECT_LE(worst_float, kMaxUlpFloat);
  EXPECT_LE(worst_double, kMaxUlpDouble);
}

template <class T>
class Exp2Of : public ::testing::Test {};
using Scalars = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Exp2Of, Scalars);

TYPED_TEST(Exp2Of, IntegersAreExact) {
  using Limits = std::numeric_limits<TypeParam>;
  for (int n = Limits::min_exponent - 1; n < Limits::max_exponent; ++n) {
    ASSERT_EQ(exp2_scalar(static_cast<TypeParam>(n)), std::ldexp(TypeParam(1), n)) << n;
  }
}

TYPED_TEST(Exp2Of, IsExactlyZeroBelowItsRange) {
  using Limits = std::numeric_limits<TypeParam>;
  const TypeParam lowest_exponent = Limits::min_exponent - 1;
  for (TypeParam x = lowest_exponent; x > lowest_exponent - Limits::digits - 2; x -= TypeParam(0.03125)) {
    const TypeParam y = exp2_scalar(x);
    EXPECT_TRUE(y == 0 || (y <= Limits::min() && x >= lowest_exponent - TypeParam(0.5))) << x << " gives " << y;
  }
  for (const TypeParam x : {lowest_exponent - Limits::digits, 2 * lowest_exponent, TypeParam(-1e6), TypeParam(-1e30),
                            Limits::lowest(), -Limits::infinity()}) {
    EXPECT_EQ(exp2_scalar(x), TypeParam(0)) << x;
  }
}

TYPED_TEST(Exp2Of, IsInfiniteFromItsEndOnAndNoSooner) {
  using Limits = std::numeric_limits<TypeParam>;
  constexpr TypeParam kEnd = Limits::max_exponent;
  EXPECT_EQ(exp2_scalar(kEnd - 1), std::ldexp(TypeParam(1), Limits::max_exponent - 1));
  for (const TypeParam x : {kEnd - TypeParam(0.5), kEnd - TypeParam(0.25), std::nextafter(kEnd, TypeParam(0))}) {
    EXPECT_LT(exp2_scalar(x), Limits::infinity()) << x;
    EXPECT_GT(exp2_scalar(x), Limits::max() / 2) << x;
  }
  for (TypeParam x = kEnd; x < 5 * kEnd; x += TypeParam(0.25)) ASSERT_EQ(exp2_scalar(x), Limits::infinity()) << x;
  for (const TypeParam x :
       {std::nextafter(kEnd, 2 * kEnd), TypeParam(1e6), TypeParam(1e20), Limits::max(), Limits::infinity()}) {
    EXPECT_EQ(exp2_scalar(x), Limits::infinity()) << x;
  }
}

TYPED_TEST(Exp2Of, SubnormalArgumentsGiveOne) {
  using Limits = std::numeric_limits<TypeParam>;
  for (const TypeParam x :
       {TypeParam(0), -TypeParam(0), Limits::denorm_min(), -Limits::denorm_min(), Limits::min(), -Limits::min()}) {
    EXPECT_EQ(exp2_scalar(x), TypeParam(1)) << x;
  }
}

TYPED_TEST(Exp2Of, NaNStaysNaNWhateverItsPayload) {
  using Bits = std::conditional_t<sizeof(TypeParam) == 4, std::uint32_t, std::uint64_t>;
  const Bits quiet = std::bit_cast<Bits>(std::numeric_limits<TypeParam>::quiet_NaN());
  for (const Bits sign : {Bits(0), Bits(1) << (8 * sizeof(Bits) - 1)}) {
    for (Bits payload = 0; payload < 2048; ++payload) {
      EXPECT_TRUE(std::isnan(exp2_scalar(std::bit_cast<TypeParam>(quiet | sign | payload)))) << payload;
      EXPECT_TRUE(std::isnan(exp2_scalar(
          std::bit_cast<TypeParam>(quiet | sign | (payload << (std::numeric_limits<TypeParam>::digits - 14))))));
    }
  }
  EXPECT_TRUE(std::isnan(exp2_scalar(static_cast<TypeParam>(std::nan("123")))));
}

TYPED_TEST(Exp2Of, EveryLaneIsItsOwn) {
  using attn::detail::kLanes;
  alignas(64) TypeParam x[kLanes<TypeParam>], y[kLanes<TypeParam>];
  for (int i = 0; i < kLanes<TypeParam>; ++i) x[i] = static_cast<TypeParam>(i) * TypeParam(1.37) - TypeParam(8);
  x[0] = std::numeric_limits<TypeParam>::quiet_NaN();
  x[kLanes<TypeParam> - 1] = -std::numeric_limits<TypeParam>::infinity();
  attn::detail::store(y, attn::detail::exp2(attn::detail::load(x)));
  for (int i = 1; i + 1 < kLanes<TypeParam>; ++i) EXPECT_EQ(y[i], exp2_scalar(x[i]));
  EXPECT_TRUE(kLanes<TypeParam> == 1 || std::isnan(y[0]));
  EXPECT_EQ(y[kLanes<TypeParam> - 1], TypeParam(0));
}

}  // namespace
