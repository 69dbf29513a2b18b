#include <attn/core.hpp>

#include "support.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string_view>

namespace {

using attn::IterativePinv;
using attn::PreconditionedPinv;
using attn::RidgeInverse;
using test::Context;
using test::Index;
using test::Matrix;

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

/// exp(x_i y_j / 3) of numbers x, y, rows divided by their sums: positive, and singular but for a few directions.
reference::Matrix nearly_singular(Index m) {
  const reference::Matrix x = test::Random(51).normal(m, 1), y = test::Random(52).normal(m, 1);
  const reference::Matrix a = (x * y.transpose() / 3).array().exp();
  return a.array().colwise() / a.rowwise().sum().array();
}

/// What the iteration makes of I is Z itself. It stops once an element of Z is above 1 / (64 epsilon |A|_inf), far from the overflow that
/// as many steps would end in.
TYPED_TEST(CoreOf, IterativePinvStaysFiniteForAnyNumberOfSteps) {
  using T = TypeParam;
  Context context;
  for (const Index m : {16, 33, 65}) {
    for (const int iterations : {40, 100, 1000}) {
      SCOPED_TRACE(std::to_string(m) + ", " + std::to_string(iterations) + " iterations");
      const reference::Matrix a = nearly_singular(m), eye = reference::Matrix::Identity(m, m);
      const double limit = 1 / (64 * static_cast<double>(std::numeric_limits<T>::epsilon()));
      const Matrix<T> z = apply<T>(IterativePinv{.iterations = iterations}, a, eye, context);
      EXPECT_LE(z.cwiseAbs().maxCoeff(), 8 * limit);
      EXPECT_GE(z.cwiseAbs().maxCoeff(), iterations == 1000 ? limit : 1);
      EXPECT_TRUE(apply<T>(PreconditionedPinv{.gamma = 0, .iterations = iterations}, a * a.transpose(), eye, context)
                      .allFinite());
    }
  }
}

/// Ten steps are far below that limit in float, too.
TYPED_TEST(CoreOf, IterativePinvTakesTenSteps) {
  using T = TypeParam;
  Context context;
  for (const Index m : {3, 16, 65}) {
    const reference::Matrix a = nearly_singular(m), x = test::Random(53).normal(m, 4);
    const Matrix<T> nine = apply<T>(IterativePinv{.iterations = 9}, a, x, context),
                    ten = apply<T>(IterativePinv{.iterations = 10}, a, x, context);
    EXPECT_GT(test::relative_error(nine, ten.template cast<double>()), 0.5);
    EXPECT_LE(test::relative_error(ten, reference::iterated_inverse(a, 10) * x), sizeof(T) == 4 ? 2e-2 : 1e-9);
  }
}

/// The backward pass goes through as many steps as the forward pass took.
TYPED_TEST(CoreOf, IterativePinvsGradientsAreOfTheStepsTaken) {
  using T = TypeParam;
  Context context;
  const Index m = 16;
  const Matrix<T> a = nearly_singular(m).cast<T>(), x = test::Random(54).normal(m, 4).template cast<T>();
  struct Pass {
    Pass(int iterations, const Matrix<T>& a, const Matrix<T>& x, Context& context) : y(x), dx(x), da(a) {
      Matrix<T> of_a = a, of_x = x;
      const IterativePinv core{.iterations = iterations};
      core.apply<T>(of_a, y, context);
      of_a = a;
      core.backward<T>(of_a, of_x, dx, da, context);
    }
    Matrix<T> y, dx, da;
  };
  const Pass many(500, a, x, context);
  int steps = 1;
  while (!test::bitwise_equal(Pass(steps, a, x, context).y, many.y)) ASSERT_LT(++steps, 500);
  EXPECT_GT(steps, 10);
  const Pass as_many(steps, a, x, context);
  EXPECT_TRUE(many.dx.allFinite() && many.da.allFinite());
  EXPECT_TRUE(test::bitwise_equal(many.dx, as_many.dx) && test::bitwise_equal(many.da, as_many.da));
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
