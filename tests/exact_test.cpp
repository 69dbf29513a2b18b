#include <attn/exact.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using attn::Causal;
using attn::GaussianAttention;
using attn::GaussianKernel;
using attn::Rows;
using attn::SoftmaxAttention;
using attn::SoftmaxKernel;
using test::Context;
using test::Family;
using test::Index;
using test::Inputs;
using test::Matrix;
using test::Padded;
using test::Shape;
using test::Tokens;

static_assert(attn::Approximator<SoftmaxAttention<float>> && attn::Approximator<GaussianAttention<double>>);
static_assert(SoftmaxAttention<float>::kName == "softmax" && GaussianAttention<float>::kName == "gaussian");

/// forward on views that are wider than their rows, NaN in the inputs' padding; checks that out's padding stays as it
/// was.
template <class Method, class T = typename Method::Scalar>
Matrix<T> forward_on_strided_views(const Method& method, const Tokens<T>& x, const attn::Mask& mask, Context& context) {
  Padded<T> q(x.q, 3, test::kNaN<T>), k(x.k, 1, test::kNaN<T>), v(x.v, 5, test::kNaN<T>),
      out(x.q.rows(), x.v.cols(), 2, T(-7));
  method.forward({.q = q.view(), .k = k.view(), .v = v.view(), .mask = mask}, out.view(), context);
  EXPECT_TRUE(out.padding_untouched());
  return out.matrix();
}

template <class T>
void expect_both_kernels_close(Family family, const Shape& shape) {
  SCOPED_TRACE("n_q " + std::to_string(shape.n_q) + ", n_k " + std::to_string(shape.n_k) + ", d " +
               std::to_string(shape.d) + ", d_v " + std::to_string(shape.d_v) +
               (sizeof(T) == 4 ? ", float" : ", double"));
  const Tokens<T> x = test::make_tokens<T>(family, shape, static_cast<std::uint64_t>(shape.d * 1000 + shape.d_v));
  const reference::Problem p = test::to_reference<T>({.q = x.q, .k = x.k, .v = x.v});
  Context context;
  const auto softmax = reference::softmax_kernel(shape.d), gaussian = reference::gaussian_kernel(shape.d);
  test::expect_close(forward_on_strided_views(SoftmaxAttention<T>{}, x, {}, context), attend(softmax, p), p, softmax);
  test::expect_close(forward_on_strided_views(GaussianAttention<T>{}, x, {}, context), attend(gaussian, p), p,
                     gaussian);
}

/// Rows [first, first + count) of n are kept.
struct Filled {
  Index n, first, count;

  bool holds(Index i) const { return i >= first && i < first + count; }
  std::vector<std::uint8_t> keep() const {
    std::vector<std::uint8_t> all(static_cast<std::size_t>(n));
    for (Index i = 0; i < n; ++i) all[static_cast<std::size_t>(i)] = holds(i) ? 1 : 0;
    return all;
  }
};

/// x with NaN where a row is not filled.
template <class T>
Matrix<T> only_filled(const Matrix<T>& x, const Filled& filled) {
  Matrix<T> y = x;
  for (Index i = 0; i < y.rows(); ++i) {
    if (!filled.holds(i)) y.row(i).setConstant(static_cast<T>(test::kNaN<float>));
  }
  return y;
}

/// m's filled rows are those of expected, the others 0.
template <class T>
void expect_filled_rows(const Matrix<T>& m, const reference::Matrix& expected, const Filled& filled, double tolerance) {
  EXPECT_LE(test::relative_error<T>(m.middleRows(filled.first, filled.count), expected), tolerance);
  for (Index i = 0; i < m.rows(); ++i) EXPECT_TRUE(filled.holds(i) || (m.row(i).array() == T(0)).all()) << i;
}

