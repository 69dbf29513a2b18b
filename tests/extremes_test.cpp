/// Every method on inputs at the ends of what numbers can hold, on tokens that are all alike, and on a million of them.
#include <attn/any_approximator.hpp>
#include <attn/exact.hpp>

#include "common/methods.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

namespace {

using attn::Rows;
using test::Context;
using test::Family;
using test::in_both_precisions;
using test::Index;
using test::Inputs;
using test::Matrix;
using test::Tokens;

constexpr Index kLength = 90, kLandmarks = 10;
constexpr attn::MethodOptions kNormalized{.rows = attn::Rows::normalized};

class Extremes : public test::MethodTest {
 protected:
  template <class T>
  Matrix<T> forward(const Tokens<T>& x, attn::MethodOptions options = kNormalized) const {
    return test::forward(make<T>(kLandmarks, options), {.q = x.q, .k = x.k, .v = x.v});
  }

  /// The sum of all gradients' magnitudes.
  template <class T>
  T gradients(const Tokens<T>& x, const attn::MethodOptions& options) const {
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
    const Matrix<T> dout = Matrix<T>::Ones(x.q.rows(), x.v.cols());
    Matrix<T> out = dout, dq = x.q, dk = x.k, dv = x.v;
    const auto method = make<T>(kLandmarks, options);
    typename attn::AnyApproximator<T>::Saved saved;
    Context context;
    method.forward(in, out, context, saved);
    method.backward(in, out, dout, saved, {dq, dk, dv}, context);
    return dq.cwiseAbs().sum() + dk.cwiseAbs().sum() + dv.cwiseAbs().sum();
  }
};

INSTANTIATE_TEST_SUITE_P(Every, Extremes, ::testing::ValuesIn(test::method_names()), test::test_name);

template <class T>
Tokens<T> tokens_of_size(T size, Family family = Family::unit) {
  return test::scaled(test::make_tokens<T>(family, {kLength, kLength, 16, 7}, 801), size);
}

template <class T>
double distance_to_mean(const Matrix<T>& out, const Tokens<T>& x) {
  return test::relative_error(out, x.v.template cast<double>().colwise().mean().replicate(out.rows(), 1));
}

TEST_P(Extremes, TokensNearNothingAverageTheValues) {
  in_both_precisions([&]<class T>(T) {
    for (const T size : {T(0), std::numeric_limits<T>::denorm_min(), std::numeric_limits<T>::min(), T(1e-20)}) {
      EXPECT_LE(distance_to_mean(forward(tokens_of_size(size)), tokens_of_size(size)), sizeof(T) == 4 ? 1e-4 : 1e-8)
          << size;
    }
  });
}

TEST_P(Extremes, EqualTokensAverageTheValues) {
  in_both_precisions([&]<class T>(T) {
    Tokens<T> x = tokens_of_size(T(1));
    for (const T value : {T(1), T(-3)}) {
      x.q.setConstant(value);
      x.k.setConstant(value);
      EXPECT_LE(distance_to_mean(forward(x), x), sizeof(T) == 4 ? 1e-4 : 1e-8) << value;
    }
  });
}

TEST_P(Extremes, SubnormalValuesStaySo) {
  in_both_precisions([&]<class T>(T) {
    Tokens<T> x = tokens_of_size(T(0.5));
    x.v *= std::numeric_limits<T>::min();
    EXPECT_LE(forward(x).cwiseAbs().maxCoeff(), 100 * std::numeric_limits<T>::min());
  });
}

/// Scores of about 1e4, 1e8, 1e20 and 1e30. Weights are then 0 or 1 but for rounding, so that nothing large may come
/// out. Gradients of the lifted methods have no digits left beyond 1e4, because they weigh keys by exponentials of
/// differences of such numbers.
TEST_P(Extremes, LargeScoresGiveNothingLarge) {
  const bool lifted = GetParam() == "skyformer" || GetParam() == "lifted-softmax";
  in_both_precisions([&]<class T>(T) {
    for (const T size : {T(1e2), T(1e4), T(1e10), T(1e15)}) {
      for (const Family family : {Family::unit, Family::self}) {
        const Tokens<T> x = tokens_of_size(size, family);
        for (const attn::Rows rows : {attn::Rows::raw, attn::Rows::normalized}) {
          SCOPED_TRACE(std::to_string(static_cast<double>(size)) +
                       (rows == attn::Rows::raw ? ", raw" : ", normalized"));
          const T largest = forward(x, {.rows = rows}).cwiseAbs().maxCoeff();
          EXPECT_LE(largest, static_cast<T>(kLength) * x.v.cwiseAbs().maxCoeff());  // false for NaN too
          if (size > T(1e2) && lifted) continue;
          EXPECT_TRUE(std::isfinite(gradients(x, {.rows = rows})));
        }
      }
    }
  });
}

TEST(ExactExtremes, SoftmaxOfTwoScoresIsALogisticFunction) {
  in_both_precisions([]<class T>(T) {
    const Matrix<T> q = Matrix<T>::Ones(1, 1);
    Matrix<T> k = Matrix<T>::Zero(2, 1), v = Matrix<T>::Zero(2, 1);
    v(1, 0) = 1;
    for (const T score : {T(0.25), T(-0.25), T(0.5), T(3.75), T(-20)}) {
      k(1, 0) = score;
      const Matrix<T> out = attn::attention(attn::SoftmaxAttention<T>(attn::SoftmaxKernel{.scale = 1.0}), q, k, v);
      const double expected = 1 / (1 + std::exp(-static_cast<double>(score)));
      EXPECT_NEAR(out(0, 0), expected, (4 + std::abs(score)) * std::numeric_limits<T>::epsilon() * expected) << score;
    }
  });
}

TEST(ExactExtremes, SoftmaxOfLargeScoresPicksTheLargest) {
  in_both_precisions([&]<class T>(T) {
    for (const T size : {T(3e2), T(1e15)}) {
      const Tokens<T> x = tokens_of_size(size);
      const reference::Matrix scores = x.q.template cast<double>() * x.k.template cast<double>().transpose();
      Matrix<T> out(kLength, 7), expected(kLength, 7);
      for (Index i = 0; i < kLength; ++i) {
        Index top = 0;
        scores.row(i).maxCoeff(&top);
        expected.row(i) = x.v.row(top);
      }
      Context context;
      attn::make_approximator<T>("softmax").forward({.q = x.q, .k = x.k, .v = x.v}, out, context);
      EXPECT_TRUE(test::bitwise_equal(out, expected)) << size;
    }
  });
}

/// kappa(q, q) = 1, computed as the exponential of a difference of squares whose last digit is above 1.
TEST(ExactExtremes, GaussianWeightsStayBelowOne) {
  const Tokens<float> x = tokens_of_size(1e4F, Family::self);
  const Matrix<float> ones = Matrix<float>::Ones(kLength, 7);
  Matrix<float> out(kLength, 7);
  Context context;
  attn::AnyApproximator<float>::Saved saved;
  for (const Index n_k : {kLength, Index{5}}) {  // in tiles, and in one
    const auto k = x.k.topRows(n_k), v = ones.topRows(n_k);
    attn::make_approximator<float>("gaussian").forward({.q = x.q, .k = k, .v = v}, out, context);
    EXPECT_LE(out.maxCoeff(), 1.0F) << n_k;
    EXPECT_GE(out.minCoeff(), 0.0F) << n_k;
    std::vector<float> lse(static_cast<std::size_t>(kLength));  // for which maxima are kept
    attn::kernel_matmul(attn::GaussianKernel{}, test::Inputs<float>{.q = x.q, .k = k, .v = v}, out,
                        std::span<float>(lse), context);
    EXPECT_LE(out.maxCoeff(), 1.0F + 1e-5F) << n_k;
  }
}

/// In the backward pass too: no dv_j is above the sum of dout.
template <class Kernel>
void expect_weights_of_the_backward_pass_below_one(const Kernel& kernel, float size) {
  const Tokens<float> x = tokens_of_size(size, Family::self);
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
  const Matrix<float> dout = Matrix<float>::Ones(kLength, 7);
  Matrix<float> out = dout, dq = x.q, dk = x.k, dv = x.v;
  std::vector<float> lse(static_cast<std::size_t>(kLength));
  Context context;
  attn::kernel_matmul(kernel, in, out, std::span<float>(lse), context);
  attn::kernel_matmul_backward(kernel, in, out, std::span<const float>(lse), dout, {dq, dk, dv}, context);
  EXPECT_LE(dv.maxCoeff(), static_cast<float>(kLength)) << size;
  EXPECT_GE(dv.minCoeff(), 0.0F) << size;
}

TEST(ExactExtremes, WeightsOfTheBackwardPassStayBelowOne) {
  for (const float size : {1e2F, 1e4F}) {
    expect_weights_of_the_backward_pass_below_one(attn::GaussianKernel{}, size);
    expect_weights_of_the_backward_pass_below_one(attn::GaussianKernel{.rows = Rows::normalized}, size);
    expect_weights_of_the_backward_pass_below_one(attn::SoftmaxKernel{}, size);
  }
}

TEST_P(Extremes, NonFiniteInputsComeOut) {
  in_both_precisions([&]<class T>(T) {
    for (const T value : {test::kNaN<T>, test::kInf<T>, -test::kInf<T>}) {
      Tokens<T> x = tokens_of_size(T(1));
      x.v(40, 3) = value;
      EXPECT_FALSE(forward(x).allFinite()) << "v with " << value;
      x = tokens_of_size(T(1));
      x.k(40, 3) = x.q(7, 5) = value;
      const Matrix<T> out = forward(x);  // which ends; infinite scores may weigh nothing
      if (std::isnan(value) && GetParam() != "mean-pooling") {
        EXPECT_FALSE(out.allFinite()) << "q and k with " << value;
      }
    }
  });
}

/// Half of a million tokens are a, the others b: whatever tokens the landmarks are, they are these two, whatever the
/// clusters, each has one of them, and every method is exact but for gamma and rounding.
TEST(Million, TokensOfTwoKinds) {
  constexpr Index kTokens = 1'000'000, kHalf = kTokens / 2, kFeatures = 8, kValues = 4;
  const Matrix<double> kinds = test::Random(802).normal(2, kFeatures);
  Matrix<float> x(kTokens, kFeatures), v(kTokens, kValues), out(kTokens, kValues);
  x.topRows(kHalf) = kinds.row(0).cast<float>().replicate(kHalf, 1);
  x.bottomRows(kHalf) = kinds.row(1).cast<float>().replicate(kHalf, 1);
  for (Index i = 0; i < v.size(); ++i) v.data()[i] = static_cast<float>(i % 11 - 5) + (i < v.size() / 2 ? 3.0F : -2.0F);
  Matrix<double> means(2, kValues);
  means.row(0) = v.topRows(kHalf).cast<double>().colwise().mean();
  means.row(1) = v.bottomRows(kHalf).cast<double>().colwise().mean();
  const attn::MethodOptions options{.num_landmarks = 8,
                                    .num_clusters = 8,
                                    .num_groups = 8,
                                    .num_near = 0,
                                    .gamma = 1e-5,
                                    .rows = attn::Rows::normalized};
  for (const std::string name : {"multipole", "nystrom", "shifted-nystrom", "skyformer", "lifted-softmax"}) {
    const bool gaussian = name == "skyformer";
    const auto kernel =
        gaussian ? reference::gaussian_kernel(kFeatures, {}, true) : reference::softmax_kernel(kFeatures);
    const reference::Matrix expected = attend(kernel, {kinds, kinds, means}).out;
    Context context;
    attn::find_method<float>(name).make(options).forward({.q = x, .k = x, .v = v}, out, context);
    EXPECT_LE(test::relative_error<float>(out.topRows(kHalf), expected.row(0).replicate(kHalf, 1)), 2e-3) << name;
    EXPECT_LE(test::relative_error<float>(out.bottomRows(kHalf), expected.row(1).replicate(kHalf, 1)), 2e-3) << name;
  }
}

}  // namespace
