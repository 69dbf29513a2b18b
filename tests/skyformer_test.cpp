#include <attn/lifted_softmax.hpp>
#include <attn/skyformer.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <type_traits>
#include <string_view>
#include <vector>

namespace {

using attn::GaussianKernel;
using attn::PreconditionedPinv;
using attn::RidgeInverse;
using attn::Rows;
using attn::Skyformer;
using attn::StridedSample;
using attn::UniformSample;
using test::Context;
using test::Family;
using test::forward;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;
using test::Padded;

template <class T>
using Strided = Skyformer<T, StridedSample>;
template <class T>
using StridedIterative = Skyformer<T, StridedSample, PreconditionedPinv>;

template <class T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-5 : 1e-11;

/// A landmark policy as a user would write it: chosen keys, in the given order.
struct ChosenKeys {
  std::vector<Index> rows;
  Index num_landmarks = static_cast<Index>(rows.size());

  template <class T>
  attn::MatrixRef<T> select(const Inputs<T>& in, attn::Scratch& scratch) const {
    auto landmarks = scratch.matrix<T>(num_landmarks, in.k.cols());
    for (Index i = 0; i < num_landmarks; ++i) landmarks.row(i) = in.k.row(rows[static_cast<std::size_t>(i)]);
    return landmarks;
  }
};

TEST(SkyformerGamma, AsLargeAsTheTypeHoldsLosesNoDigits) {
  const auto x = test::make_tokens<float>(Family::init, {40, 50, 8, 5}, 93);
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
  const reference::Problem p = test::to_reference<float>(in);
  for (const double gamma : {1e20, 1e31}) {
    const reference::Kernel kernel = reference::gaussian_kernel(8, {}, true);
    const auto inverse = [&](const reference::Matrix& a) { return reference::ridge_inverse(a, gamma); };
    const auto expected = reference::skyformer(kernel, p, reference::strided_landmarks(p, 12), inverse);
    const Skyformer<float, StridedSample> method({.num_landmarks = 12}, {.gamma = gamma}, {.rows = Rows::normalized});
    Matrix<float> out(40, 5);
    Context context;
    method.forward(in, out, context);
    EXPECT_LE(test::relative_error(out, expected), 1e-5) << gamma;
  }
}

std::vector<Index> all_rows(Index n) {
  std::vector<Index> rows(static_cast<std::size_t>(n));
  std::iota(rows.begin(), rows.end(), Index{0});
  return rows;
}

template <class T>
class SkyformerOf : public ::testing::Test {};
TYPED_TEST_SUITE(SkyformerOf, test::Scalars);

struct Case {
  test::Shape shape;
  Index m;
};

const Case kCases[] = {{{130, 130, 16, 12}, 24}, {{1, 200, 16, 12}, 24},     {{200, 1, 16, 12}, 24},
                       {{1, 1, 3, 1}, 8},        {{61, 90, 7, 3}, 1},        {{61, 90, 7, 3}, 2},
                       {{300, 700, 33, 17}, 65}, {{900, 1500, 32, 32}, 128}, {{20, 30, 16, 5}, 100}};

TYPED_TEST(SkyformerOf, IsItsDefinition) {
  using T = TypeParam;
  Context context;
  for (const auto& [shape, m] : kCases) {
    SCOPED_TRACE("n_q " + std::to_string(shape.n_q) + ", n_k " + std::to_string(shape.n_k) + ", m " +
                 std::to_string(m));
    const auto x = test::make_tokens<T>(Family::init, shape, 51);
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
    const reference::Problem p = test::to_reference(in);
    const reference::Matrix landmarks = strided_landmarks(p, m);
    for (const Rows rows : {Rows::raw, Rows::normalized}) {
      const GaussianKernel kernel{.rows = rows};
      const auto expected_kernel = reference::gaussian_kernel(shape.d, {}, rows == Rows::normalized);
      const auto ridge = [](const reference::Matrix& a) { return reference::ridge_inverse(a, 0.1); };
      EXPECT_LE(test::relative_error(
                    forward(Strided<T>(StridedSample{.num_landmarks = m}, RidgeInverse{}, kernel), in, context),
                    skyformer(expected_kernel, p, landmarks, ridge)),
                kTolerance<T>);
      const auto iterated = [](const reference::Matrix& a) { return reference::preconditioned_pinv(a, 0.1, 6); };
      EXPECT_LE(
          test::relative_error(forward(StridedIterative<T>(StridedSample{.num_landmarks = m}, {}, kernel), in, context),
                               skyformer(expected_kernel, p, landmarks, iterated)),
          kTolerance<T>);
    }
  }
}

TYPED_TEST(SkyformerOf, TakesMasksBiasesAndStridedViews) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::init, {130, 210, 16, 12}, 52);
  const auto keep_query = test::random_keep(130, 0.8, 53), keep_key = test::random_keep(210, 0.7, 54);
  const auto bias = test::random_key_bias<T>(210, 0.1, 55);
  Padded<T> q(x.q, 3, test::kNaN<T>), k(x.k, 1, test::kNaN<T>), v(x.v, 5, test::kNaN<T>);
  Context context;
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    for (const bool biased : {false, true}) {
      Inputs<T> in{
          .q = q.view(), .k = k.view(), .v = v.view(), .mask = {.keep_key = keep_key, .keep_query = keep_query}};
      if (biased) in.key_bias = bias;
      const reference::Problem p = test::to_reference(in);
      const auto kernel = reference::gaussian_kernel(16, 2.5, rows == Rows::normalized);
      const auto ridge = [](const reference::Matrix& a) { return reference::ridge_inverse(a, 0.05); };
      const reference::Matrix expected = skyformer(kernel, p, strided_landmarks(p, 24), ridge);
      const Strided<T> method(StridedSample{.num_landmarks = 24}, RidgeInverse{.gamma = 0.05},
                              GaussianKernel{.bandwidth = 2.5, .rows = rows});
      Padded<T> out(130, 12, 4, T(-7));
      method.forward(in, out.view(), context);
      EXPECT_LE(test::relative_error(out.matrix(), expected), kTolerance<T>);
      EXPECT_TRUE(out.padding_untouched());
      for (Index i = 0; i < 130; ++i) {
        if (!reference::kept(keep_query, i)) {
          EXPECT_TRUE((out.view().row(i).array() == T(0)).all());
        }
      }
    }
  }
}

