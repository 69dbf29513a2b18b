#include <attn/metrics.hpp>
#include <attn/any_approximator.hpp>

#include "common/rounding.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using attn::GaussianKernel;
using attn::Rows;
using attn::SoftmaxKernel;
using attn::SubspaceIteration;
using test::ConstMatrixRef;
using test::Context;
using test::error_of;
using test::Family;
using test::Index;
using test::Mask;
using test::Matrix;
using test::MatrixRef;

/// A matrix stored in S as an operator on blocks of T, as a user would write it.
template <class T, class S = T>
struct Dense {
  using Scalar = T;
  Matrix<S> a;

  Index rows() const { return a.rows(); }
  Index cols() const { return a.cols(); }
  void apply(ConstMatrixRef<T> x, MatrixRef<T> y, Context&) const {
    y = a.lazyProduct(x.template cast<S>()).template cast<T>();
  }
  void apply_transpose(ConstMatrixRef<T> x, MatrixRef<T> y, Context&) const {
    y = a.transpose().lazyProduct(x.template cast<S>()).template cast<T>();
  }
};
static_assert(attn::LinearOperator<Dense<double>> && attn::LinearOperator<attn::ExactOperator<float, SoftmaxKernel>>);

/// One that cannot be transposed.
struct ForwardOnly {
  using Scalar = double;
  Dense<double> dense;

  Index rows() const { return dense.rows(); }
  Index cols() const { return dense.cols(); }
  void apply(ConstMatrixRef<double> x, MatrixRef<double> y, Context& context) const { dense.apply(x, y, context); }
};
static_assert(attn::ForwardOperator<ForwardOnly> && !attn::LinearOperator<ForwardOnly>);
static_assert(attn::LinearOperator<attn::Difference<Dense<double>, Dense<double>>>);
static_assert(!attn::LinearOperator<attn::Difference<Dense<double>, ForwardOnly>>);

/// (n, count) with orthonormal columns, by Gram and Schmidt, twice over.
Matrix<double> orthonormal(Index n, Index count, test::Random& random) {
  Matrix<double> x = random.normal(n, count);
  for (Index c = 0; c < count; ++c) {
    for (Index other = 0; other < 2 * c; ++other) x.col(c) -= x.col(other % c).dot(x.col(c)) * x.col(other % c);
    x.col(c).normalize();
  }
  return x;
}

/// (rows, cols) with the given singular values.
Matrix<double> with_singular_values(Index rows, Index cols, const Eigen::VectorXd& values, std::uint64_t seed) {
  test::Random random(seed);
  const Matrix<double> u = orthonormal(rows, values.size(), random), v = orthonormal(cols, values.size(), random);
  return (u * values.asDiagonal()).lazyProduct(v.transpose());
}

/// The matrix of exact attention, entry by entry.
Matrix<double> dense_attention(const reference::Kernel& kernel, const test::Tokens<double>& x, const Mask& mask) {
  const Index n_k = x.k.rows();
  return reference::attend(kernel, {x.q, x.k, Matrix<double>::Identity(n_k, n_k), mask, {}}).out;
}

TEST(RelativeFrobeniusError, IsTheNormOfTheDifferenceOverThatOfTheExactResult) {
  const Matrix<double> exact{{3, 4}, {0, 0}}, approximation{{3, 4}, {0, 10}};
  EXPECT_DOUBLE_EQ(attn::relative_frobenius_error(approximation, exact), 2);
  EXPECT_EQ(attn::relative_frobenius_error(exact, exact), 0);
}

TEST(RelativeFrobeniusError, IsSummedInDouble) {
  const Matrix<float> exact = Matrix<float>::Constant(10, 10, 1e30F), approximation = 1.5F * exact;
  EXPECT_NEAR(attn::relative_frobenius_error(approximation, exact), 0.5, 1e-6);
  EXPECT_NEAR(attn::worst_row_error(approximation, exact), 0.5, 1e-6);
}