/// Results and gradients under lower_right are those of the oracle for the filled rows alone, of which no mask drops
/// any.
template <class T, class Kernel>
void expect_as_trimmed(const Kernel& kernel, const reference::Kernel& oracle, const Filled& queries, const Filled& keys,
                       double tolerance) {
  const auto x = test::make_tokens<double>(Family::init, {queries.n, keys.n, 9, 6}, 91);
  const auto in_memory = [](const reference::Matrix& m, const Filled& filled) {
    return only_filled<T>(m.template cast<T>(), filled);
  };
  const Matrix<T> q = in_memory(x.q, queries), k = in_memory(x.k, keys), v = in_memory(x.v, keys);
  const Matrix<T> dout = in_memory(test::Random(92).normal(queries.n, 6), queries);
  const auto keep_key = keys.keep(), keep_query = queries.keep();
  const Inputs<T> in{
      .q = q, .k = k, .v = v, .mask = {.causal = Causal::lower_right, .keep_key = keep_key, .keep_query = keep_query}};
  Matrix<T> out(queries.n, 6), dq(queries.n, 9), dk(keys.n, 9), dv(keys.n, 6);
  const attn::ExactAttention<T, Kernel> method{kernel};
  typename attn::ExactAttention<T, Kernel>::Saved saved;
  Context context;
  method.forward(in, out, context, saved);
  method.backward(in, out, dout, saved, {dq, dk, dv}, context);

  const auto filled = [](const Matrix<T>& m, const Filled& of) -> reference::Matrix {
    return m.middleRows(of.first, of.count).template cast<double>();
  };
  const reference::Problem p{filled(q, queries), filled(k, keys), filled(v, keys), {.causal = Causal::lower_right}};
  const reference::Gradients gradients = attend_backward(oracle, p, filled(dout, queries));
  expect_filled_rows(out, attend(oracle, p).out, queries, tolerance);
  expect_filled_rows(dq, gradients.dq, queries, 10 * tolerance);
  expect_filled_rows(dk, gradients.dk, keys, 10 * tolerance);
  expect_filled_rows(dv, gradients.dv, keys, 10 * tolerance);
}

template <class T>
class LowerRight : public ::testing::Test {};
using AllScalars = ::testing::Types<float, double, Eigen::half, Eigen::bfloat16>;
TYPED_TEST_SUITE(LowerRight, AllScalars);

TYPED_TEST(LowerRight, CountsToTheLastKeptRows) {
  constexpr bool kNarrow = sizeof(TypeParam) == 2, kHalf = std::is_same_v<TypeParam, Eigen::half>;
  constexpr double kTolerance = kHalf ? 2e-3 : kNarrow ? 1.6e-2 : sizeof(TypeParam) == 4 ? 2e-6 : 1e-13;
  struct Case {
    Filled queries, keys;
  };
  for (const auto& [queries, keys] :
       {Case{{4, 0, 4}, {10, 0, 7}},  // a cache that is not full
        Case{{7, 0, 5}, {7, 0, 5}},   // one mask for both
        Case{{6, 1, 3}, {10, 2, 5}},  // padding on both sides
        Case{{40, 0, 40}, {30, 0, 20}}, Case{{300, 20, 250}, {700, 30, 500}}, Case{{1, 0, 1}, {3000, 0, 2100}}}) {
    SCOPED_TRACE(std::to_string(keys.n) + " keys");
    expect_as_trimmed<TypeParam>(SoftmaxKernel{}, reference::softmax_kernel(9), queries, keys, kTolerance);
    for (const Rows rows : {Rows::raw, Rows::normalized}) {
      expect_as_trimmed<TypeParam>(GaussianKernel{.rows = rows},
                                   reference::gaussian_kernel(9, {}, rows == Rows::normalized), queries, keys,
                                   kTolerance);
    }
  }
}

TEST(Scales, ThatVanishInTheTypeWeighAllKeysAlike) {
  const auto x = test::make_tokens<float>(Family::init, {20, 30, 9, 6}, 94);
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
  const Eigen::RowVectorXd sum = x.v.cast<double>().colwise().sum();
  const reference::Matrix sums = sum.replicate(20, 1), means = sums / 30;
  Matrix<float> out(20, 6);
  Context context;
  for (const double bandwidth : {1e22, 1e200}) {
    GaussianAttention<float>{GaussianKernel{.bandwidth = bandwidth}}.forward(in, out, context);
    EXPECT_LE(test::relative_error(out, sums), 2e-6) << bandwidth;
    GaussianAttention<float>{GaussianKernel{.bandwidth = bandwidth, .rows = Rows::normalized}}.forward(in, out,
                                                                                                       context);
    EXPECT_LE(test::relative_error(out, means), 2e-6) << bandwidth;
  }
  SoftmaxAttention<float>{SoftmaxKernel{.scale = 1e-50}}.forward(in, out, context);
  EXPECT_LE(test::relative_error(out, means), 2e-6);
}

