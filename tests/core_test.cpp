#include <attn/core.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <string_view>
#include <utility>

namespace {

using attn::IterativePinv;
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
  void backward(test::MatrixRef<T>, test::MatrixRef<T>, test::MatrixRef<T> dx, test::MatrixRef<T>, Context&) const {
    dx /= 2;
  }
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
      EXPECT_LE(test::relative_error(y, reference::preconditioned_pinv(a, 0.1, iterations) * x),
                sizeof(T) == 4 ? 1e-4 : 1e-12);
    }
  }
}

/// Rows of softmax between other queries than keys, so that the matrix is not symmetric.
reference::Matrix softmax_rows(Index m, std::uint64_t seed) {
  test::Random random(seed);
  const reference::Matrix q = random.normal(m, 16), k = random.normal(m, 16);
  return attend(reference::softmax_kernel(16), {q, k, reference::Matrix::Identity(m, m)}).out;
}

TYPED_TEST(CoreOf, IterativePinvFollowsItsIteration) {
  using T = TypeParam;
  Context context;
  for (const Index m : kSizes) {
    for (const int iterations : {1, 2, 3, 4, 6}) {
      SCOPED_TRACE(std::to_string(m) + ", " + std::to_string(iterations) + " iterations");
      const reference::Matrix a = softmax_rows(m, 51), x = test::Random(52).normal(m, 20);
      const reference::Matrix z = reference::iterated_inverse(a, iterations);
      const IterativePinv core{.iterations = iterations};
      EXPECT_LE(test::relative_error(apply<T>(core, a, x, context), z * x), sizeof(T) == 4 ? 1e-5 : 1e-12);
      test::Padded<T> from(Matrix<T>(a.cast<T>()), 5, test::kNaN<T>), to(m, m, 3, T(-7));
      core.invert<T>(from.view(), to.view(), context);
      EXPECT_LE(test::relative_error(to.matrix(), z), sizeof(T) == 4 ? 1e-5 : 1e-12);
      EXPECT_TRUE(from.padding_untouched() && to.padding_untouched());
    }
  }
}

/// What a core's backward pass makes of a, x and dx, in matrices with so many columns of padding.
template <class T, class Core>
std::pair<Matrix<T>, Matrix<T>> backward(const Core& core, const reference::Matrix& a, const reference::Matrix& x,
                                         Index padding, Context& context) {
  const auto padded = [&](const reference::Matrix& m) {
    return test::Padded<T>(Matrix<T>(m.cast<T>()), padding, T(-7));
  };
  test::Padded<T> of_a = padded(a), of_x = padded(x), dx = padded(x.array().sin()), da = padded(a);
  core.backward(of_a.view(), of_x.view(), dx.view(), da.view(), context);
  EXPECT_TRUE(of_a.padding_untouched() && of_x.padding_untouched() && dx.padding_untouched() && da.padding_untouched());
  return {dx.matrix(), da.matrix()};
}

TYPED_TEST(CoreOf, BackwardTakesStridedMatrices) {
  using T = TypeParam;
  Context context;
  const auto expect_same = [&](const auto& core, const reference::Matrix& a) {
    const reference::Matrix x = test::Random(53).normal(a.rows(), 7);
    const auto dense = backward<T>(core, a, x, 0, context), strided = backward<T>(core, a, x, 3, context);
    EXPECT_TRUE(test::bitwise_equal(strided.first, dense.first) && test::bitwise_equal(strided.second, dense.second));
  };
  for (const Index m : {5, 70}) {
    expect_same(RidgeInverse{}, landmark_kernel(m, 54));
    expect_same(PreconditionedPinv{}, landmark_kernel(m, 54));
    expect_same(IterativePinv{}, softmax_rows(m, 55));
  }
}

TEST(Core, PreconditionedPinvApproachesTheInverse) {
  Context context;
  const reference::Matrix a = landmark_kernel(40, 45), x = test::Random(46).normal(40, 8);
  const Matrix<double> exact = apply<double>(RidgeInverse{.gamma = 0.1}, a, x, context);
  EXPECT_LE(
      test::relative_error(apply<double>(PreconditionedPinv{.gamma = 0.1, .iterations = 20}, a, x, context), exact),
      1e-10);
}

/// exp(x_i y_j / 3) of numbers x, y, rows divided by their sums: positive, and singular but for a few directions.
reference::Matrix nearly_singular(Index m) {
  const reference::Matrix x = test::Random(51).normal(m, 1), y = test::Random(52).normal(m, 1);
  const reference::Matrix a = (x * y.transpose() / 3).array().exp();
  return a.array().colwise() / a.rowwise().sum().array();
}

/// What the iteration makes of I is Z itself. It stops once an element of Z is above 1 / (64 epsilon |A|_inf), far from
/// the overflow that as many steps would end in.
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

