#include <attn/error_estimate.hpp>

#include <attn/any_approximator.hpp>
#include <attn/metrics.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace {

using attn::Causal;
using attn::ErrorEstimate;
using attn::ErrorSample;
using attn::GaussianKernel;
using attn::Rows;
using attn::SoftmaxKernel;
using test::Context;
using test::error_of;
using test::Family;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;

constexpr ErrorSample kAllRows{.num_rows = 1000};

/// Exact attention in double, of the tokens as T holds them.
template <class T, class Kernel>
Matrix<double> exact(const Kernel& kernel, const Inputs<T>& in) {
  const Matrix<double> q = in.q.template cast<double>(), k = in.k.template cast<double>(),
                       v = in.v.template cast<double>();
  std::vector<double> bias;
  for (const T a : in.key_bias) bias.push_back(static_cast<double>(static_cast<attn::detail::Arithmetic<T>>(a)));
  return test::forward(attn::ExactAttention<double, Kernel>(kernel), {q, k, v, in.mask, bias});
}

/// Some result that is off by noise, and 0 in dropped rows.
template <class T>
Matrix<T> perturbed(const Matrix<double>& exact, const Mask& mask) {
  families::Random random(5);
  Matrix<double> out = exact + 0.1 * random.normal(exact.rows(), exact.cols());
  for (Index i = 0; i < out.rows(); ++i) {
    if (!reference::kept(mask.keep_query, i)) out.row(i).setZero();
  }
  return out.cast<T>();
}

template <class T, class Kernel>
void expect_the_error_of_all_rows(const Kernel& kernel) {
  const Index n_q = 53;
  for (const Index n_k : {40, 53, 71}) {
    const auto x = test::make_tokens<T>(Family::init, {n_q, n_k, 12, 7}, 3);
    const auto keep_query = test::random_keep(n_q, 0.8, 6), keep_key = test::random_keep(n_k, 0.8, 7);
    std::vector<T> bias(static_cast<std::size_t>(n_k), T(0.5F));
    bias[3] = T(-std::numeric_limits<float>::infinity());
    bias[9] = T(2.0F);
    Context context;
    for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
      const Index window = causal == Causal::none ? 0 : 9;
      for (const Mask& mask : {Mask{causal}, Mask{causal, keep_key, keep_query}, Mask{causal, {}, {}, window},
                               Mask{causal, keep_key, {}, window, window == 0 ? 0 : 4}}) {
        const Inputs<T> in{x.q, x.k, x.v, mask, bias};
        SCOPED_TRACE(test::describe(in));
        const Matrix<double> expected = exact(kernel, in);
        const Matrix<T> out = perturbed<T>(expected, mask);
        const double error = attn::relative_frobenius_error(out.template cast<double>(), expected);
        const ErrorEstimate estimate = attn::estimate_error(kernel, in, out, kAllRows, context);
        EXPECT_NEAR(estimate.error, error, 1e-5 * error);
        EXPECT_EQ(estimate.lower, estimate.error);
        EXPECT_EQ(estimate.upper, estimate.error);
      }
    }
  }
}

template <class T>
class ErrorEstimateOfType : public ::testing::Test {};
using AllScalars = ::testing::Types<float, double, Eigen::half, Eigen::bfloat16>;
TYPED_TEST_SUITE(ErrorEstimateOfType, AllScalars);

TYPED_TEST(ErrorEstimateOfType, OfAllRowsIsTheError) {
  expect_the_error_of_all_rows<TypeParam>(SoftmaxKernel{});
  expect_the_error_of_all_rows<TypeParam>(GaussianKernel{});
}

TEST(ErrorEstimates, OfNormalizedRows) {
  expect_the_error_of_all_rows<float>(GaussianKernel{.rows = Rows::normalized});
}

/// Over families of tokens and methods, each with some seeds: how many estimates are within 20 % of the true error, and
/// how often it lies in the interval.
TEST(ErrorEstimates, AreCloseAndTheirIntervalsHoldTheError) {
  constexpr int kSeeds = 20;
  double close = 0, inside = 0, all = 0;
  Context context;
  for (const Family family : families::kFamilies) {
    const auto x = test::make_tokens<float>(family, {700, 700, 16, 16}, 4);
    const Inputs<float> in{x.q, x.k, x.v};
    const Matrix<float> expected = test::forward(attn::SoftmaxAttention<float>{}, in);
    for (const std::string name : {"multipole", "nystrom", "lifted-softmax"}) {
      const auto method = attn::find_method<float>(name).make({.num_landmarks = 32, .num_near = 12});
      const Matrix<float> out = test::forward(method, in);
      const double error = attn::relative_frobenius_error(out, expected);
      for (int seed = 0; seed < kSeeds; ++seed) {
        const ErrorSample sample{.seed = static_cast<std::uint64_t>(seed)};
        const ErrorEstimate estimate = attn::estimate_error(SoftmaxKernel{}, in, out, sample, context);
        EXPECT_EQ(estimate.rows, 64);
        close += std::abs(estimate.error / error - 1) < 0.2 ? 1 : 0;
        inside += estimate.lower <= error && error <= estimate.upper ? 1 : 0;
        ++all;
      }
    }
  }
  EXPECT_GT(close / all, 0.85);
  EXPECT_GT(inside / all, 0.9);
}