TEST(Errors, OfZerosAndNaN) {
  const Matrix<double> zero = Matrix<double>::Zero(2, 3), one = Matrix<double>::Ones(2, 3);
  Matrix<double> nan = one;
  nan(0, 1) = test::kNaN<double>;
  for (const auto& error :
       {+[](const Matrix<double>& a, const Matrix<double>& e) { return attn::relative_frobenius_error(a, e); },
        +[](const Matrix<double>& a, const Matrix<double>& e) { return attn::worst_row_error(a, e); }}) {
    EXPECT_EQ(error(zero, zero), 0);
    EXPECT_EQ(error(one, zero), test::kInf<double>);
    EXPECT_TRUE(std::isnan(error(nan, one)));
    EXPECT_TRUE(std::isnan(error(one, nan)));
  }
}

TEST(Errors, RefuseOtherShapes) {
  const Matrix<double> a(2, 3), b(3, 2);
  EXPECT_EQ(error_of([&] { attn::relative_frobenius_error(a, b); }),
            "relative_frobenius_error: approximation is 2 x 3, exact is 3 x 2");
  EXPECT_EQ(error_of([&] { attn::worst_row_error(a, b); }), "worst_row_error: approximation is 2 x 3, exact is 3 x 2");
}

TEST(WorstRowError, IsRelativeToAnOrdinaryRow) {
  // Rows of norm 5, 5 and about 0; the dropped row of zeros does not count. rms^2 = (25 + 25 + 0) / 3
  const Matrix<double> exact{{3, 4}, {0, 0}, {4, 3}, {1e-9, 0}}, approximation{{3, 6}, {0, 0}, {4, 3}, {1e-9, 1}};
  EXPECT_NEAR(attn::worst_row_error(approximation, exact), 2 / std::sqrt(50.0 / 3), 1e-12);
}

TEST(SingularValues, OfAMatrixMadeFromThem) {
  const Eigen::VectorXd values{{7, 5, 3, 2, 1, 0.5, 0.25, 0.1, 0.01, 0.001, 0}};
  Context context;
  for (const auto& [rows, cols] : {std::pair<Index, Index>{60, 40}, {40, 60}, {11, 30}, {30, 11}}) {
    const Dense<double> a{with_singular_values(rows, cols, values, 3)};
    for (const Index count : {1, 4, 11}) {
      const auto found = attn::leading_singular_values(a, count, {.tolerance = 1e-12}, context);
      EXPECT_TRUE(found.converged);
      EXPECT_LE((found.values - values.head(count)).cwiseAbs().maxCoeff(), 1e-9)
          << rows << " x " << cols << ", " << count;
    }
    EXPECT_NEAR(attn::spectral_norm(a, {}, context), 7, 1e-4);
  }
}

TEST(SingularValues, OfMatricesWithoutAny) {
  Context context;
  const auto of_zero = attn::leading_singular_values(Dense<double>{Matrix<double>::Zero(9, 7)}, 3, {}, context);
  EXPECT_TRUE(of_zero.converged);
  EXPECT_EQ(of_zero.values, Eigen::VectorXd::Zero(3));
  const Dense<double> nan{Matrix<double>::Constant(9, 7, test::kNaN<double>)};
  const auto of_nan = attn::leading_singular_values(nan, 3, {}, context);
  EXPECT_FALSE(of_nan.converged);
  EXPECT_EQ(of_nan.iterations, 1);
}

TEST(SingularValues, StopAtTheLastIterationAndAreLowerBounds) {
  const Dense<double> a{with_singular_values(300, 300, Eigen::VectorXd::LinSpaced(300, 2, 1), 4)};
  Context context;
  double before = 0;
  for (const int iterations : {1, 4, 16, 64}) {
    const auto found =
        attn::leading_singular_values(a, 1, {.tolerance = 0, .max_iterations = iterations, .oversampling = 0}, context);
    EXPECT_EQ(found.iterations, iterations);
    EXPECT_FALSE(found.converged);
    EXPECT_GT(found.values[0], before);
    EXPECT_LE(found.values[0], 2 + 1e-12);
    before = found.values[0];
  }
}