/// Pivots of at most the size of the matrix times epsilon are 0 but for rounding, whatever the scale of the matrix;
/// larger ones are not.
TYPED_TEST(CoreOf, RidgeInverseTellsSmallPivotsFromRounding) {
  using T = TypeParam;
  constexpr double kEpsilon = std::numeric_limits<T>::epsilon();
  Context context;
  for (const Index m : {2, 60, 140}) {
    for (const double scale : {1.0, 1e-6, 1e6}) {
      const double tolerance = static_cast<double>(m) * kEpsilon * scale;
      reference::Matrix a = scale * reference::Matrix::Identity(m, m);
      a(0, 0) = 2 * tolerance;
      if (m > 2) a(m / 2, m / 2) = tolerance / 2;
      const Matrix<T> y = apply<T>(RidgeInverse{.gamma = 0}, a, reference::Matrix::Ones(m, 3), context);
      for (Index i = 0; i < m; ++i) {
        const double expected = a(i, i) > tolerance ? 1 / a(i, i) : 0;
        for (Index c = 0; c < 3; ++c)
          EXPECT_NEAR(static_cast<double>(y(i, c)), expected, 1e-5 * expected) << i << " of " << m;
      }
    }
  }
}

/// kappa(L, L) of m landmarks along a curve: it has far fewer directions, but for rounding, than rows.
reference::Matrix curve_kernel(Index m) {
  reference::Matrix landmarks(m, 3);
  for (Index i = 0; i < m; ++i) {
    const double t = static_cast<double>(i) / static_cast<double>(m);
    landmarks.row(i) << std::cos(6 * t), std::sin(6 * t), t;
  }
  return log_kernel(reference::gaussian_kernel(3), landmarks, landmarks).array().exp();
}

/// Nearly all of a right-hand side that lies in the range of a comes back, and y is no larger than it must be.
TYPED_TEST(CoreOf, RidgeInverseRevealsTheRank) {
  using T = TypeParam;
  Context context;
  for (const Index m : {100, 257}) {
    const reference::Matrix a = curve_kernel(m), x = a * test::Random(53).normal(m, 5);
    for (const double gamma : {0.0, 1e-8}) {
      const Matrix<T> y = apply<T>(RidgeInverse{.gamma = gamma}, a, x, context);
      EXPECT_LE((a * y.template cast<double>() - x).norm() / x.norm(), sizeof(T) == 4 ? 1e-5 : 1e-7) << gamma;
      EXPECT_LE(y.template cast<double>().norm() / x.norm(), sizeof(T) == 4 ? 1e2 : 1e6) << gamma;
    }
  }
}

/// Rounding of its entries has made the matrix indefinite by more than its size times epsilon.
TYPED_TEST(CoreOf, RidgeInverseBearsSlightlyIndefiniteMatrices) {
  using T = TypeParam;
  Context context;
  for (const Index m : {100, 257}) {
    const double noise = sizeof(T) == 4 ? 1e-3 : 1e-9;
    const reference::Matrix exact = curve_kernel(m), error = noise * test::Random(55).normal(m, m);
    const reference::Matrix x = exact * test::Random(56).normal(m, 4);
    const Matrix<T> y = apply<T>(RidgeInverse{.gamma = 0}, exact + error + error.transpose(), x, context);
    EXPECT_LE((exact * y.template cast<double>() - x).norm() / x.norm(), 5 * noise);
  }
}

TYPED_TEST(CoreOf, RidgeInverseOfNothingIsNothing) {
  using T = TypeParam;
  Context context;
  const reference::Matrix zero = reference::Matrix::Zero(70, 70);
  EXPECT_TRUE(
      (apply<T>(RidgeInverse{.gamma = 0}, zero, reference::Matrix::Ones(70, 2), context).array() == T(0)).all());
}

/// What depends on a NaN is NaN, whether or not pivots are chosen.
TYPED_TEST(CoreOf, RidgeInverseSpreadsNaN) {
  using T = TypeParam;
  Context context;
  for (const double gamma : {0.1, 0.0}) {
    reference::Matrix a = reference::Matrix::Ones(90, 90);
    a.row(70).setConstant(std::nan(""));
    a.col(70).setConstant(std::nan(""));
    const Matrix<T> y = apply<T>(RidgeInverse{.gamma = gamma}, a, reference::Matrix::Ones(90, 2), context);
    EXPECT_TRUE(y.array().isNaN().any()) << gamma;
    EXPECT_TRUE(y.row(70).array().isNaN().all()) << gamma;
  }
}

/// dx <- a^-1 dx and da = -dx y^T, of the landmarks that have pivots.
TYPED_TEST(CoreOf, RidgeInverseHasTheGradientsOfWhatItKeeps) {
  using T = TypeParam;
  Context context;
  const Index m = 60;
  reference::Matrix a = reference::Matrix::Identity(m, m);
  a(50, 3) = a(3, 50) = 1;  // a duplicate
  const Matrix<T> ones = Matrix<T>::Ones(m, 2);
  Matrix<T> matrix = a.cast<T>(), x = ones, dx = T(2) * ones, da(m, m);
  RidgeInverse{.gamma = 0}.backward(attn::MatrixRef<T>(matrix), attn::MatrixRef<T>(x), attn::MatrixRef<T>(dx),
                                    attn::MatrixRef<T>(da), context);
  reference::Matrix kept = reference::Matrix::Ones(m, 1);
  kept(50, 0) = 0;
  EXPECT_LE(test::relative_error(dx, 2 * kept.replicate(1, 2)), 1e-6);
  EXPECT_LE(test::relative_error(da, -4 * kept * kept.transpose()), 1e-6);
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