/// Each row is near the oracle's.
template <class T>
void expect_rows_near(const Matrix<T>& out, const reference::Matrix& expected, double tolerance) {
  for (Index i = 0; i < out.rows(); ++i) {
    EXPECT_LE((out.row(i).template cast<double>() - expected.row(i)).norm(), tolerance * expected.row(i).norm())
        << "row " << i;
  }
}

reference::Matrix ridge(const reference::Matrix& a) {
  return reference::ridge_inverse(a, 0.1);
}

/// Landmarks that are keys see keys of distance 0; those that are queries are so far from all that their sums are
/// 2^-200 and less of the others', in the last case less than a double's square root. Each matters to the queries near
/// it.
TYPED_TEST(SkyformerOf, IsItsDefinitionWhereTokensAreFarFromOneAnother) {
  using T = TypeParam;
  Context context;
  const auto keep_query = test::random_keep(256, 0.8, 72), keep_key = test::random_keep(200, 0.7, 73);
  const auto bias = test::random_key_bias<T>(200, 0.1, 74);
  for (const double deviation : {3.0, 5.0, 8.0}) {
    const auto x = test::scaled(test::make_tokens<T>(Family::unit, {256, 200, 64, 6}, 75), deviation);
    for (const bool masked : {false, true}) {
      Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
      if (masked) in.mask = {.keep_key = keep_key, .keep_query = keep_query};
      if (masked) in.key_bias = bias;
      SCOPED_TRACE("deviation " + std::to_string(deviation) + ", masked " + std::to_string(masked));
      const reference::Problem p = test::to_reference(in);
      const GaussianKernel kernel{.rows = Rows::normalized};
      const auto expected_kernel = reference::gaussian_kernel(64, {}, true);
      const reference::Matrix landmarks = strided_landmarks(p, 64),
                              expected = skyformer(expected_kernel, p, landmarks, ridge);
      const Matrix<T> out = forward(Strided<T>(StridedSample{.num_landmarks = 64}, {}, kernel), in, context);
      EXPECT_LE(test::relative_error(out, expected), kTolerance<T>);
      expect_rows_near(out, expected, sizeof(T) == 4 ? 2e-4 : 1e-11);
      const auto iterated = [](const reference::Matrix& a) { return reference::preconditioned_pinv(a, 0.1, 6); };
      EXPECT_LE(test::relative_error(
                    forward(StridedIterative<T>(StridedSample{.num_landmarks = 64}, {}, kernel), in, context),
                    skyformer(expected_kernel, p, landmarks, iterated)),
                kTolerance<T>);
    }
  }
}

