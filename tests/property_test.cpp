/// What must hold of the approximations' errors whatever the numbers are.
#include <attn/attn.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace {

using test::Family;
using test::Index;
using test::Matrix;

/// The median over seeds of a method's relative error on smooth tokens.
double median_error(const std::string& method, const std::string& target, Index m) {
  std::vector<double> errors;
  for (const std::uint64_t seed : {1U, 2U, 3U, 4U, 5U}) {
    const auto x = test::make_tokens<double>(Family::smooth, {256, 256, 16, 8}, seed);
    const auto approximation = attn::find_method<double>(method).make({.num_landmarks = m, .seed = seed});
    errors.push_back(test::relative_error(attn::attention(approximation, x.q, x.k, x.v),
                                          attn::attention(attn::make_approximator<double>(target), x.q, x.k, x.v)));
  }
  std::ranges::nth_element(errors, errors.begin() + 2);
  return errors[2];
}

TEST(Properties, ErrorsFallWithTheNumberOfLandmarksOnSmoothTokens) {
  for (const auto& [method, target] : {std::pair<std::string, std::string>{"nystrom", "softmax"},
                                       {"shifted-nystrom", "softmax"},
                                       {"skyformer", "gaussian"}}) {
    const double first = median_error(method, target, 8);
    double before = first;
    for (const Index m : {16, 32, 64, 128}) {
      const double error = median_error(method, target, m);
      EXPECT_LT(error, before) << method << ", " << m << " landmarks";
      before = error;
    }
    EXPECT_LT(before, 0.3 * first) << method;
  }
}

/// Smallest and largest eigenvalue of a symmetric matrix.
std::pair<double, double> range_of(const Matrix<double>& a) {
  const Eigen::VectorXd values = reference::eigenvalues(a);
  return {values.minCoeff(), values.maxCoeff()};
}

/// C~ <= C <= C~ + lambda I. With q = k = X and the same seed, fewer landmarks are among more of them, so that C~ only
/// grows and lambda only falls, to at most gamma / 2 where each token is a landmark twice:
/// C - C (C + (gamma / 2) I)^-1 C = (gamma / 2) C (C + (gamma / 2) I)^-1.
TEST(Properties, SkyformerGrowsTowardsTheKernelMatrixInTheLoewnerOrder) {
  constexpr Index kTokens = 90;
  constexpr double kGamma = 0.1, kRounding = 1e-9;
  const Matrix<double> identity = Matrix<double>::Identity(kTokens, kTokens);
  for (const Family family : {Family::init, Family::smooth, Family::clusters}) {
    const auto x = test::make_tokens<double>(family, {kTokens, kTokens, 16, 1}, 5);
    const Matrix<double> c = reference::attend(reference::gaussian_kernel(16), {x.q, x.q, identity, {}, {}}).out;
    Matrix<double> before = Matrix<double>::Zero(kTokens, kTokens);
    double lambda = range_of(c).second;
    for (const Index m : {10, 20, 40, 80, 180}) {
      const auto method =
          attn::make_approximator<double>("skyformer", {.num_landmarks = m, .gamma = kGamma, .seed = 3});
      const Matrix<double> approximation = attn::attention(method, x.q, x.q, identity);
      const auto rest = range_of(c - approximation);
      EXPECT_GE(rest.first, -kRounding) << m;
      EXPECT_LE(rest.second, lambda + kRounding) << m;
      EXPECT_GE(range_of(approximation - before).first, -kRounding) << m;
      lambda = rest.second;
      before = approximation;
    }
    EXPECT_LE(lambda, kGamma / 2);
    EXPECT_GT(lambda, 0);
  }
}

}  // namespace