class Widths : public ::testing::TestWithParam<Index> {};

TEST_P(Widths, WithEveryWidthOfValues) {
  for (const Index d_v : {1, 3, 16, 32, 33, 64, 128}) {
    expect_both_kernels_close<float>(Family::init, {37, 150, GetParam(), d_v});
    expect_both_kernels_close<double>(Family::init, {37, 150, GetParam(), d_v});
  }
}

INSTANTIATE_TEST_SUITE_P(Exact, Widths, ::testing::Values(1, 3, 16, 32, 33, 64, 128));

class Lengths : public ::testing::TestWithParam<std::pair<Index, Index>> {};

TEST_P(Lengths, AtTwoWidths) {
  const auto [n_q, n_k] = GetParam();
  for (const auto& [d, d_v] : {std::pair<Index, Index>{64, 64}, {7, 5}}) {
    expect_both_kernels_close<float>(Family::unit, {n_q, n_k, d, d_v});
    expect_both_kernels_close<double>(Family::unit, {n_q, n_k, d, d_v});
  }
}

INSTANTIATE_TEST_SUITE_P(Exact, Lengths,
                         ::testing::Values(std::pair<Index, Index>{1, 1}, std::pair<Index, Index>{1, 2},
                                           std::pair<Index, Index>{2, 1}, std::pair<Index, Index>{7, 5},
                                           std::pair<Index, Index>{1, 257}, std::pair<Index, Index>{255, 1},
                                           std::pair<Index, Index>{64, 64}, std::pair<Index, Index>{129, 1023},
                                           std::pair<Index, Index>{700, 1300}, std::pair<Index, Index>{3, 20'000},
                                           std::pair<Index, Index>{1, 4097}, std::pair<Index, Index>{2500, 40}));

TEST(Exact, IsAccurateOnEveryFamilyOfInputs) {
  for (const Family family : test::kFamilies) {
    SCOPED_TRACE(static_cast<int>(family));
    expect_both_kernels_close<float>(family, {301, 299, 64, 32});
    expect_both_kernels_close<double>(family, {301, 299, 64, 32});
  }
}

/// More than are summed up at a time where keys are few.
TEST(Exact, IsAccurateWithManyFeatures) {
  expect_both_kernels_close<float>(Family::unit, {170, 40, 280, 270});
  expect_both_kernels_close<double>(Family::unit, {170, 40, 280, 270});
}

TEST(Exact, FloatStaysAccurateOverManyKeys) {
  for (const Index n_k : {1024, 4096, 8192}) {
    SCOPED_TRACE(n_k);
    Tokens<float> x = test::make_tokens<float>(Family::init, {64, n_k, 64, 64}, 5);
    x.v = x.v.cwiseAbs();  // no cancellation, so that every rounding error of a long sum counts
    const reference::Problem p = test::to_reference<float>({.q = x.q, .k = x.k, .v = x.v});
    const auto softmax = reference::softmax_kernel(64), gaussian = reference::gaussian_kernel(64);
    test::expect_close(attn::attention(SoftmaxAttention<float>{}, x.q, x.k, x.v), attend(softmax, p), p, softmax);
    test::expect_close(attn::attention(GaussianAttention<float>{}, x.q, x.k, x.v), attend(gaussian, p), p, gaussian);
  }
}

TEST(Exact, TakesItsKernelsParameters) {
  const auto x = test::make_tokens<double>(Family::unit, {40, 60, 16, 8});
  const reference::Problem p = test::to_reference<double>({.q = x.q, .k = x.k, .v = x.v});
  const SoftmaxAttention<double> softmax(SoftmaxKernel{.scale = 0.4});
  EXPECT_LE(
      test::relative_error(attn::attention(softmax, x.q, x.k, x.v), attend(reference::softmax_kernel(16, 0.4), p).out),
      1e-13);
  const SoftmaxAttention<double> negative(SoftmaxKernel{.scale = -0.4});
  EXPECT_LE(test::relative_error(attn::attention(negative, x.q, x.k, x.v),
                                 attend(reference::softmax_kernel(16, -0.4), p).out),
            1e-13);
  const GaussianAttention<double> gaussian(GaussianKernel{.bandwidth = 3.0, .rows = Rows::normalized});
  EXPECT_LE(test::relative_error(attn::attention(gaussian, x.q, x.k, x.v),
                                 attend(reference::gaussian_kernel(16, 3.0, true), p).out),
            1e-13);
}

template <class T>
class ExactOf : public ::testing::Test {};
TYPED_TEST_SUITE(ExactOf, test::Scalars);

TYPED_TEST(ExactOf, SoftmaxRowsSumToOne) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::smooth, {210, 333, 16, 4});
  const Matrix<T> ones = Matrix<T>::Ones(333, 4);
  const Matrix<T> out = attn::attention(SoftmaxAttention<T>{}, x.q, x.k, ones);
  EXPECT_LE((out.array() - T(1)).abs().maxCoeff(), 8 * std::numeric_limits<T>::epsilon());
}

