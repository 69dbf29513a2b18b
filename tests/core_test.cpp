#include <attn/core.hpp>

#include "support.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <string_view>

namespace {

using attn::PreconditionedPinv;
using attn::RidgeInverse;
using test::Context;
using test::Index;
using test::Matrix;

/// A core of a user's: one that says nothing of symmetry is taken to need none.
template <class T>
struct Halved {
  void check(std::string_view) const {}
  void apply(test::MatrixRef<T>, test::MatrixRef<T> x, Context&) const { x /= 2; }
  void backward(test::MatrixRef<T>, test::MatrixRef<T>, test::MatrixRef<T> dx, test::MatrixRef<T>, Context&) const { dx /= 2; }
};
template <class T>
struct HalvedSymmetric : Halved<T> {
  static constexpr bool kSymmetricOnly = true;
};
static_assert(attn::CoreOfAnyMatrix<Halved<float>, float> && attn::CoreOfAnyMatrix<attn::IterativePinv, double>);
static_assert(attn::Core<HalvedSymmetric<float>, float> && !attn::CoreOfAnyMatrix<HalvedSymmetric<float>, float>);
static_assert(attn::Core<RidgeInverse, float> && !attn::CoreOfAnyMatrix<RidgeInverse, float>);
static_assert(attn::Core<PreconditionedPinv, double> && !attn::CoreOfAnyMatrix<PreconditionedPinv, double>);

/// kappa(L, L) of m random landmarks.
reference::Matrix landmark_kernel(Index m, std::uint64_t seed) {
  const reference::Matrix landmarks = test::Random(seed).normal(m, 16) * 0.55;
  return log_kernel(reference::gaussian_kernel(16), landmarks, landmarks).array().exp();
}

/// What a core makes of a and x, which lie in padded matrices.
template <class T, class Core>
Matrix<T> apply(const Core& core, const reference::Matrix& a, const reference::Matrix& x, Context& context) {
  test::Padded<T> padded_a(Matrix<T>(a.cast<T>()), 3, T(-7)), padded_x(Matrix<T>(x.cast<T>()), 2, T(-7));
  core.apply(padded_a.view(), padded_x.view(), context);
  EXPECT_TRUE(padded_a.padding_untouched() && padded_x.padding_untouched());
  return padded_x.matrix();
}

template <class T>
class CoreOf : public ::testing::Test {};
TYPED_TEST_SUITE(CoreOf, test::Scalars);

constexpr Index kSizes[] = {1, 2, 3, 7, 16, 33, 64, 65, 130, 257};

TYPED_TEST(CoreOf, RidgeInverseIsTheInverse) {
  using T = TypeParam;
  Context context;
  for (const Index m : kSizes) {
    for (const Index columns : {1, 5, 66}) {
      SCOPED_TRACE(std::to_string(m) + " x " + std::to_string(columns));
      const reference::Matrix a = landmark_kernel(m, 41), x = test::Random(42).normal(m, columns);
      const Matrix<T> y = apply<T>(RidgeInverse{.gamma = 0.1}, a, x, context);
      EXPECT_LE(test::relative_error(y, reference::ridge_inverse(a, 0.1) * x), sizeof(T) == 4 ? 2e-4 : 1e-12);
      const reference::Matrix back = (a + 0.1 * reference::Matrix::Identity(m, m)) * y.template cast<double>();
      EXPECT_LE((back - x).norm() / x.norm(), sizeof(T) == 4 ? 2e-5 : 1e-13);
    }
  }
}

TYPED_TEST(CoreOf, PreconditionedPinvFollowsItsIteration) {
  using T = TypeParam;
  Context context;
  for (const Index m : kSizes) {
    for (const int iterations : {1, 6}) {
      SCOPED_TRACE(std::to_string(m) + ", " + std::to_string(iterations) + " iterations");
      const reference::Matrix a = landmark_kernel(m, 43), x = test::Random(44).normal(m, 20);
      const Matrix<T> y = apply<T>(PreconditionedPinv{.gamma = 0.1, .iterations = iterations}, a, x, context);
      EXPECT_LE(test::relative_error(y, reference::preconditioned_pinv(a, 0.1, iterations) * x), sizeof(T) == 4 ? 1e-4 : 1e-12);
    }
  }
}

TEST(Core, PreconditionedPinvApproachesTheInverse) {
  Context context;
  const reference::Matrix a = landmark_kernel(40, 45), x = test::Random(46).normal(40, 8);
  const Matrix<double> exact = apply<double>(RidgeInverse{.gamma = 0.1}, a, x, context);
  EXPECT_LE(test::relative_error(apply<double>(PreconditionedPinv{.gamma = 0.1, .iterations = 20}, a, x, context), exact), 1e-10);
}

/// Duplicate landmarks without a ridge: the matrix is singular, the result is finite and solves what can be solved.
TYPED_TEST(CoreOf, RidgeInverseLeavesOutSingularDirections) {
  using T = TypeParam;
  Context context;
  for (const Index m : {4, 60, 140}) {
    const reference::Matrix half = test::Random(47).normal(m / 2, 16);
    reference::Matrix landmarks(2 * (m / 2), 16);
    landmarks << half, half;
    const reference::Matrix a = log_kernel(reference::gaussian_kernel(16), landmarks, landmarks).array().exp();
    const reference::Matrix x = a * test::Random(48).normal(a.rows(), 5);
    const Matrix<T> y = apply<T>(RidgeInverse{.gamma = 0}, a, x, context);
    ASSERT_TRUE(y.allFinite());
    EXPECT_LE((a * y.template cast<double>() - x).norm() / x.norm(), sizeof(T) == 4 ? 1e-3 : 1e-10);
  }
}

TYPED_TEST(CoreOf, AreTheSameOnEveryExecutor) {
  using T = TypeParam;
  const reference::Matrix a = landmark_kernel(150, 49), x = test::Random(50).normal(150, 33);
  const auto expect_same = [&](const auto& core) {
    Matrix<T> first;
    for (auto& [name, context] : test::contexts()) {
      SCOPED_TRACE(name);
      const Matrix<T> y = apply<T>(core, a, x, context);
      if (first.size() == 0) first = y;
      EXPECT_TRUE(test::bitwise_equal(y, first));
    }
  };
  expect_same(RidgeInverse{});
  expect_same(PreconditionedPinv{});
}

}  // namespace