/// A tolerance below what rounding leaves is that.
TEST(SingularValues, ConvergeUpToRounding) {
  const Matrix<double> a = with_singular_values(40, 30, Eigen::VectorXd{{4, 2, 1, 0.5}}, 7);
  Context context;
  const SubspaceIteration options{.tolerance = 0};
  EXPECT_TRUE(attn::leading_singular_values(Dense<double>{a}, 2, options, context).converged);
  EXPECT_TRUE(attn::leading_singular_values(Dense<float>{a.cast<float>()}, 2, options, context).converged);
}

TEST(SingularValues, TakeFewerStepsWithMoreColumnsAndOthersFromOtherStarts) {
  const Dense<double> a{with_singular_values(100, 100, Eigen::VectorXd::LinSpaced(100, 2, 1), 8)};
  Context context;
  const auto steps = [&](Index oversampling) {
    return attn::leading_singular_values(a, 2, {.tolerance = 1e-4, .oversampling = oversampling}, context).iterations;
  };
  EXPECT_LT(2 * steps(40), steps(0));
  const auto first = [&](std::uint64_t seed) {
    return attn::leading_singular_values(a, 1, {.max_iterations = 1, .seed = seed}, context).values[0];
  };
  EXPECT_EQ(first(3), first(3));
  EXPECT_NE(first(3), first(4));
}

TEST(SingularValues, RefuseWhatCannotBe) {
  const Dense<double> a{Matrix<double>::Ones(5, 4)};
  Context context;
  const auto error = [&](Index count, const SubspaceIteration& options) {
    return error_of([&] { attn::leading_singular_values(a, count, options, context); });
  };
  EXPECT_EQ(error(0, {}), "leading_singular_values: count is 0, should be at least 1");
  EXPECT_EQ(error(5, {}), "leading_singular_values: count is 5, the operator is 5 x 4");
  EXPECT_EQ(error(1, {.tolerance = -1}), "leading_singular_values: tolerance is -1, should be at least 0");
  EXPECT_EQ(error(1, {.max_iterations = 0}), "leading_singular_values: max_iterations is 0, should be at least 1");
  EXPECT_EQ(error(1, {.oversampling = -1}), "leading_singular_values: oversampling is -1, should be at least 0");
  EXPECT_EQ(error_of([&] { attn::estimate_frobenius_norm(a, 0, 1, context); }),
            "estimate_frobenius_norm: num_probes is 0, should be at least 1");
  EXPECT_EQ(error_of([&] { attn::spectral_norm_lower_bound(a, 0, 1, context); }),
            "spectral_norm_lower_bound: num_probes is 0, should be at least 1");
}

TEST(FrobeniusNorm, IsEstimatedFromProducts) {
  Context context;
  // Columns of a diagonal matrix do not mix, so that any signs give its norm; dense ones within the stated deviation
  const Dense<double> diagonal{Eigen::VectorXd::LinSpaced(20, 1, 20).asDiagonal().toDenseMatrix()};
  EXPECT_NEAR(attn::estimate_frobenius_norm(diagonal, 1, 5, context), diagonal.a.norm(), 1e-10);
  const Dense<double> ones{Matrix<double>::Ones(40, 50)};  // rank one: the deviation is the largest there is
  for (const unsigned seed : {1U, 2U, 3U}) {
    const double squared = std::pow(attn::estimate_frobenius_norm(ones, 2048, seed, context) / ones.a.norm(), 2);
    EXPECT_NEAR(squared, 1, 4 * std::sqrt(2.0 / 2048));
    EXPECT_NE(squared, 1);
  }
}

TEST(SpectralLowerBound, IsBelowTheNormAndReachesItWithEnoughProbes) {
  Context context;
  const ForwardOnly a{{with_singular_values(40, 30, Eigen::VectorXd{{5, 4, 3, 2, 1}}, 6)}};
  const double few = attn::spectral_norm_lower_bound(a, 2, 1, context);
  EXPECT_LT(few, 5);
  EXPECT_GT(few, 0.1);
  EXPECT_NEAR(attn::spectral_norm_lower_bound(a, 64, 1, context), 5, 1e-12);
}