/// A core as a user would write it for one type alone.
template <class T>
struct OwnInverse {
  void check(std::string_view) const {}
  void apply(attn::MatrixRef<T> a, attn::MatrixRef<T> x, Context& context) const {
    RidgeInverse{}.apply(a, x, context);
  }
  void backward(attn::MatrixRef<T> a, attn::MatrixRef<T> x, attn::MatrixRef<T> dx, attn::MatrixRef<T> da,
                Context& context) const {
    RidgeInverse{}.backward(a, x, dx, da, context);
  }
};

TYPED_TEST(SkyformerOf, TakesACoreOfOneTypeWhereverTheTokensAre) {
  using T = TypeParam;
  static_assert(!attn::Core<OwnInverse<float>, double>);
  Context context;
  for (const double deviation : {1.0, 4.0}) {
    const auto x = test::scaled(test::make_tokens<T>(Family::unit, {90, 90, 64, 6}, 76), deviation);
    const Skyformer<T, StridedSample, OwnInverse<T>> method(StridedSample{.num_landmarks = 20}, {},
                                                            {.rows = Rows::normalized});
    EXPECT_TRUE(forward(method, {.q = x.q, .k = x.k, .v = x.v}, context).allFinite()) << deviation;
  }
}

/// Normalized rows do not depend on what all key biases have in common; one of them removes its key, and the largest is
/// that of a key that is dropped.
TYPED_TEST(SkyformerOf, ACommonBiasOfAllKeysChangesNoNormalizedRow) {
  using T = TypeParam;
  Context context;
  const auto x = test::make_tokens<T>(Family::init, {90, 130, 16, 6}, 77);
  auto keep_key = test::random_keep(130, 0.8, 78);
  keep_key[5] = 0;
  keep_key[6] = 1;
  const Strided<T> method(StridedSample{.num_landmarks = 24}, {}, {.rows = Rows::normalized});
  for (const double gap : {0.0, 0.5}) {
    for (const double common :
         {0.0, 89.0, 1e4, -1e4, 1e30, -1e30, static_cast<double>(std::numeric_limits<T>::lowest())}) {
      std::vector<T> bias(130, static_cast<T>(common)), relative(130, T(0));
      if (std::abs(common) <= 1e4) bias[3] += static_cast<T>(gap), relative[3] = static_cast<T>(gap);
      bias[5] = test::kNaN<T>;
      bias[6] = relative[6] = -test::kInf<T>;
      bias[7] = std::numeric_limits<T>::lowest();
      if (common != bias[7]) relative[7] = T(-1e4);
      const Mask mask{.keep_key = keep_key};
      const reference::Problem p =
          test::to_reference<T>({.q = x.q, .k = x.k, .v = x.v, .mask = mask, .key_bias = relative});
      EXPECT_LE(
          test::relative_error(forward(method, {.q = x.q, .k = x.k, .v = x.v, .mask = mask, .key_bias = bias}, context),
                               skyformer(reference::gaussian_kernel(16, {}, true), p, strided_landmarks(p, 24), ridge)),
          kTolerance<T>)
          << common;
    }
  }
}