TYPED_TEST(ExactOf, AShiftOfTheKeysLeavesSoftmaxAlone) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::unit, {65, 130, 16, 12});
  const Eigen::RowVectorX<T> shift = Eigen::RowVectorX<T>::LinSpaced(16, -1, 1);
  const Matrix<T> shifted = x.k.rowwise() + shift;
  const Matrix<double> expected = attn::attention(SoftmaxAttention<T>{}, x.q, x.k, x.v).template cast<double>();
  EXPECT_LE(test::relative_error(attn::attention(SoftmaxAttention<T>{}, x.q, shifted, x.v), expected),
            10 * test::kExactTolerance<T>);
}

TYPED_TEST(ExactOf, ACommonShiftLeavesGaussianAlone) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::unit, {65, 130, 16, 12});
  const Eigen::RowVectorX<T> shift = Eigen::RowVectorX<T>::LinSpaced(16, -1, 1);
  const Matrix<T> q = x.q.rowwise() + shift, k = x.k.rowwise() + shift;
  const Matrix<double> expected = attn::attention(GaussianAttention<T>{}, x.q, x.k, x.v).template cast<double>();
  EXPECT_LE(test::relative_error(attn::attention(GaussianAttention<T>{}, q, k, x.v), expected),
            10 * test::kExactTolerance<T>);
}

/// Far from the origin |q|^2 and |k|^2 are 10^4 times as large as |q - k|^2; the result is that of the inputs as they
/// are stored.
TYPED_TEST(ExactOf, GaussianKeepsItsDigitsFarFromTheOrigin) {
  using T = TypeParam;
  for (const Causal causal : {Causal::none, Causal::upper_left}) {
    for (const Rows rows : {Rows::raw, Rows::normalized}) {
      auto x = test::make_tokens<T>(Family::unit, {90, 130, 64, 12});
      x.q.array() += T(100);
      x.k.array() += T(100);
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
      const auto kernel = reference::gaussian_kernel(64, {}, rows == Rows::normalized);
      const reference::Problem p = test::to_reference(in);
      test::expect_close(attn::attention(GaussianAttention<T>(GaussianKernel{.rows = rows}), x.q, x.k, x.v, in.mask),
                         attend(kernel, p), p, kernel);
    }
  }
}

TEST(Exact, GaussianKeepsItsDigitsWhateverKeysAreKept) {
  for (const Index n_k : {1500, 2500, 5000}) {
    for (const Index kept_of_each : {2, 3, 5}) {
      SCOPED_TRACE(std::to_string(n_k) + " keys, one of " + std::to_string(kept_of_each));
      auto x = test::make_tokens<float>(Family::unit, {33, n_k, 16, 3});
      x.q.array() += 100.0F;
      x.k.array() += 100.0F;
      std::vector<std::uint8_t> keep(static_cast<std::size_t>(n_k));
      for (std::size_t j = 0; j < keep.size(); ++j) keep[j] = j % static_cast<std::size_t>(kept_of_each) == 1;
      const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.keep_key = keep}};
      const auto kernel = reference::gaussian_kernel(16);
      const reference::Problem p = test::to_reference(in);
      test::expect_close(attn::attention(GaussianAttention<float>{}, x.q, x.k, x.v, in.mask), attend(kernel, p), p,
                         kernel);
    }
  }
}

