#include <attn/nystrom.hpp>

#include <attn/exact.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <numbers>
#include <optional>
#include <string>
#include <vector>

namespace {

using attn::IterativePinv;
using attn::Nystrom;
using attn::SegmentMeans;
using attn::SoftmaxAttention;
using attn::SoftmaxKernel;
using test::Context;
using test::Family;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;

using Dense = reference::Matrix;

template <class T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-5 : 1e-11;

Dense defined(const reference::Problem& p, Index m, int iterations, std::optional<double> scale = {}) {
  return nystrom(reference::softmax_kernel(p.q.cols(), scale), p, m, iterations);
}

template <class T>
class NystromOf : public ::testing::Test {};
TYPED_TEST_SUITE(NystromOf, test::Scalars);

TYPED_TEST(NystromOf, IsItsDefinition) {
  using T = TypeParam;
  constexpr std::array<Index, 3> kSizes[] = {{77, 77, 8},   {61, 90, 8},   {300, 41, 40},
                                             {33, 700, 32}, {129, 128, 1}, {500, 500, 65}};
  for (const auto& [n_q, n_k, m] : kSizes) {
    const auto x = test::make_tokens<T>(Family::init, {n_q, n_k, 16, 12}, 301);
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
    for (const int iterations : {1, 6}) {
      const Nystrom<T> method(SegmentMeans{.num_landmarks = m}, IterativePinv{.iterations = iterations},
                              SoftmaxKernel{.scale = 0.4});
      const Dense expected = defined(test::to_reference(in), m, iterations, 0.4);
      EXPECT_LE(test::relative_error(attn::attention(method, x.q, x.k, x.v), expected), kTolerance<T>)
          << n_q << " queries, " << n_k << " keys, " << m << " landmarks";
    }
  }
}

TYPED_TEST(NystromOf, CutsSegmentsOverKeptRows) {
  using T = TypeParam;
  const auto keep_query = test::random_keep(130, 0.6, 302), keep_key = test::random_keep(210, 0.3, 303);
  const auto x = test::make_tokens<T>(Family::smooth, {130, 210, 16, 12}, 304);
  for (const Mask& mask : {Mask{.keep_key = keep_key}, Mask{.keep_query = keep_query},
                           Mask{.keep_key = keep_key, .keep_query = keep_query}}) {
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask};
    for (const Index m : {7, 32}) {
      const Matrix<T> out = attn::attention(Nystrom<T>(SegmentMeans{.num_landmarks = m}), x.q, x.k, x.v, mask);
      EXPECT_LE(test::relative_error(out, defined(test::to_reference(in), m, 6)), kTolerance<T>) << m << " landmarks";
    }
  }
}

/// A single dropped row moves all segments after it.
TYPED_TEST(NystromOf, CutsSegmentsAroundOneDroppedRow) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::init, {60, 60, 16, 5}, 313);
  for (const std::size_t dropped : {0U, 7U, 59U}) {
    std::vector<std::uint8_t> keep(60, 1);
    keep[dropped] = 0;
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.keep_key = keep, .keep_query = keep}};
    const Matrix<T> out = attn::attention(Nystrom<T>(SegmentMeans{.num_landmarks = 12}), x.q, x.k, x.v, in.mask);
    EXPECT_LE(test::relative_error(out, defined(test::to_reference(in), 12, 6)), kTolerance<T>) << dropped;
  }
}

/// A kernel whose entries are above 1, for its bias is below half its scale, or below.
struct OwnKernel {
  double factor, penalty;

  double scale(Index) const { return factor; }
  double bias(Index) const { return penalty; }
  static attn::Rows rows() { return attn::Rows::normalized; }
};

TYPED_TEST(NystromOf, TakesAKernelOfOnesOwn) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::init, {130, 210, 16, 5}, 314);
  for (const OwnKernel& kernel :
       {OwnKernel{0.3, 0.05}, OwnKernel{0.3, 0.15}, OwnKernel{0.2, 0.4}, OwnKernel{-0.3, -0.1}}) {
    const Nystrom<T, SegmentMeans, IterativePinv, OwnKernel> method(SegmentMeans{.num_landmarks = 12}, {}, kernel);
    const reference::Problem p = test::to_reference<T>({.q = x.q, .k = x.k, .v = x.v});
    EXPECT_LE(test::relative_error(attn::attention(method, x.q, x.k, x.v),
                                   nystrom({kernel.factor, kernel.penalty, true}, p, 12, 6)),
              sizeof(T) == 4 ? 1e-5 : 1e-11)
        << kernel.factor << ", " << kernel.penalty;
  }
}

