#include <attn/lifted_softmax.hpp>

#include <attn/exact.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

namespace {

using attn::LiftedSoftmax;
using attn::RidgeInverse;
using attn::SoftmaxAttention;
using attn::SoftmaxKernel;
using attn::StridedSample;
using test::Context;
using test::Family;
using test::forward;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;

template <class T>
using Strided = LiftedSoftmax<T, StridedSample>;

reference::Matrix defined(const reference::Problem& p, Index m, double gamma, double scale) {
  return lifted_softmax(scale, p, strided_landmarks(p, m), gamma);
}

template <class T>
class LiftedSoftmaxOf : public ::testing::Test {};
TYPED_TEST_SUITE(LiftedSoftmaxOf, test::Scalars);

TYPED_TEST(LiftedSoftmaxOf, IsItsDefinition) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::init, {130, 210, 16, 12}, 501);
  const auto keep_query = test::random_keep(130, 0.7, 502), keep_key = test::random_keep(210, 0.6, 503);
  const auto bias = test::random_key_bias<T>(210, 0, 504);
  for (const Mask& mask : {Mask{}, Mask{.keep_key = keep_key, .keep_query = keep_query}}) {
    for (const std::span<const T> key_bias : {std::span<const T>{}, std::span<const T>(bias)}) {
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask, .key_bias = key_bias};
      for (const double scale : {0.25, 0.1}) {
        const Strided<T> method(StridedSample{.num_landmarks = 24}, RidgeInverse{.gamma = 1e-2},
                                SoftmaxKernel{.scale = scale});
        EXPECT_LE(test::relative_error(forward(method, in), defined(test::to_reference(in), 24, 1e-2, scale)),
                  sizeof(T) == 4 ? 1e-4 : 1e-10);
      }
    }
  }
}

TEST(LiftedSoftmax, ARotationChangesNothing) {
  auto x = test::make_tokens<double>(Family::smooth, {120, 150, 16, 12}, 505);
  const Strided<double> method(StridedSample{.num_landmarks = 32});
  const Matrix<double> before = forward(method, {.q = x.q, .k = x.k, .v = x.v});
  Eigen::VectorXd axis = test::Random(506).normal(16, 1).col(0);
  axis.normalize();
  x.q -= (2 * (x.q * axis) * axis.transpose()).eval();
  x.k -= (2 * (x.k * axis) * axis.transpose()).eval();
  EXPECT_LE(test::relative_error(forward(method, {.q = x.q, .k = x.k, .v = x.v}), before), 1e-9);
}

TEST(LiftedSoftmax, ACommonWeightOfAllKeysChangesNothing) {
  const auto x = test::make_tokens<double>(Family::init, {80, 90, 16, 12}, 507);
  const Strided<double> method(StridedSample{.num_landmarks = 32});
  const std::vector<double> common(90, 3.0);
  EXPECT_LE(test::relative_error(forward(method, {.q = x.q, .k = x.k, .v = x.v, .key_bias = common}),
                                 forward(method, {.q = x.q, .k = x.k, .v = x.v})),
            1e-10);
}

TYPED_TEST(LiftedSoftmaxOf, ALargeCommonWeightOfAllKeysChangesNothing) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::init, {80, 90, 16, 12}, 510);
  const Strided<T> method(StridedSample{.num_landmarks = 32}, RidgeInverse{.gamma = 1e-2});
  for (const bool some_removed : {false, true}) {
    std::vector<T> bias(90, T(0));
    if (some_removed) bias[4] = -test::kInf<T>;
    const reference::Matrix expected =
        defined(test::to_reference<T>({.q = x.q, .k = x.k, .v = x.v, .key_bias = bias}), 32, 1e-2, 0.25);
    for (const double common : {89.0, 1e4, -1e4, 1e30, static_cast<double>(std::numeric_limits<T>::lowest())}) {
      std::fill(bias.begin(), bias.end(), static_cast<T>(common));
      if (some_removed) bias[4] = -test::kInf<T>;
      EXPECT_LE(test::relative_error(forward(method, {.q = x.q, .k = x.k, .v = x.v, .key_bias = bias}), expected),
                sizeof(T) == 4 ? 1e-4 : 1e-10)
          << common;
    }
  }
}

TEST(LiftedSoftmax, ComesCloseToSoftmaxOnSmoothInputsWithManyLandmarks) {
  const auto x = test::make_tokens<double>(Family::smooth, {300, 300, 16, 12}, 508);
  const Matrix<double> exact = attn::attention(SoftmaxAttention<double>{}, x.q, x.k, x.v);
  const auto error = [&](Index m, double gamma) {
    const Strided<double> method(StridedSample{.num_landmarks = m}, RidgeInverse{.gamma = gamma});
    return test::relative_error(forward(method, {.q = x.q, .k = x.k, .v = x.v}), exact);
  };
  EXPECT_LE(error(200, 1e-3), 0.1);
  EXPECT_LE(error(600, 1e-10), 1e-5) << "every token is a landmark";
}

TYPED_TEST(LiftedSoftmaxOf, LargeKeysDoNotOverflow) {
  using T = TypeParam;
  for (const double size : {8.0, 30.0}) {
    const auto x = test::scaled(test::make_tokens<T>(Family::unit, {90, 90, 16, 7}, 509), size);
    for (const Index m : {2, 20, 180}) {
      EXPECT_TRUE(forward(Strided<T>(StridedSample{.num_landmarks = m}), {.q = x.q, .k = x.k, .v = x.v}).allFinite())
          << size;
    }
  }
}

/// Keys whose weights differ by factors up to e^100 and more.
TYPED_TEST(LiftedSoftmaxOf, IsItsDefinitionWithLargeKeys) {
  using T = TypeParam;
  for (const double size : {3.0, 5.0, 8.0}) {
    const auto x = test::scaled(test::make_tokens<T>(Family::unit, {90, 90, 32, 7}, 511), size);
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
    for (const Index m : {20, 60}) {
      const Strided<T> method(StridedSample{.num_landmarks = m});
      EXPECT_LE(
          test::relative_error(forward(method, in), defined(test::to_reference(in), m, 1e-3, 1 / std::sqrt(32.0))),
          sizeof(T) == 4 ? 1e-3 : 1e-9)
          << size << ", " << m << " landmarks";
    }
  }
}

TEST(LiftedSoftmax, RefusesWhatItCannotDo) {
  const Matrix<float> x = Matrix<float>::Zero(6, 4);
  const auto error = [&](Index m, double gamma, double scale, const Mask& mask = {}) {
    const Strided<float> method(StridedSample{m}, RidgeInverse{gamma}, SoftmaxKernel{.scale = scale});
    return test::error_of([&] { attn::attention(method, x, x, x, mask); });
  };
  EXPECT_EQ(error(4, 1e-3, 1), "no error");
  EXPECT_EQ(error(0, 1e-3, 1), "lifted-softmax: num_landmarks is 0, should be at least 1");
  EXPECT_EQ(error(4, -1, 1), "lifted-softmax: gamma is -1, should be at least 0");
  EXPECT_EQ(error(4, 1e-3, 0), "lifted-softmax: scale is 0, should be positive and finite");
  EXPECT_EQ(error(4, 1e-3, test::kNaN<double>), "lifted-softmax: scale is nan, should be positive and finite");
  EXPECT_EQ(error(4, 1e-3, 1, {.causal = attn::Causal::upper_left}), "lifted-softmax: causal masks are not supported");
}

}  // namespace