TEST(Ranks, OfSpectra) {
  EXPECT_NEAR(attn::effective_rank(Eigen::VectorXd::Constant(12, 0.3)), 12, 1e-12);
  EXPECT_NEAR(attn::effective_rank(Eigen::VectorXd{{4, 0, 0}}), 1, 1e-12);
  EXPECT_NEAR(attn::effective_rank(Eigen::VectorXd{{3, 1}}), std::exp(-0.75 * std::log(0.75) - 0.25 * std::log(0.25)),
              1e-12);
  EXPECT_DOUBLE_EQ(attn::condition_number(Eigen::VectorXd{{8, 4, 2}}), 4);
  EXPECT_EQ(attn::condition_number(Eigen::VectorXd{{8, 0}}), test::kInf<double>);
  EXPECT_DOUBLE_EQ(attn::stable_rank(5, 2), 6.25);
}

template <class T>
class AttentionOperator : public ::testing::Test {};
TYPED_TEST_SUITE(AttentionOperator, test::Scalars);

/// Both products of op against the dense matrix, in padded blocks, for every executor.
template <class Op>
void expect_products(const Op& op, const Matrix<double>& dense, double tolerance) {
  using T = typename Op::Scalar;
  ASSERT_EQ(op.rows(), dense.rows());
  ASSERT_EQ(op.cols(), dense.cols());
  test::Random random(9);
  for (const Index columns : {1, 5}) {
    test::Padded<T> x(Matrix<T>(random.normal(op.cols(), columns).template cast<T>()), 3, test::kNaN<T>);
    test::Padded<T> z(Matrix<T>(random.normal(op.rows(), columns).template cast<T>()), 3, test::kNaN<T>);
    for (auto& [name, context] : test::contexts()) {
      test::Padded<T> y(op.rows(), columns, 2, test::kNaN<T>), w(op.cols(), columns, 2, test::kNaN<T>);
      op.apply(x.view(), y.view(), context);
      EXPECT_LE(test::relative_error<T>(y.matrix(), dense.lazyProduct(x.matrix().template cast<double>())), tolerance)
          << name;
      op.apply_transpose(z.view(), w.view(), context);
      EXPECT_LE(test::relative_error<T>(w.matrix(), dense.transpose().lazyProduct(z.matrix().template cast<double>())),
                tolerance)
          << name;
      EXPECT_TRUE(y.padding_untouched() && w.padding_untouched());
    }
  }
}

TYPED_TEST(AttentionOperator, IsTheMatrixOfExactAttention) {
  using T = TypeParam;
  constexpr double kTolerance = 4 * test::kExactTolerance<T>;
  Context context;
  for (const auto& [n_q, n_k] : {std::pair<Index, Index>{1, 1}, {37, 53}, {130, 3}, {70, 600}}) {
    const auto x = test::make_tokens<T>(Family::unit, {n_q, n_k, 16, 1});
    const test::Tokens<double> wide{x.q.template cast<double>(), x.k.template cast<double>(),
                                    x.v.template cast<double>()};
    const auto keep_key = test::random_keep(n_k, 0.7, 1), keep_query = test::random_keep(n_q, 0.7, 2);
    for (const Mask& mask :
         {Mask{}, Mask{.keep_key = keep_key, .keep_query = keep_query},
          Mask{.causal = attn::Causal::upper_left, .first_query = 9},
          Mask{.causal = attn::Causal::lower_right, .window = 20},
          Mask{.causal = attn::Causal::lower_right, .keep_key = keep_key, .keep_query = keep_query}}) {
      expect_products(attn::ExactOperator<T, SoftmaxKernel>({}, x.q, x.k, mask, context),
                      dense_attention(reference::softmax_kernel(16), wide, mask), kTolerance);
      expect_products(attn::ExactOperator<T, GaussianKernel>({}, x.q, x.k, mask, context),
                      dense_attention(reference::gaussian_kernel(16), wide, mask), kTolerance);
      expect_products(
          attn::ExactOperator<T, GaussianKernel>({.bandwidth = 1.5, .rows = Rows::normalized}, x.q, x.k, mask, context),
          dense_attention(reference::gaussian_kernel(16, 1.5, true), wide, mask), kTolerance);
    }
  }
}