TYPED_TEST(NystromOf, IsExactWhenTheLandmarksSuffice) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::unit, {90, 50, 16, 12}, 305);
  const auto keep_query = test::random_keep(90, 0.3, 306), keep_key = test::random_keep(50, 0.5, 307);
  const auto count = [](const std::vector<std::uint8_t>& keep) {
    return std::ssize(keep) - std::count(keep.begin(), keep.end(), 0);
  };
  const auto same = [&](Index m, const Mask& mask) {
    return test::bitwise_equal(attn::attention(Nystrom<T>(SegmentMeans{.num_landmarks = m}), x.q, x.k, x.v, mask),
                               attn::attention(SoftmaxAttention<T>{}, x.q, x.k, x.v, mask));
  };
  EXPECT_TRUE(same(50, {}));
  EXPECT_TRUE(same(500, {}));
  EXPECT_FALSE(same(49, {}));
  EXPECT_TRUE(same(count(keep_key), {.keep_key = keep_key}));
  EXPECT_FALSE(same(count(keep_key) - 1, {.keep_key = keep_key}));
  EXPECT_TRUE(same(count(keep_query), {.keep_query = keep_query}));
  EXPECT_FALSE(same(count(keep_query) - 1, {.keep_query = keep_query}));
}

/// kappa = exp(factor q.k), rows raw: a weight may be any positive number.
struct RawKernel {
  double factor;

  double scale(Index) const { return factor; }
  double bias(Index) const { return 0; }
  attn::Rows rows() const { return attn::Rows::raw; }
};

/// Of equal tokens of length 1, all weights are 2^exponent.
template <class T>
struct EqualTokens {
  Index n = 40;
  Matrix<T> x = Matrix<T>::Constant(n, 4, T(0.5)),
            v = test::Random(314).normal(n, 3).cwiseAbs().template cast<T>() / T(1 << 10);

  auto method(double exponent) const {
    return Nystrom<T, SegmentMeans, IterativePinv, RawKernel>(SegmentMeans{.num_landmarks = 4}, {},
                                                              RawKernel{exponent / std::numbers::log2e});
  }
  /// What every row of the result is, times 2^-exponent.
  Dense expected() const { return v.template cast<double>().colwise().sum().replicate(n, 1); }
};

TYPED_TEST(NystromOf, RawWeightsMayBeLarge) {
  using T = TypeParam;
  const EqualTokens<T> tokens;
  for (const double exponent : {0.0, 20.0, 60.0, 80.0, 0.9 * std::numeric_limits<T>::max_exponent}) {
    const Matrix<T> out = attn::attention(tokens.method(exponent), tokens.x, tokens.x, tokens.v);
    const Dense relative = out.template cast<double>() * std::exp2(-exponent);
    EXPECT_LE(test::relative_error(relative, tokens.expected()), kTolerance<T> * (1 + exponent / 10)) << exponent;
  }
}

TYPED_TEST(NystromOf, RawWeightsThatOverflowGiveNothingFinite) {
  using T = TypeParam;
  const EqualTokens<T> tokens;
  constexpr double kEnd = std::numeric_limits<T>::max_exponent;
  for (const double exponent :
       {kEnd - 1, kEnd - 0.25, kEnd + 0.25, kEnd + 1, kEnd + 1.6, kEnd + 40, 2 * kEnd, 3 * kEnd - 0.3, 1e5}) {
    const Matrix<T> out = attn::attention(tokens.method(exponent), tokens.x, tokens.x, tokens.v);
    for (Index i = 0; i < out.size(); ++i)
      EXPECT_FALSE(std::isfinite(out.data()[i])) << exponent << " gives " << out.data()[i];
  }
}

TEST(NystromInvariances, AShiftOfTheKeysChangesNothing) {
  auto x = test::make_tokens<double>(Family::smooth, {120, 150, 16, 12}, 308);
  const Nystrom<double> method(SegmentMeans{.num_landmarks = 16});
  const Matrix<double> before = attn::attention(method, x.q, x.k, x.v);
  x.k.rowwise() += 3.0 * test::Random(309).normal(1, 16).row(0);
  EXPECT_LE(test::relative_error(attn::attention(method, x.q, x.k, x.v), before), 1e-11);
}

TEST(NystromInvariances, ARotationChangesNothing) {
  auto x = test::make_tokens<double>(Family::smooth, {120, 150, 16, 12}, 310);
  const Nystrom<double> method(SegmentMeans{.num_landmarks = 16});
  const Matrix<double> before = attn::attention(method, x.q, x.k, x.v);
  Eigen::VectorXd axis = test::Random(311).normal(16, 1).col(0);
  axis.normalize();
  x.q -= (2 * (x.q * axis) * axis.transpose()).eval();
  x.k -= (2 * (x.k * axis) * axis.transpose()).eval();
  EXPECT_LE(test::relative_error(attn::attention(method, x.q, x.k, x.v), before), 1e-11);
}