/// C = D_Q^-1/2 exp(q k^T / sqrt d) D_K^-1/2 with D_Q = diag(exp(|q|^2 / sqrt d)): Chen et al. 2021, section 4.1.
TYPED_TEST(ExactOf, GaussianIsSoftmaxKernelWithoutItsDiagonals) {
  using T = TypeParam;
  const auto x = test::make_tokens<double>(Family::init, {40, 60, 16, 5});
  const double s = 0.25;
  const Matrix<double> weights = (s * (x.q * x.k.transpose())).array().exp();
  const Eigen::VectorXd d_q = (-0.5 * s * x.q.rowwise().squaredNorm()).array().exp(),
                        d_k = (-0.5 * s * x.k.rowwise().squaredNorm()).array().exp();
  const Matrix<double> expected = d_q.asDiagonal() * weights * d_k.asDiagonal() * x.v;
  const Matrix<T> q = x.q.cast<T>(), k = x.k.cast<T>(), v = x.v.cast<T>();
  EXPECT_LE(test::relative_error(attn::attention(GaussianAttention<T>{}, q, k, v), expected), test::kExactTolerance<T>);
}

TYPED_TEST(ExactOf, PaddedIsTrimmed) {
  using T = TypeParam;
  constexpr Index kLength = 210, kKept = 150;
  const auto x = test::make_tokens<T>(Family::smooth, {kLength, kLength, 16, 12});
  std::vector<std::uint8_t> keep(kLength, 0);
  std::fill_n(keep.begin(), kKept, std::uint8_t{1});
  const auto expect_padded_is_trimmed = [&](const auto& method) {
    const Matrix<T> padded = attn::attention(method, x.q, x.k, x.v, {.keep_key = keep, .keep_query = keep});
    const Matrix<T> trimmed = attn::attention(method, x.q.topRows(kKept), x.k.topRows(kKept), x.v.topRows(kKept));
    EXPECT_LE(test::relative_error(Matrix<T>(padded.topRows(kKept)), trimmed.template cast<double>()),
              test::kExactTolerance<T>);
    EXPECT_TRUE((padded.bottomRows(kLength - kKept).array() == 0).all());
  };
  expect_padded_is_trimmed(SoftmaxAttention<T>{});
  expect_padded_is_trimmed(GaussianAttention<T>{});
}

TYPED_TEST(ExactOf, EqualKeysGiveTheMeanOfTheValues) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::unit, {30, 700, 16, 12});
  const Matrix<T> k = x.k.row(0).replicate(700, 1);
  const Matrix<double> expected = x.v.template cast<double>().colwise().mean().replicate(30, 1);
  EXPECT_LE(test::relative_error(attn::attention(SoftmaxAttention<T>{}, x.q, k, x.v), expected),
            10 * test::kExactTolerance<T>);
}

TYPED_TEST(ExactOf, OneTokenIsItsOwnValue) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::self, {1, 1, 16, 12});
  EXPECT_LE((attn::attention(SoftmaxAttention<T>{}, x.q, x.k, x.v) - x.v).cwiseAbs().maxCoeff(), T(0));
  EXPECT_LE(test::relative_error(attn::attention(GaussianAttention<T>{}, x.q, x.k, x.v), x.v.template cast<double>()),
            test::kExactTolerance<T>);
}

