/// How much scratch memory a method takes beside its inputs and its result.
#include <attn/any_approximator.hpp>
#include <attn/multipole.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <string>

namespace {

using test::Context;
using test::Index;
using test::Inputs;
using test::Matrix;

/// Bytes that a context holds after a method with 64 landmarks has run on n tokens of 64 features.
template <class T = float>
std::size_t scratch_after(const std::string& name, Index n, attn::Rows rows = attn::Rows::raw) {
  const Matrix<T> q = Matrix<float>::Random(n, 64).cast<T>(), k = Matrix<float>::Random(n, 64).cast<T>(),
                  v = Matrix<float>::Random(n, 64).cast<T>();
  Matrix<T> out(n, 64);
  Context context;
  const auto method = attn::find_method<T>(name).make({.num_landmarks = 64, .rows = rows});
  method.forward(Inputs<T>{.q = q, .k = k, .v = v}, out, context);
  return context.scratch_bytes();
}

TEST(Memory, OfApproximationsStaysBelow4MiBFor65536Tokens) {
  for (const std::string name : {"nystrom", "shifted-nystrom", "skyformer", "lifted-softmax"}) {
    const std::size_t bytes = scratch_after(name, 65536);
    RecordProperty(name, std::to_string(bytes));
    EXPECT_LT(bytes, std::size_t{4} << 20) << name;
  }
  EXPECT_LT(scratch_after("skyformer", 65536, attn::Rows::normalized), std::size_t{4} << 20);
}

/// Beside keys and values in the order of clusters, what some regions know of all branches, two at a time, and spreads
/// of clusters.
TEST(Memory, OfMultipoleIsLittleBesideACopyOfKeysAndValues) {
  constexpr Index kTokens = 65536, kWidth = 64;
  const Matrix<float> x = Matrix<float>::Random(kTokens, kWidth);
  Matrix<float> out(kTokens, kWidth);
  Context context;
  attn::Multipole<float>().forward({.q = x, .k = x, .v = x}, out, context);
  constexpr std::size_t kCopies = std::size_t{kTokens} * 2 * kWidth * sizeof(float);
  RecordProperty("multipole", std::to_string(context.scratch_bytes()));
  EXPECT_LT(context.scratch_bytes(), kCopies + (std::size_t{13} << 20));
}

TEST(Memory, HoldsNoCopiesOfNarrowTokens) {
  for (const std::string name : {"softmax", "gaussian", "nystrom", "shifted-nystrom", "skyformer", "lifted-softmax"}) {
    EXPECT_LT(scratch_after<Eigen::half>(name, 8192), std::size_t{4} << 20) << name;  // copies would take 8 MiB
  }
}

TEST(Memory, OfExactMethodsDoesNotGrowWithTheTokens) {
  for (const std::string name : {"softmax", "gaussian"}) {
    EXPECT_EQ(scratch_after(name, 4096), scratch_after(name, 8192)) << name;
  }
}

}  // namespace
