#include <attn/automatic.hpp>

#include <attn/any_approximator.hpp>
#include <attn/metrics.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace {

using attn::Automatic;
using attn::Choice;
using attn::GaussianKernel;
using attn::Plan;
using attn::Rows;
using attn::SoftmaxKernel;
using test::Context;
using test::error_of;
using test::Family;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;

/// Enough tokens that a search is worth its time.
constexpr Index kMany = 3500;

template <class T>
const test::Tokens<T>& smooth() {
  static const auto tokens = test::make_tokens<T>(Family::smooth, {kMany, kMany, 32, 32}, 4);
  return tokens;
}

template <class T>
Inputs<T> inputs(const test::Tokens<T>& x, const Mask& mask = {}) {
  return {x.q, x.k, x.v, mask};
}

template <class T, class Kernel>
Matrix<T> forward(const Automatic<T, Kernel>& method, const Inputs<T>& in, Choice& choice) {
  Context context;
  Matrix<T> out = Matrix<T>::Constant(in.q.rows(), in.v.cols(), T(7));
  method.forward(in, out, context, choice);
  return out;
}

template <class T, class Kernel = SoftmaxKernel>
double error(const Matrix<T>& out, const Inputs<T>& in, const Kernel& kernel = {}) {
  return attn::relative_frobenius_error(out, test::forward(attn::ExactAttention<T, Kernel>(kernel), in));
}

template <class T>
Matrix<T> by_plan(const Plan& plan, const Inputs<T>& in) {
  return plan.exact ? test::forward(attn::SoftmaxAttention<T>{}, in)
                    : test::forward(attn::Multipole<T>(plan.clusters), in);
}

/// Rows that the search has not tried show what these do not.
TEST(AutomaticAttention, MeetsTheErrorWithOneLargeKey) {
  auto x = smooth<float>();
  x.k.row(5).setConstant(100);
  for (std::uint64_t seed = 0; seed < 4; ++seed) {
    Choice choice;
    const Matrix<float> out = forward(Automatic<float>{.max_error = 0.1, .seed = seed}, inputs(x), choice);
    EXPECT_LE(error(out, inputs(x)), 0.15) << seed;
  }
}

TEST(AutomaticAttention, MeetsTheErrorByItsPlan) {
  const Inputs<float> in = inputs(smooth<float>());
  double before = 1;
  for (const double max_error : {0.2, 0.1, 0.001}) {
    Choice choice;
    const Matrix<float> out = forward(Automatic<float>{.max_error = max_error}, in, choice);
    EXPECT_LE(error(out, in), max_error);
    EXPECT_TRUE(test::bitwise_equal(out, by_plan(choice.plan, in))) << max_error;
    EXPECT_EQ(choice.plan.exact, max_error < 0.01);
    EXPECT_LE(error(out, in), before);
    before = error(out, in);
    if (choice.plan.exact) continue;
    EXPECT_GT(choice.trials, 0);
    EXPECT_NEAR(choice.estimate.error, error(out, in), 0.4 * error(out, in));
    EXPECT_LE(choice.estimate.lower, choice.estimate.error);
    EXPECT_GT(choice.estimate.upper, choice.estimate.error);
    EXPECT_GE(choice.estimate.rows, 40);
  }
}

TEST(AutomaticAttention, IsExactForFewTokensNoErrorAndCausalMasks) {
  const auto x = test::make_tokens<float>(Family::smooth, {300, 200, 16, 8}, 4);
  Choice choice;
  const Matrix<float> few = forward(Automatic<float>{}, inputs(x), choice);
  EXPECT_TRUE(choice.plan.exact);
  EXPECT_TRUE(test::bitwise_equal(few, by_plan({}, inputs(x))));
  const Inputs<float> many = inputs(smooth<float>());
  const Matrix<float> exact = forward(Automatic<float>{.max_error = 0}, many, choice);
  EXPECT_EQ(choice.trials, 0);
  EXPECT_TRUE(test::bitwise_equal(exact, by_plan({}, many)));
  const Inputs<float> causal = inputs(smooth<float>(), {.causal = attn::Causal::lower_right});
  const Matrix<float> later = forward(Automatic<float>{.max_error = 0.2}, causal, choice);
  EXPECT_TRUE(choice.plan.exact);
  EXPECT_TRUE(test::bitwise_equal(later, by_plan({}, causal)));
}