/// Keys in ascending order of score: every tile raises the running maximum.
TYPED_TEST(ExactOf, IsAccurateWhereScoresGrowAlongTheKeys) {
  using T = TypeParam;
  for (const double top : {30.0, 300.0, 3000.0}) {
    SCOPED_TRACE(top);
    const Index n_k = 3000;
    auto x = test::make_tokens<T>(Family::unit, {5, n_k, 1, 6});
    x.q.setOnes();
    x.k.col(0) = Eigen::VectorX<T>::LinSpaced(n_k, static_cast<T>(-top), static_cast<T>(top));
    const reference::Problem p = test::to_reference<T>({.q = x.q, .k = x.k, .v = x.v});
    const auto kernel = reference::softmax_kernel(1);
    const double tolerance =
        test::kExactTolerance<T> + 4 * top * static_cast<double>(std::numeric_limits<T>::epsilon());
    test::expect_close(attn::attention(SoftmaxAttention<T>{}, x.q, x.k, x.v), attend(kernel, p), p, kernel, tolerance);
  }
}

/// The row's own value wins where logits are huge, for any order of the keys.
TYPED_TEST(ExactOf, HugeLogitsPickTheLargest) {
  using T = TypeParam;
  for (const T size : {T(1e2), T(1e4), T(1e15)}) {
    SCOPED_TRACE(size);
    auto x = test::make_tokens<T>(Family::unit, {40, 40, 40, 6});
    x.q = size * Matrix<T>::Identity(40, 40);
    x.k = size * Matrix<T>::Identity(40, 40);
    const Matrix<T> out = attn::attention(SoftmaxAttention<T>{}, x.q, x.k, x.v);
    EXPECT_TRUE((out.array() == x.v.array()).all());
    const Matrix<T> negative = attn::attention(SoftmaxAttention<T>{}, x.q, Matrix<T>(-x.k), x.v);
    EXPECT_TRUE(negative.allFinite());
  }
}

/// Under causal masks, and where keys are few, too: scores of 0 to 1e15 whose largest lies at any place.
TYPED_TEST(ExactOf, HugeLogitsPickTheLargestOfThoseSeen) {
  using T = TypeParam;
  for (const auto& [n_q, n_k] : {std::pair<Index, Index>{40, 40}, {200, 20}, {200, 37}, {400, 90}}) {
    for (const Causal causal : {Causal::none, Causal::upper_left}) {
      for (const Index top : {Index{0}, n_k / 2, n_k - 1}) {
        SCOPED_TRACE(std::to_string(n_q) + ", " + std::to_string(n_k) + ", key " + std::to_string(top));
        auto x = test::make_tokens<T>(Family::unit, {n_q, n_k, 1, 6});
        x.q.setOnes();
        x.k.setZero();
        x.k(top, 0) = T(1e15);
        const Matrix<T> out = attn::attention(SoftmaxAttention<T>{}, x.q, x.k, x.v, {.causal = causal});
        for (Index i = causal == Causal::none ? 0 : top; i < n_q; ++i) {
          EXPECT_TRUE((out.row(i).array() == x.v.row(top).array()).all()) << "row " << i;
        }
        EXPECT_TRUE(out.allFinite());
      }
    }
  }
}

TYPED_TEST(ExactOf, NormalizedGaussianIsRightFarFromTheKeys) {
  using T = TypeParam;
  auto x = test::make_tokens<T>(Family::init, {20, 300, 16, 6});
  x.q.array() += T(40);
  const GaussianAttention<T> method(GaussianKernel{.rows = Rows::normalized});
  const reference::Problem p = test::to_reference<T>({.q = x.q, .k = x.k, .v = x.v});
  const auto kernel = reference::gaussian_kernel(16, {}, true);
  test::expect_close(attn::attention(method, x.q, x.k, x.v), attend(kernel, p), p, kernel,
                     200 * test::kExactTolerance<T>);

  const Matrix<T> raw = attn::attention(GaussianAttention<T>{}, x.q, x.k, x.v);
  EXPECT_TRUE((raw.array() == T(0)).all()) << "exp(-3200) is 0";
  x.q.array() += T(1e5);
  const Matrix<T> far = attn::attention(method, x.q, x.k, x.v);
  ASSERT_TRUE(far.allFinite());
  for (Index c = 0; c < 6; ++c) {
    EXPECT_LE(far.col(c).maxCoeff(), x.v.col(c).maxCoeff() * (1 + T(1e-5)));
    EXPECT_GE(far.col(c).minCoeff(), x.v.col(c).minCoeff() * (1 + T(1e-5)));
  }
}

}  // namespace