/// e^bias times what they are without the bias, also where e^bias alone, or the sums over the keys, leave T's range.
TYPED_TEST(SkyformerOf, RawRowsAreAsLargeAsTheyAre) {
  using T = TypeParam;
  Context context;
  const double largest = std::log(static_cast<double>(std::numeric_limits<T>::max()));
  auto x = test::make_tokens<T>(Family::init, {90, 130, 16, 6}, 79);
  x.v.col(2).setZero();
  for (const double distance : {0.0, 4.0}) {
    x.q.array() += static_cast<T>(distance);
    const Strided<T> method(StridedSample{.num_landmarks = 24});
    const std::vector<T> lowest(130, std::numeric_limits<T>::lowest());
    EXPECT_TRUE((forward(method, {.q = x.q, .k = x.k, .v = x.v, .key_bias = lowest}, context).array() == T(0)).all());
    const reference::Problem p = test::to_reference<T>({.q = x.q, .k = x.k, .v = x.v});
    const reference::Matrix unbiased = skyformer(reference::gaussian_kernel(16), p, strided_landmarks(p, 24), ridge);
    for (const double common :
         {-0.55 * largest, -1.0, 0.5 * largest, 0.95 * largest, 0.99 * largest + 0.5, largest + 2}) {
      const std::vector<T> bias(130, static_cast<T>(common));
      const Matrix<T> out = forward(method, {.q = x.q, .k = x.k, .v = x.v, .key_bias = bias}, context);
      const double exponent = static_cast<double>(bias[0]), back = std::exp(-exponent / 2);
      ASSERT_FALSE(out.array().isNaN().any()) << common;
      EXPECT_TRUE((out.col(2).array() == T(0)).all()) << common;
      for (Index i = 0; i < out.size(); ++i) {
        const double log = std::log(std::abs(unbiased.data()[i])) + exponent;
        if (std::abs(log - largest) < 1e-3) continue;
        EXPECT_EQ(std::isfinite(out.data()[i]), log < largest) << common;
        EXPECT_GE(out.data()[i] * static_cast<T>(unbiased.data()[i]), T(0)) << common;
      }
      if (!out.allFinite()) continue;
      EXPECT_LE(test::relative_error(Matrix<double>(out.template cast<double>() * back * back), unbiased),
                kTolerance<T>)
          << common << " at distance " << distance;
    }
  }
}

/// Queries are taken 4096 at a time.
TYPED_TEST(SkyformerOf, TakesManyQueriesWithAMask) {
  using T = TypeParam;
  Context context;
  const Index n_q = 4096 + 250;
  const auto x = test::make_tokens<T>(Family::init, {n_q, 60, 8, 3}, 80);
  const auto keep_query = test::random_keep(n_q, 0.5, 81);
  for (const double common : {0.0, 80.0}) {  // the second has raw rows of float take the wide range's way
    const std::vector<T> bias(60, static_cast<T>(common));
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.keep_query = keep_query}, .key_bias = bias};
    const reference::Problem p = test::to_reference(in);
    for (const Rows rows : {Rows::raw, Rows::normalized}) {
      const Matrix<T> out = forward(Strided<T>(StridedSample{.num_landmarks = 12}, {}, {.rows = rows}), in, context);
      const reference::Matrix expected =
          skyformer(reference::gaussian_kernel(8, {}, rows == Rows::normalized), p, strided_landmarks(p, 12), ridge);
      EXPECT_LE(test::relative_error(out, expected), kTolerance<T>);
      for (Index i = 0; i < n_q; ++i) {
        EXPECT_EQ((out.row(i).array() == T(0)).all(), !reference::kept(keep_query, i)) << "row " << i;
      }
    }
  }
}

TYPED_TEST(SkyformerOf, WhatTheMasksDropHasNoInfluence) {
  using T = TypeParam;
  auto x = test::make_tokens<T>(Family::init, {130, 210, 16, 12}, 56);
  const auto keep_query = test::random_keep(130, 0.8, 57), keep_key = test::random_keep(210, 0.7, 58);
  const Mask mask{.keep_key = keep_key, .keep_query = keep_query};
  const auto poisoned = [&](T poison) {
    auto y = x;
    for (Index i = 0; i < 130; ++i) {
      if (!reference::kept(keep_query, i)) y.q.row(i).setConstant(poison);
    }
    for (Index j = 0; j < 210; ++j) {
      if (reference::kept(keep_key, j)) continue;
      y.k.row(j).setConstant(poison);
      y.v.row(j).setConstant(poison);
    }
    return y;
  };
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const Strided<T> method(StridedSample{.num_landmarks = 24}, RidgeInverse{}, GaussianKernel{.rows = rows});
    const Matrix<T> clean = attn::attention(method, x.q, x.k, x.v, mask);
    ASSERT_TRUE(clean.allFinite());
    for (const T poison : {test::kNaN<T>, test::kInf<T>, T(1e30)}) {
      const auto y = poisoned(poison);
      EXPECT_TRUE(test::bitwise_equal(attn::attention(method, y.q, y.k, y.v, mask), clean)) << poison;
    }
  }
}