TEST(ErrorEstimates, DependOnTheSeedAlone) {
  const auto x = test::make_tokens<double>(Family::smooth, {300, 200, 8, 5}, 9);
  for (const Causal causal : {Causal::none, Causal::lower_right}) {
    const Inputs<double> in{x.q, x.k, x.v, {causal}};
    const Matrix<double> out = perturbed<double>(exact(SoftmaxKernel{}, in), in.mask);
    const auto estimate = [&](std::uint64_t seed, Context& context) {
      return attn::estimate_error(attn::SoftmaxAttention<double>{}, in, out, {.num_rows = 20, .seed = seed}, context);
    };
    Context serial;
    const double first = estimate(1, serial).error;
    for (auto& [name, context] : test::contexts()) EXPECT_EQ(estimate(1, context).error, first) << name;
    EXPECT_NE(estimate(2, serial).error, first);
  }
}

TEST(ErrorEstimates, OfAnExactResultIsRounding) {
  const auto x = test::make_tokens<float>(Family::clusters, {500, 400, 16, 16}, 9);
  const Inputs<float> in{x.q, x.k, x.v};
  Context context;
  const Matrix<float> out = test::forward(attn::SoftmaxAttention<float>{}, in);
  EXPECT_LT(attn::estimate_error(SoftmaxKernel{}, in, out, {}, context).upper, 1e-6);
}

TEST(ErrorEstimates, OfSpecialValues) {
  const auto x = test::make_tokens<float>(Family::init, {200, 200, 8, 4}, 2);
  const std::vector<std::uint8_t> none(200, 0);
  Context context;
  const Inputs<float> in{x.q, x.k, x.v}, dropped{x.q, x.k, x.v, {.keep_query = none}};
  const auto of = [&](const Inputs<float>& inputs, const Matrix<float>& out, Index rows) {
    return attn::estimate_error(SoftmaxKernel{}, inputs, out, {.num_rows = rows}, context);
  };
  const Matrix<float> zero = Matrix<float>::Zero(200, 4);
  EXPECT_NEAR(of(in, zero, 64).error, 1, 1e-12);
  EXPECT_EQ(of(dropped, zero, 64).error, 0);
  EXPECT_EQ(of(dropped, zero, 64).rows, 0);
  Matrix<float> out = zero;
  out(117, 2) = test::kNaN<float>;
  EXPECT_TRUE(std::isnan(of(in, out, 8).error));
  const ErrorEstimate single = of(in, Matrix<float>::Constant(200, 4, 1e30F), 1);
  EXPECT_GT(single.error, 1e28);
  EXPECT_EQ(single.lower, 0);
  EXPECT_EQ(single.upper, test::kInf<double>);
}

TEST(ErrorEstimates, RefuseWhatIsWrong) {
  const auto x = test::make_tokens<float>(Family::init, {20, 10, 8, 4}, 2);
  const Inputs<float> in{x.q, x.k, x.v};
  Context context;
  EXPECT_EQ(error_of([&] { attn::estimate_error(SoftmaxKernel{}, in, x.v, {}, context); }),
            "estimate_error: out is 10 x 4, should be 20 x 4");
  const Matrix<float> out = Matrix<float>::Zero(20, 4);
  EXPECT_EQ(error_of([&] { attn::estimate_error(SoftmaxKernel{}, in, out, {.num_rows = 0}, context); }),
            "estimate_error: num_rows is 0, should be at least 1");
}

TEST(ErrorEstimate, KnowsWeightsThatFallWithDistance) {
  const auto x = test::make_tokens<float>(Family::init, {300, 300, 16, 7}, 9);
  const auto keep = test::random_keep(300, 0.9, 10);
  for (const Index window : {0, 50}) {
    const Inputs<float> in{.q = x.q,
                           .k = x.k,
                           .v = x.v,
                           .mask = {.causal = Causal::upper_left, .keep_key = keep, .window = window},
                           .alibi_slope = 0.5};
    Context context;
    const Matrix<float> out = test::forward(attn::SoftmaxAttention<float>{}, in);
    EXPECT_LT(estimate_error(SoftmaxKernel{}, in, out, {}, context).error, 2e-6) << window;
  }
}

TEST(ErrorEstimate, SeesOneHugeNumber) {
  const auto x = test::make_tokens<float>(Family::init, {700, 700, 16, 7}, 11);
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
  Context context;
  const Matrix<float> exact = test::forward(attn::SoftmaxAttention<float>{}, in);
  for (const float huge : {1e30F, 3e38F, std::numeric_limits<float>::infinity()}) {
    Matrix<float> out = exact;
    out(333, 2) = huge;
    EXPECT_GT(estimate_error(SoftmaxKernel{}, in, out, {}, context).error, 1e20) << huge;
  }
}

}  // namespace