TYPED_TEST(AttentionOperator, OfQueriesThatSeeNoKeyIsZero) {
  using T = TypeParam;
  Context context;
  const auto x = test::make_tokens<T>(Family::unit, {20, 30, 8, 1});
  const std::vector<std::uint8_t> none(30, 0);
  const attn::ExactOperator<T, SoftmaxKernel> op({}, x.q, x.k, Mask{.keep_key = none}, context);
  expect_products(op, Matrix<double>::Zero(20, 30), 0);
  EXPECT_EQ(attn::spectral_norm(op, {}, context), 0);
}

TYPED_TEST(AttentionOperator, HasTheSingularValuesOfTheMatrix) {
  using T = TypeParam;
  Context context;
  for (const Family family : {Family::smooth, Family::clusters}) {
    const auto x = test::make_tokens<T>(family, {90, 120, 16, 1});
    const test::Tokens<double> wide{x.q.template cast<double>(), x.k.template cast<double>(),
                                    x.v.template cast<double>()};
    const Eigen::VectorXd softmax =
        reference::singular_values(dense_attention(reference::softmax_kernel(16), wide, {}));
    const Eigen::VectorXd gaussian =
        reference::singular_values(dense_attention(reference::gaussian_kernel(16), wide, {}));
    const attn::ExactOperator<T, SoftmaxKernel> s({}, x.q, x.k, {}, context);
    const attn::ExactOperator<T, GaussianKernel> c({}, x.q, x.k, {}, context);
    const SubspaceIteration options{.tolerance = 1e-9};
    const auto of_s = attn::leading_singular_values(s, 10, options, context);
    const auto of_c = attn::leading_singular_values(c, 10, options, context);
    EXPECT_TRUE(of_s.converged && of_c.converged);
    EXPECT_LE((of_s.values - softmax.head(10)).cwiseAbs().maxCoeff(), 1e-5 * softmax[0]);
    EXPECT_LE((of_c.values - gaussian.head(10)).cwiseAbs().maxCoeff(), 1e-5 * gaussian[0]);
    EXPECT_NEAR(attn::spectral_norm(s, options, context) / softmax[0], 1, 1e-5);
  }
}

TEST(AttentionOperators, OfAnApproximationAndItsError) {
  const auto x = test::make_tokens<double>(Family::smooth, {80, 80, 16, 12});
  Context context;
  const attn::Nystrom<double> nystrom(attn::SegmentMeans{.num_landmarks = 16});
  const attn::ApproximatorOperator approximation(nystrom, x.q, x.k);
  static_assert(attn::LinearOperator<decltype(approximation)>);
  Matrix<double> out(80, 12);
  approximation.apply(x.v, out, context);
  EXPECT_TRUE(test::bitwise_equal(out, attn::attention(nystrom, x.q, x.k, x.v)));

  const Matrix<double> eye = Matrix<double>::Identity(80, 80);
  const Matrix<double> error =
      attn::attention(nystrom, x.q, x.k, eye) - dense_attention(reference::softmax_kernel(16), x, {});
  const attn::Difference difference(approximation,
                                    attn::ExactOperator<double, SoftmaxKernel>({}, x.q, x.k, {}, context));
  Matrix<double> product(80, 12);
  difference.apply(x.v, product, context);
  EXPECT_LE((product - error.lazyProduct(x.v)).norm(), 1e-10 * product.norm());
  const double norm = reference::singular_values(error)[0],
               bound = attn::spectral_norm_lower_bound(difference, 32, 1, context);
  EXPECT_LE(bound, norm * (1 + 1e-10));
  EXPECT_GE(bound, 0.3 * norm);
  EXPECT_NEAR(attn::estimate_frobenius_norm(difference, 512, 1, context) / error.norm(), 1, 0.25);
  EXPECT_NEAR(attn::spectral_norm(difference, {}, context) / norm, 1, 1e-4);
}

/// The transpose of a method is its gradient by v; held against the matrix that the method makes of the identity.
TEST(AttentionOperators, TransposeOfEveryLinearMethod) {
  const auto x = test::make_tokens<double>(Family::smooth, {50, 50, 8, 8});
  const auto keep = test::random_keep(50, 0.8, 1);
  const Mask mask{.keep_key = keep, .keep_query = keep};
  const Matrix<double> eye = Matrix<double>::Identity(50, 50);
  for (const std::string name : {"softmax", "gaussian", "nystrom", "skyformer", "lifted-softmax"}) {
    SCOPED_TRACE(name);
    const auto method = attn::find_method<double>(name).make({.num_landmarks = 12});
    expect_products(attn::ApproximatorOperator(method, x.q, x.k, mask), attn::attention(method, x.q, x.k, eye, mask),
                    1e-9);
  }
}