TYPED_TEST(SkyformerOf, NaNReachesTheRowsThatSeeIt) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::init, {64, 64, 16, 12}, 59);
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const Strided<T> method(StridedSample{.num_landmarks = 16}, RidgeInverse{},
                            GaussianKernel{.rows = rows});  // rows 4, 12, 20 ...
    const Matrix<T> clean = attn::attention(method, x.q, x.k, x.v);
    auto y = x;
    y.q(7, 3) = static_cast<T>(std::nan("123"));
    const Matrix<T> query = attn::attention(method, y.q, y.k, y.v);
    for (Index i = 0; i < 64; ++i) {
      EXPECT_TRUE(i == 7 ? query.row(i).array().isNaN().all() : test::same_row(query, clean, i)) << "row " << i;
    }
    y = x;
    y.k(7, 3) = test::kNaN<T>;
    EXPECT_TRUE(attn::attention(method, y.q, y.k, y.v).array().isNaN().all());
    y = x;
    y.v(7, 3) = test::kNaN<T>;
    const Matrix<T> value = attn::attention(method, y.q, y.k, y.v);
    EXPECT_TRUE(value.col(3).array().isNaN().all());
    EXPECT_TRUE(value.leftCols(3).allFinite() && value.rightCols(8).allFinite());
    y = x;
    y.q(4, 3) = test::kNaN<T>;  // a landmark
    EXPECT_TRUE(attn::attention(method, y.q, y.k, y.v).array().isNaN().all());
  }
}

TYPED_TEST(SkyformerOf, AKeyRemovedByItsBiasHasNoInfluence) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::init, {60, 90, 16, 5}, 75);
  const auto bias = test::random_key_bias<T>(90, 0.3, 76);
  const Matrix<T> dout = test::Random(77).normal(60, 5).template cast<T>();
  const auto train = [&](const auto& method, const test::Tokens<T>& y) {
    const Inputs<T> in{.q = y.q, .k = y.k, .v = y.v, .key_bias = bias};
    Matrix<T> out(60, 5), dq(60, 16), dk(90, 16), dv(90, 5), all(300, 16);
    typename std::remove_cvref_t<decltype(method)>::Saved saved;
    Context context;
    method.forward(in, out, context, saved);
    method.backward(in, out, dout, saved, {dq, dk, dv}, context);
    all.setZero();
    all.topRows(60) = dq;
    all.middleRows(60, 90) = dk;
    all.block(150, 0, 90, 5) = dv;
    all.block(240, 0, 60, 5) = out;
    return all;
  };
  const auto expect_same = [&](const auto& method) {
    const Matrix<T> clean = train(method, x);
    EXPECT_TRUE(clean.allFinite());
    for (const T poison : {test::kNaN<T>, test::kInf<T>}) {
      test::Tokens<T> y = x;
      for (Index j = 0; j < 90; ++j) {
        if (std::isfinite(bias[static_cast<std::size_t>(j)])) continue;
        y.k.row(j).setConstant(poison);
        y.v.row(j).setConstant(poison);
      }
      EXPECT_TRUE(test::bitwise_equal(train(method, y), clean)) << poison;
    }
  };
  const StridedSample strided{.num_landmarks = 16};
  expect_same(Strided<T>(strided));
  expect_same(Strided<T>(strided, {}, GaussianKernel{.rows = Rows::normalized}));
  expect_same(attn::LiftedSoftmax<T, StridedSample>(strided));
}

/// The same landmarks in a matrix that is wider than its rows, as a policy of one's own may have them.
struct WideKeys {
  Index num_landmarks = 20, padding = 0;

  template <class T>
  attn::MatrixRef<T> select(const Inputs<T>& in, attn::Scratch& scratch) const {
    const Index d = in.k.cols();
    attn::MatrixRef<T> all = scratch.matrix<T>(num_landmarks, d + padding);
    all.setConstant(test::kNaN<T>);
    all.leftCols(d) = in.k.topRows(num_landmarks);
    return all.leftCols(d);
  }
};

TYPED_TEST(SkyformerOf, TakesStridedLandmarks) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::init, {90, 130, 16, 12}, 78);
  const auto expect_same = [&](const auto& strided, const auto& dense) {
    EXPECT_TRUE(test::bitwise_equal(attn::attention(strided, x.q, x.k, x.v), attn::attention(dense, x.q, x.k, x.v)));
  };
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const GaussianKernel kernel{.rows = rows};
    expect_same(Skyformer<T, WideKeys>(WideKeys{.padding = 3}, {}, kernel),
                Skyformer<T, WideKeys>(WideKeys{}, {}, kernel));
  }
  expect_same(attn::LiftedSoftmax<T, WideKeys>(WideKeys{.padding = 3}), attn::LiftedSoftmax<T, WideKeys>(WideKeys{}));
}

