/// Methods on random shapes, strides, masks and options, against the oracle.
#include "common/random_problem.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace {

using test::Context;
using test::Index;
using test::Inputs;
using test::Matrix;
using test::Random;
using test::RandomProblem;

Context draw_context(Random& random) {
  const auto count = static_cast<int>(random.below(4));
  return count == 0 ? Context{} : Context{test::Threads{.count = count}};
}

attn::MethodOptions draw_options(Random& random) {
  return {.num_landmarks = 1 + random.below(20),
          .gamma = random.below(2) == 0 ? 0.1 : 0.01,
          .seed = static_cast<std::uint64_t>(random.below(100)),
          .rows = random.below(2) == 0 ? attn::Rows::raw : attn::Rows::normalized};
}

template <class T>
void expect_oracle(const std::string& name, std::uint64_t seed) {
  constexpr Index kLongest = 150;
  Random random(seed);
  const bool exact = name == "softmax" || name == "gaussian";
  RandomProblem<T> problem(random, kLongest, false, exact);
  const attn::MethodOptions options = draw_options(random);
  SCOPED_TRACE("seed " + std::to_string(seed) + ": " + problem.text() + ", landmarks " +
               std::to_string(*options.num_landmarks));
  Context context = draw_context(random);
  const Inputs<T> in = problem.inputs();
  attn::find_method<T>(name).make(options).forward(in, problem.out(), context);
  const reference::Matrix out = problem.out().template cast<double>();
  EXPECT_LE(test::error_ratio<T>(out, test::expected(name, options, in)), 1);
  EXPECT_TRUE(problem.padding_untouched());
}

class RandomProblems : public ::testing::TestWithParam<const char*> {};

TEST_P(RandomProblems, AgreeWithTheOracle) {
  for (std::uint64_t seed = 0; seed < 150; ++seed) {
    expect_oracle<float>(GetParam(), 2 * seed);
    expect_oracle<double>(GetParam(), 2 * seed + 1);
  }
}

INSTANTIATE_TEST_SUITE_P(Every, RandomProblems,
                         ::testing::Values("softmax", "gaussian", "nystrom", "skyformer", "lifted-softmax"),
                         [](const auto& method) {
                           return method.index == 4 ? std::string("lifted_softmax") : method.param;
                         });

/// Gradients of exact attention; those of the other methods have tests by differences.
template <class T>
void expect_gradients_of_oracle(std::uint64_t seed) {
  Random random(seed);
  RandomProblem<T> problem(random, 100, false, true);
  const bool softmax = random.below(2) == 0;
  SCOPED_TRACE("seed " + std::to_string(seed) + ": " + problem.text() + (softmax ? ", softmax" : ", gaussian"));
  Context context = draw_context(random);
  const Inputs<T> in = problem.inputs();
  const Matrix<T> dout = random.normal(in.q.rows(), in.v.cols()).template cast<T>();
  Matrix<T> dq(in.q.rows(), in.q.cols()), dk(in.k.rows(), in.k.cols()), dv(in.v.rows(), in.v.cols());
  const auto method = attn::make_approximator<T>(softmax ? "softmax" : "gaussian");
  typename attn::AnyApproximator<T>::Saved saved;
  method.forward(in, problem.out(), context, saved);
  method.backward(in, problem.out(), dout, saved, {dq, dk, dv}, context);
  const auto kernel = softmax ? reference::softmax_kernel(in.q.cols()) : reference::gaussian_kernel(in.q.cols());
  const auto expected = attend_backward(kernel, test::to_reference(in), dout.template cast<double>());
  const double tolerance = sizeof(T) == 4 ? 2e-5 : 1e-11;
  for (const auto& [found, wanted] :
       {std::pair<const Matrix<T>&, const reference::Matrix&>{dq, expected.dq}, {dk, expected.dk}, {dv, expected.dv}}) {
    EXPECT_LE((found.template cast<double>() - wanted).norm(), tolerance * (1 + wanted.norm()));
  }
}

TEST(RandomGradients, AgreeWithTheOracle) {
  for (std::uint64_t seed = 1000; seed < 1100; ++seed) {
    expect_gradients_of_oracle<float>(2 * seed);
    expect_gradients_of_oracle<double>(2 * seed + 1);
  }
}

}  // namespace