TEST(AutomaticAttention, GivesUpOnTokensWithoutStructure) {
  const auto x = test::make_tokens<float>(Family::unit, {kMany, kMany, 32, 8}, 4);
  Choice choice;
  const Matrix<float> out = forward(Automatic<float>{.max_error = 0.1}, inputs(x), choice);
  EXPECT_TRUE(choice.plan.exact);
  EXPECT_LE(choice.trials, 2);
  EXPECT_TRUE(test::bitwise_equal(out, by_plan({}, inputs(x))));
}

TEST(AutomaticAttention, FollowsAHintThatMeetsTheError) {
  const Inputs<float> in = inputs(smooth<float>());
  Choice found, again, other;
  const Automatic<float> method{.max_error = 0.1};
  const Matrix<float> out = forward(method, in, found);
  ASSERT_FALSE(found.plan.exact);
  EXPECT_TRUE(test::bitwise_equal(forward(Automatic<float>{.max_error = 0.1, .hint = found.plan}, in, again), out));
  EXPECT_EQ(again.plan, found.plan);
  EXPECT_EQ(again.trials, 0);
  EXPECT_EQ(again.estimate.rows, 64);
  const Plan coarse{.exact = false, .clusters = {.num_near = 1, .num_open = 1}};
  EXPECT_TRUE(test::bitwise_equal(forward(Automatic<float>{.max_error = 0.1, .hint = coarse}, in, other), out));
  EXPECT_EQ(other.plan, found.plan);
  EXPECT_TRUE(
      test::bitwise_equal(forward(Automatic<float>{.max_error = 0.1, .hint = Plan{}}, in, other), by_plan({}, in)));
}

TEST(AutomaticAttention, TakesMasksAndBiases) {
  const auto keep_query = test::random_keep(kMany, 0.95, 8), keep_key = test::random_keep(kMany, 0.95, 9);
  std::vector<float> bias(kMany, 0.5F);
  bias[7] = -test::kInf<float>;
  Inputs<float> in = inputs(smooth<float>(), {.keep_key = keep_key, .keep_query = keep_query});
  in.key_bias = bias;
  Choice choice;
  const Matrix<float> out = forward(Automatic<float>{.max_error = 0.15}, in, choice);
  EXPECT_FALSE(choice.plan.exact);
  EXPECT_LE(error(out, in), 0.15);
  EXPECT_TRUE(test::bitwise_equal(out, by_plan(choice.plan, in)));
}

TEST(AutomaticAttention, OfGaussianKernels) {
  const auto& x = smooth<float>();
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const GaussianKernel kernel{.bandwidth = 4, .rows = rows};
    Choice choice;
    const Matrix<float> out =
        forward(Automatic<float, GaussianKernel>{.max_error = 0.2, .kernel = kernel}, inputs(x), choice);
    EXPECT_FALSE(choice.plan.exact);
    EXPECT_LE(error(out, inputs(x), kernel), 0.2);
  }
}

TEST(AutomaticAttention, OfOtherTypes) {
  const Inputs<float> in = inputs(smooth<float>());
  const auto as = [&]<class T>(T, double rounding) {
    const Matrix<T> q = in.q.cast<T>(), k = in.k.cast<T>(), v = in.v.cast<T>();
    Choice choice;
    const Matrix<T> out = forward(Automatic<T>{.max_error = 0.1}, Inputs<T>{q, k, v}, choice);
    EXPECT_FALSE(choice.plan.exact);
    const Matrix<float> exact = attn::attention(attn::SoftmaxAttention<float>{}, q.template cast<float>().eval(),
                                                k.template cast<float>().eval(), v.template cast<float>().eval());
    EXPECT_LE(attn::relative_frobenius_error(out.template cast<float>(), exact), 0.1 + rounding);
    EXPECT_TRUE(test::bitwise_equal(out, attn::attention(attn::Multipole<T>(choice.plan.clusters), q, k, v)));
  };
  as(Eigen::half{}, 1e-3);
  as(Eigen::bfloat16{}, 1e-2);
  as(double{}, 0);
}