TEST(NystromInvariances, TheResultIsLinearInTheValues) {
  const auto x = test::make_tokens<double>(Family::init, {100, 130, 16, 12}, 312);
  const Matrix<double> w = test::Random(313).normal(130, 12), sum = 2 * x.v - 3 * w;
  const Nystrom<double> method(SegmentMeans{.num_landmarks = 16});
  const auto out = [&](const Matrix<double>& v) { return attn::attention(method, x.q, x.k, v); };
  EXPECT_LE(test::relative_error(out(sum), 2 * out(x.v) - 3 * out(w)), 1e-12);
}

TEST(SegmentMeansOf, UnevenSegmentsHaveTheLongerOnesLast) {
  Matrix<double> x(11, 1);
  for (Index i = 0; i < 11; ++i) x(i, 0) = static_cast<double>(i);
  const auto means = [&](Index m, const auto& keeps) -> std::vector<double> {
    Context context;
    auto scratch = context.scratch();
    const Matrix<double> selected = SegmentMeans{.num_landmarks = m}.select<double>(x, keeps, scratch);
    return {selected.data(), selected.data() + selected.size()};
  };
  const auto all = [](Index) { return true; };
  EXPECT_EQ(means(4, all), (std::vector<double>{0.5, 3, 6, 9}));
  EXPECT_EQ(means(1, all), std::vector<double>{5});
  EXPECT_EQ(means(3, all), (std::vector<double>{1, 4.5, 8.5}));
  EXPECT_EQ(means(11, all), (std::vector<double>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}));
  EXPECT_EQ(means(2, [](Index i) { return i % 2 == 1; }), (std::vector<double>{2, 7}));  // 1 3 and 5 7 9
}

TEST(SegmentMeansOf, LongSegmentsPassOverDroppedRows) {
  const Dense x = test::Random(252).normal(150'000, 3);
  const auto keep = test::random_keep(x.rows(), 0.9, 253);
  const auto keeps = [&](Index i) { return reference::kept(keep, i); };
  Context context;
  for (const Index m : {1, 2, 300}) {
    attn::Scratch scratch = context.scratch();
    const Dense means =
        SegmentMeans{.num_landmarks = m}.select<double>(attn::detail::TokenRows<double>(x), keeps, scratch);
    EXPECT_LE(test::relative_error(means, reference::segment_means(reference::kept_rows(x, keep), m)), 1e-12)
        << m << " landmarks";
  }
}

/// n tokens in so many pieces that are the same throughout, of coordinates near 3: a long chain of additions rounds
/// each the same way.
test::Tokens<float> pieces_of_tokens(Index n, Index pieces) {
  test::Tokens<float> x{Matrix<float>(n, 4), {}, Matrix<float>(n, 2)};
  test::Random random(251);
  for (Index i = 0; i < n; ++i) {
    x.q.row(i) = i % (n / pieces) == 0 ? Matrix<float>((3 + random.normal(1, 4).array()).cast<float>())
                                       : Matrix<float>(x.q.row(i - 1));
    x.v.row(i) << static_cast<float>(random.normal()), static_cast<float>(i < n / 3);
  }
  x.k = x.q;
  return x;
}

/// The means are those of the tokens, and attention through them as exact as with few.
TEST(SegmentMeansOf, AMillionTokensAreAsAccurateAsOfFew) {
  constexpr Index n = Index{1} << 20;
  for (const Index m : {1, 8, 64}) {
    const auto x = pieces_of_tokens(n, std::max<Index>(m, 8));
    const Matrix<double> q = x.q.cast<double>(), v = x.v.cast<double>();
    const SegmentMeans landmarks{.num_landmarks = m};
    EXPECT_LE(test::relative_error(attn::attention(Nystrom<float>(landmarks), x.q, x.k, x.v),
                                   attn::attention(Nystrom<double>(landmarks), q, q, v)),
              1e-5)
        << m << " landmarks";
    Context context;
    attn::Scratch scratch = context.scratch();
    const Matrix<float> means = landmarks.select<float>(
        attn::detail::TokenRows<float>(x.q), [](Index) { return true; }, scratch);
    EXPECT_LE(test::relative_error(means, reference::segment_means(q, m)), 3e-6) << m << " landmarks";
  }
}

TEST(NystromRefuses, OptionsOutOfRange) {
  const Matrix<float> x = Matrix<float>::Zero(6, 4);
  const auto error = [&](Index num_landmarks, int iterations, double scale) {
    const Nystrom<float> method(SegmentMeans{num_landmarks}, IterativePinv{iterations}, SoftmaxKernel{.scale = scale});
    return test::error_of([&] { attn::attention(method, x, x, x); });
  };
  EXPECT_EQ(error(2, 6, 1), "no error");
  EXPECT_EQ(error(0, 6, 1), "nystrom: num_landmarks is 0, should be at least 1");
  EXPECT_EQ(error(2, 0, 1), "nystrom: iterations is 0, should be at least 1");
  EXPECT_EQ(error(2, 6, std::numeric_limits<double>::infinity()), "nystrom: scale is inf, should be finite");
}

}  // namespace