TYPED_TEST(SkyformerOf, PaddedIsTrimmed) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::smooth, {210, 210, 16, 12}, 60);
  std::vector<std::uint8_t> keep(210, 0);
  std::fill_n(keep.begin(), 150, std::uint8_t{1});
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const Strided<T> method(StridedSample{.num_landmarks = 24}, RidgeInverse{}, GaussianKernel{.rows = rows});
    const Matrix<T> padded = attn::attention(method, x.q, x.k, x.v, {.keep_key = keep, .keep_query = keep});
    const Matrix<T> trimmed = attn::attention(method, x.q.topRows(150), x.k.topRows(150), x.v.topRows(150));
    EXPECT_LE(test::relative_error(Matrix<T>(padded.topRows(150)), trimmed.template cast<double>()), kTolerance<T>);
    EXPECT_TRUE((padded.bottomRows(60).array() == T(0)).all());
  }
}

TYPED_TEST(SkyformerOf, NothingKeptGivesZeros) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::init, {20, 30, 16, 12});
  const std::vector<std::uint8_t> no_query(20, 0), no_key(30, 0);
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const Strided<T> method(StridedSample{.num_landmarks = 8}, RidgeInverse{}, GaussianKernel{.rows = rows});
    EXPECT_TRUE((attn::attention(method, x.q, x.k, x.v, {.keep_key = no_key}).array() == T(0)).all());
    EXPECT_TRUE((attn::attention(method, x.q, x.k, x.v, {.keep_query = no_query}).array() == T(0)).all());
    EXPECT_TRUE(
        (attn::attention(method, x.q, x.k, x.v, {.keep_key = no_key, .keep_query = no_query}).array() == T(0)).all());
  }
}

TYPED_TEST(SkyformerOf, ACommonShiftChangesNothing) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::init, {90, 130, 16, 12}, 61);
  const Eigen::RowVectorX<T> shift = Eigen::RowVectorX<T>::LinSpaced(16, -1, 1);
  const Matrix<T> q = x.q.rowwise() + shift, k = x.k.rowwise() + shift;
  const Strided<T> method(StridedSample{.num_landmarks = 24});
  const Matrix<double> expected = attn::attention(method, x.q, x.k, x.v).template cast<double>();
  EXPECT_LE(test::relative_error(attn::attention(method, q, k, x.v), expected), kTolerance<T>);
}

/// Tokens far from the origin that are exact in T: |q|^2 is then 10^6 times as large as |q - k|^2.
template <class T>
test::Tokens<T> far_tokens(const test::Shape& shape, T shift) {
  auto x = test::make_tokens<T>(Family::init, shape, 71);
  for (Matrix<T>* tokens : {&x.q, &x.k}) {
    *tokens = ((*tokens * T(256)).array().round() / T(256)).matrix();
    tokens->array() += shift;
  }
  return x;
}

TYPED_TEST(SkyformerOf, KeepsItsDigitsFarFromTheOrigin) {
  using T = TypeParam;
  const auto x = far_tokens<T>({90, 130, 16, 12}, T(1000));
  const auto keep_query = test::random_keep(90, 0.8, 72), keep_key = test::random_keep(130, 0.7, 73);
  Context context;
  for (const Mask& mask : {Mask{}, Mask{.keep_key = keep_key, .keep_query = keep_query}}) {
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask};
    const reference::Problem p = test::to_reference(in);
    const reference::Matrix landmarks = strided_landmarks(p, 24);
    for (const Rows rows : {Rows::raw, Rows::normalized}) {
      const auto kernel = reference::gaussian_kernel(16, {}, rows == Rows::normalized);
      const auto ridge = [](const reference::Matrix& a) { return reference::ridge_inverse(a, 0.1); };
      const auto iterated = [](const reference::Matrix& a) { return reference::preconditioned_pinv(a, 0.1, 6); };
      const StridedSample strided{.num_landmarks = 24};
      const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-10;
      EXPECT_LE(test::relative_error(forward(Strided<T>(strided, {}, GaussianKernel{.rows = rows}), in, context),
                                     skyformer(kernel, p, landmarks, ridge)),
                tolerance);
      EXPECT_LE(
          test::relative_error(forward(StridedIterative<T>(strided, {}, GaussianKernel{.rows = rows}), in, context),
                               skyformer(kernel, p, landmarks, iterated)),
          tolerance);
    }
  }
}