TEST(AutomaticAttention, DoesNotDependOnTheWorkers) {
  const Inputs<float> in = inputs(smooth<float>());
  const Automatic<float> method{.max_error = 0.1};
  const Matrix<float> serial = test::forward(method, in);
  for (auto& [name, context] : test::contexts()) {
    EXPECT_TRUE(test::bitwise_equal(test::forward(method, in, context), serial)) << name;
  }
}

TEST(AutomaticAttention, TrainsByItsPlan) {
  for (const double max_error : {0.1, 0.0}) {
    const Inputs<float> in = inputs(smooth<float>());
    const Automatic<float> method{.max_error = max_error};
    Automatic<float>::Saved saved;
    Context context;
    Matrix<float> out(kMany, 32), dout = test::Random(3).normal(kMany, 32).cast<float>();
    method.forward(in, out, context, saved);
    EXPECT_EQ(saved.choice.plan.exact, max_error == 0);
    EXPECT_TRUE(test::bitwise_equal(out, test::forward(method, in)));
    const auto gradients = [&](const auto& by, const auto& kept) {
      Matrix<float> all(3 * kMany, 32);
      by.backward(in, out, dout, kept, {all.topRows(kMany), all.middleRows(kMany, kMany), all.bottomRows(kMany)},
                  context);
      return all;
    };
    const auto as = [&](const auto& by) {
      typename std::remove_cvref_t<decltype(by)>::Saved kept;
      Matrix<float> same(kMany, 32);
      by.forward(in, same, context, kept);
      return gradients(by, kept);
    };
    const Matrix<float> expected =
        max_error == 0 ? as(attn::SoftmaxAttention<float>{}) : as(attn::Multipole<float>(saved.choice.plan.clusters));
    EXPECT_TRUE(test::bitwise_equal(gradients(method, saved), expected));
  }
}

TEST(AutomaticAttention, NaNsReachTheRowsOfExactAttention) {
  auto x = smooth<float>();
  x.k(33, 2) = test::kNaN<float>;
  Choice choice;
  EXPECT_TRUE(forward(Automatic<float>{.max_error = 0.2}, inputs(x), choice).array().isNaN().all());
  EXPECT_TRUE(choice.plan.exact);
}

TEST(AutomaticAttention, RefusesWhatIsWrong) {
  const auto x = test::make_tokens<float>(Family::init, {20, 10, 8, 4}, 2);
  const Inputs<float> in = inputs(x);
  Context context;
  Matrix<float> out(20, 4);
  EXPECT_EQ(error_of([&] { Automatic<float>{.max_error = -1}.forward(in, out, context); }),
            "automatic: max_error is -1, should be at least 0");
  EXPECT_EQ(error_of([&] {
              Automatic<float>{.hint = Plan{false, {.num_open = 0}}}.forward(in, out, context);
            }),
            "automatic: num_open is 0, should be at least 1");
  Matrix<float> other(10, 4);
  EXPECT_EQ(error_of([&] { Automatic<float>{}.forward(in, other, context); }),
            "automatic: out is 10 x 4, should be 20 x 4");
}

/// How often, over random problems, the true error exceeds what was asked for.
TEST(AutomaticAttention, KeepsItsPromise) {
  int exceeding = 0, approximate = 0, all = 0;
  for (const Family family : {Family::smooth, Family::clusters, Family::self, Family::unit}) {
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      test::Random random(seed);
      const Index n = 3300 + random.below(600), d = 24 + random.below(17);
      const auto x = test::make_tokens<float>(family, {n, n, d, 32}, seed);
      const double max_error = std::exp2(-2 - 3 * random.uniform());
      Choice choice;
      const double found =
          error(forward(Automatic<float>{.max_error = max_error, .seed = seed}, inputs(x), choice), inputs(x));
      EXPECT_LE(found, 1.5 * max_error);
      exceeding += found > max_error ? 1 : 0;
      approximate += choice.plan.exact ? 0 : 1;
      ++all;
    }
  }
  EXPECT_LE(exceeding, all / 20);
  EXPECT_GE(approximate, all / 4);
}

}  // namespace