TEST(AttentionOperators, DifferenceOfLinearOperatorsHasATranspose) {
  const auto x = test::make_tokens<double>(Family::unit, {30, 40, 16, 12});
  Context context;
  const attn::ExactOperator<double, SoftmaxKernel> plain({}, x.q, x.k, {}, context),
      sharp({.scale = 0.5}, x.q, x.k, {}, context);
  expect_products(attn::Difference(plain, sharp),
                  dense_attention(reference::softmax_kernel(16), x, {}) -
                      dense_attention(reference::softmax_kernel(16, 0.5), x, {}),
                  1e-12);
}

TEST(AttentionOperators, RefuseFirstKeysBesideAWindowAndOtherShapes) {
  const auto x = test::make_tokens<double>(Family::unit, {30, 40, 16, 12});
  using Softmax = attn::ExactOperator<double, SoftmaxKernel>;
  Context context;
  const Mask sinks{.causal = attn::Causal::upper_left, .window = 9, .num_sinks = 2};
  EXPECT_EQ(error_of([&] { Softmax({}, x.q, x.k, sinks, context); }),
            "exact operator: first keys beside a window are not supported");
  EXPECT_EQ(error_of([&] { Softmax({}, x.q, x.v, {}, context); }), "exact operator: q has 16 columns, k has 12");
  const Softmax a({}, x.q, x.k, {}, context), b({}, x.k, x.q, {}, context);
  EXPECT_EQ(error_of([&] { attn::Difference(a, b); }), "difference: a is 30 x 40, b is 40 x 30");
}

template <class T>
class NarrowOperator : public ::testing::Test {
 protected:
  /// Tokens of T, and the same in float and in double.
  explicit NarrowOperator(const test::Shape& shape = {70, 90, 16, 12}) {
    const auto x = test::make_tokens<float>(Family::smooth, shape);
    narrow_ = {x.q.template cast<T>(), x.k.template cast<T>(), x.v.template cast<T>()};
    wide_ = {narrow_.q.template cast<float>(), narrow_.k.template cast<float>(), narrow_.v.template cast<float>()};
    exact_ = {wide_.q.template cast<double>(), wide_.k.template cast<double>(), wide_.v.template cast<double>()};
  }

  test::Tokens<T> narrow_;
  test::Tokens<float> wide_;
  test::Tokens<double> exact_;
  Context context;
};
TYPED_TEST_SUITE(NarrowOperator, test::NarrowScalars);

/// Both products of an operator of T, against a matrix in double.
template <class Op>
void expect_rounded_products(const Op& op, const Matrix<double>& dense, Context& context) {
  using T = typename Op::Scalar;
  test::Random random(9);
  const Matrix<T> x = random.normal(op.cols(), 12).template cast<T>(),
                  z = random.normal(op.rows(), 12).template cast<T>();
  Matrix<T> y(op.rows(), 12), w(op.cols(), 12);
  op.apply(x, y, context);
  op.apply_transpose(z, w, context);
  EXPECT_LE(test::share_beyond_one_rounding<T>(y, dense.lazyProduct(x.template cast<double>())),
            2 * test::kShareOfHardCases);
  EXPECT_LE(test::share_beyond_one_rounding<T>(w, dense.transpose().lazyProduct(z.template cast<double>())),
            2 * test::kShareOfHardCases);
}