/// The gradients are those at the origin, which double computes.
TEST(Skyformer, GradientsKeepTheirDigitsFarFromTheOrigin) {
  const auto far = far_tokens<float>({50, 70, 16, 5}, 1000);
  const auto train = [&]<class T>(const test::Tokens<T>& x, Rows rows) {
    const Strided<T> method(StridedSample{.num_landmarks = 12}, {}, GaussianKernel{.rows = rows});
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
    const Matrix<T> dout = test::Random(74).normal(50, 5).template cast<T>();
    Matrix<T> out(50, 5);
    test::Tokens<T> gradients = x;
    typename Strided<T>::Saved saved;
    Context context;
    method.forward(in, out, context, saved);
    method.backward(in, out, dout, saved, {gradients.q, gradients.k, gradients.v}, context);
    return gradients;
  };
  test::Tokens<double> near{far.q.cast<double>(), far.k.cast<double>(), far.v.cast<double>()};
  near.q.array() -= 1000;
  near.k.array() -= 1000;
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const auto found = train(far, rows);
    const auto expected = train(near, rows);
    EXPECT_LE(test::relative_error(found.q, expected.q), 1e-4);
    EXPECT_LE(test::relative_error(found.k, expected.k), 1e-4);
    EXPECT_LE(test::relative_error(found.v, expected.v), 1e-4);
  }
}

TYPED_TEST(SkyformerOf, ARotationChangesNothing) {
  using T = TypeParam;
  const auto x = test::make_tokens<double>(Family::init, {90, 130, 16, 12}, 62);
  const Matrix<double> rotation = reference::orthogonal(test::Random(63).normal(16, 16));
  const auto run = [&](const Matrix<double>& q, const Matrix<double>& k) {
    return attn::attention(Strided<T>(StridedSample{.num_landmarks = 24}), Matrix<T>(q.cast<T>()),
                           Matrix<T>(k.cast<T>()), Matrix<T>(x.v.cast<T>()));
  };
  EXPECT_LE(test::relative_error(run(x.q * rotation, x.k * rotation), run(x.q, x.k).template cast<double>()),
            kTolerance<T>);
}

TEST(Skyformer, TheOrderOfLandmarksChangesNothing) {
  const auto x = test::make_tokens<double>(Family::init, {90, 130, 16, 12}, 64);
  const auto run = [&](const std::vector<Index>& rows) {
    return attn::attention(Skyformer<double, ChosenKeys>(ChosenKeys{.rows = rows}), x.q, x.k, x.v);
  };
  EXPECT_LE(test::relative_error(run({77, 3, 129, 40, 12}), run({3, 12, 40, 77, 129})), kTolerance<double>);
}

TEST(Skyformer, IsExactWithEveryKeyAsALandmarkAndNoRidge) {
  const auto x = test::make_tokens<double>(Family::init, {90, 130, 16, 12}, 65);
  const Skyformer<double, ChosenKeys> method(ChosenKeys{.rows = all_rows(130)}, RidgeInverse{.gamma = 1e-12});
  const reference::Problem p = test::to_reference<double>({.q = x.q, .k = x.k, .v = x.v});
  EXPECT_LE(test::relative_error(attn::attention(method, x.q, x.k, x.v), attend(reference::gaussian_kernel(16), p).out),
            1e-6);
}

/// With v the identity, q = k = X gives the approximation of kappa(X, X) itself: it is below the kernel matrix in the
/// Loewner order.
TEST(Skyformer, LeavesAPositiveSemidefiniteResidual) {
  for (const Family family : {Family::init, Family::smooth, Family::clusters}) {
    const auto x = test::make_tokens<double>(family, {210, 210, 16, 1}, 66);
    const Matrix<double> identity = Matrix<double>::Identity(210, 210);
    const Matrix<double> approximation =
        attn::attention(Strided<double>(StridedSample{.num_landmarks = 24}), x.q, x.q, identity);
    const Matrix<double> kernel = log_kernel(reference::gaussian_kernel(16), x.q, x.q).array().exp();
    const Matrix<double> residual = kernel - approximation;
    EXPECT_LE((residual - residual.transpose()).norm(), 1e-10);
    EXPECT_GE(reference::eigenvalues(residual)[0], -1e-8);
  }
}