TYPED_TEST(NarrowOperator, RoundsTheProductsOfExactAttentionOnce) {
  using T = TypeParam;
  const auto keep_key = test::random_keep(90, 0.7, 1), keep_query = test::random_keep(70, 0.7, 2);
  for (const Mask& mask : {Mask{}, Mask{.keep_key = keep_key, .keep_query = keep_query},
                           Mask{.causal = attn::Causal::lower_right, .keep_key = keep_key}}) {
    expect_rounded_products(
        attn::ExactOperator<T, SoftmaxKernel>({}, this->narrow_.q, this->narrow_.k, mask, this->context),
        dense_attention(reference::softmax_kernel(16), this->exact_, mask), this->context);
    expect_rounded_products(
        attn::ExactOperator<T, GaussianKernel>({}, this->narrow_.q, this->narrow_.k, mask, this->context),
        dense_attention(reference::gaussian_kernel(16), this->exact_, mask), this->context);
  }
}

TYPED_TEST(NarrowOperator, RoundsTheProductsOfMethodsAndOfDifferencesOnce) {
  using T = TypeParam;
  for (const std::string name : {"nystrom", "skyformer"}) {
    SCOPED_TRACE(name);
    const auto method = attn::make_approximator<T>(name, {.num_landmarks = 12});
    const attn::ApproximatorOperator approximation(method, this->narrow_.q, this->narrow_.k);
    const attn::ApproximatorOperator wide(method.wide(), this->wide_.q, this->wide_.k);
    const attn::ExactOperator<T, SoftmaxKernel> exact({}, this->narrow_.q, this->narrow_.k, {}, this->context);
    const attn::ExactOperator<float, SoftmaxKernel> wide_exact({}, this->wide_.q, this->wide_.k, {}, this->context);
    const attn::Difference difference(approximation, exact);
    const attn::Difference wide_difference(wide, wide_exact);
    const auto expect_same = [&](const auto& op, const auto& of_float) {
      Matrix<T> y(70, 12), w(90, 12), v = this->narrow_.v, q = this->narrow_.q.leftCols(12);
      Matrix<float> wide_y(70, 12), wide_w(90, 12), wide_q = this->wide_.q.leftCols(12);
      op.apply(v, y, this->context);
      op.apply_transpose(q, w, this->context);
      of_float.apply(this->wide_.v, wide_y, this->context);
      of_float.apply_transpose(wide_q, wide_w, this->context);
      EXPECT_TRUE(y == wide_y.template cast<T>());
      EXPECT_TRUE(w == wide_w.template cast<T>());
    };
    expect_same(approximation, wide);
    expect_same(difference, wide_difference);
    EXPECT_NEAR(
        attn::spectral_norm(difference, {}, this->context) / attn::spectral_norm(wide_difference, {}, this->context), 1,
        1e-5);
    EXPECT_NEAR(attn::estimate_frobenius_norm(difference, 20, 1, this->context) /
                    attn::estimate_frobenius_norm(wide_difference, 20, 1, this->context),
                1, 1e-5);
  }
}

TYPED_TEST(NarrowOperator, HasTheSingularValuesOfTheMatrix) {
  using T = TypeParam;
  const Matrix<double> dense = dense_attention(reference::softmax_kernel(16), this->exact_, {});
  const Eigen::VectorXd expected = reference::singular_values(dense).head(6);
  const attn::ExactOperator<T, SoftmaxKernel> exact({}, this->narrow_.q, this->narrow_.k, {}, this->context);
  const SubspaceIteration options{.tolerance = 1e-9};
  const auto found = attn::leading_singular_values(exact, 6, options, this->context);
  EXPECT_TRUE(found.converged);
  EXPECT_LE((found.values - expected).cwiseAbs().maxCoeff(), 1e-5 * expected[0]);
  EXPECT_LE(attn::spectral_norm_lower_bound(exact, 20, 1, this->context), expected[0] * (1 + 1e-5));
  // An operator that rounds, to the size of its rounding.
  constexpr double kUnit = std::is_same_v<T, Eigen::half> ? 0x1p-10 : 0x1p-7;
  const auto rounded = attn::leading_singular_values(Dense<T, double>{dense}, 6, options, this->context);
  EXPECT_TRUE(rounded.converged);
  EXPECT_LE((rounded.values - expected).cwiseAbs().maxCoeff(), 2 * kUnit * expected[0]);
  const attn::Difference none(Dense<T, double>{dense}, exact);
  EXPECT_LE(attn::spectral_norm(none, {}, this->context), 2 * kUnit * expected[0]);
}

}  // namespace