TYPED_TEST(SkyformerOf, DuplicateTokensAndNoRidgeStayFinite) {
  using T = TypeParam;
  auto x = test::make_tokens<T>(Family::init, {64, 64, 16, 12}, 67);
  x.q = x.q.row(0).replicate(64, 1).eval();
  x.k = x.q;
  for (const double gamma : {0.1, 0.0}) {
    const Matrix<T> out =
        attn::attention(Strided<T>(StridedSample{.num_landmarks = 16}, RidgeInverse{.gamma = gamma}), x.q, x.k, x.v);
    EXPECT_TRUE(out.allFinite()) << gamma;
  }
}

/// Many more landmarks than their kernel matrix has directions, and next to no ridge: the method is as exact as with
/// the directions that there are.
TYPED_TEST(SkyformerOf, LeavesOutDirectionsThatAreZeroButForRounding) {
  using T = TypeParam;
  const auto x = test::curve_tokens<T>({1200, 1200, 8, 6}, 71);
  const reference::Problem p = test::to_reference<T>({.q = x.q, .k = x.k, .v = x.v});
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const reference::Matrix exact = attend(reference::gaussian_kernel(8, {}, rows == Rows::normalized), p).out;
    for (const Index m : {256, 600, 1000}) {
      for (const double gamma : {0.0, 1e-6}) {
        const Strided<T> method(StridedSample{.num_landmarks = m}, RidgeInverse{.gamma = gamma},
                                GaussianKernel{.rows = rows});
        EXPECT_LE(test::relative_error(attn::attention(method, x.q, x.k, x.v), exact), sizeof(T) == 4 ? 1e-5
                                                                                       : gamma > 0    ? 1e-6
                                                                                                      : 1e-11)
            << m << " landmarks, gamma " << gamma;
      }
    }
  }
}

TYPED_TEST(SkyformerOf, NormalizedRowsStayFiniteFarFromTheLandmarks) {
  using T = TypeParam;
  auto x = test::make_tokens<T>(Family::init, {64, 64, 16, 12}, 68);
  x.q.row(5).array() += T(1e3);
  const Strided<T> method(StridedSample{.num_landmarks = 16}, RidgeInverse{}, GaussianKernel{.rows = Rows::normalized});
  const Matrix<T> out = attn::attention(method, x.q, x.k, x.v);
  EXPECT_TRUE(out.allFinite());
  const Matrix<T> ones = attn::attention(method, x.q, x.k, Matrix<T>(Matrix<T>::Ones(64, 2)));
  for (Index i = 0; i < 64; ++i)
    EXPECT_NEAR(static_cast<double>(ones(i, 0)), 1, sizeof(T) == 4 ? 1e-5 : 1e-12) << "row " << i;
}

TYPED_TEST(SkyformerOf, IsTheSameOnEveryExecutor) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::unit, {900, 5000, 16, 9}, 69);
  const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const Strided<T> method(StridedSample{.num_landmarks = 130}, RidgeInverse{}, GaussianKernel{.rows = rows});
    Matrix<T> first;
    for (auto& [name, context] : test::contexts()) {
      SCOPED_TRACE(name);
      for (int call = 0; call < 2; ++call) {
        const Matrix<T> out = forward(method, in, context);
        if (first.size() == 0) first = out;
        EXPECT_TRUE(test::bitwise_equal(out, first));
      }
    }
  }
}

TEST(Skyformer, ErrsLessWithMoreUniformLandmarks) {
  const auto x = test::make_tokens<float>(Family::smooth, {500, 500, 16, 12}, 70);
  const reference::Problem p = test::to_reference<float>({.q = x.q, .k = x.k, .v = x.v});
  const reference::Matrix exact = attend(reference::gaussian_kernel(16), p).out;
  double previous = 1;
  for (const Index m : {16, 64, 256}) {
    const Skyformer<float> method(UniformSample{.num_landmarks = m}, RidgeInverse{.gamma = 1e-3});
    const double error = test::relative_error(attn::attention(method, x.q, x.k, x.v), exact);
    EXPECT_LT(error, previous) << m << " landmarks";
    previous = error;
  }
  EXPECT_LT(previous, 0.1);
}

}  // namespace
