#include <attn/depthwise_conv.hpp>

#include "common/rounding.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace {

using test::Context;
using test::Index;
using test::Mask;
using test::Matrix;
using test::Padded;

template <class T>
struct Problem {
  Problem(Index n, Index d_v, Index taps)
      : v(test::Random(401).normal(n, d_v).cast<T>()), before(test::Random(402).normal(n, d_v).cast<T>()) {
    test::Random random(403);
    for (Index t = 0; t < taps; ++t) filter.push_back(static_cast<T>(static_cast<float>(random.normal())));
  }

  Matrix<T> convolved(Context& context, const Mask& mask = {}) const {
    Matrix<T> out = before;
    attn::depthwise_conv(v, filter, out, context, mask);
    return out;
  }

  /// before + the convolution, tap by tap.
  reference::Matrix defined(const Mask& mask = {}) const {
    reference::Matrix out = before.template cast<double>();
    const auto taps = static_cast<Index>(filter.size());
    for (Index i = 0; i < v.rows(); ++i) {
      for (Index t = 0; t < taps; ++t) {
        const Index j = i + t - (taps - 1) / 2;
        if (j < 0 || j >= v.rows() || !reference::kept(mask.keep_key, j) || !reference::kept(mask.keep_query, i))
          continue;
        out.row(i) += static_cast<double>(filter[static_cast<std::size_t>(t)]) * v.row(j).template cast<double>();
      }
    }
    return out;
  }

  Matrix<T> v, before;
  std::vector<T> filter;
};

template <class T>
class DepthwiseConvOf : public ::testing::Test {};
TYPED_TEST_SUITE(DepthwiseConvOf, test::Scalars);

template <class T>
constexpr double kTolerance = sizeof(T) == 4 ? 2e-6 : 1e-14;

TYPED_TEST(DepthwiseConvOf, AddsItsDefinition) {
  Context context;
  for (const Index n : {1, 2, 33, 255, 256, 257, 700}) {
    for (const Index taps : {1, 3, 33, 35}) {
      const Problem<TypeParam> p(n, 5, taps);
      EXPECT_LE(test::relative_error(p.convolved(context), p.defined()), kTolerance<TypeParam>)
          << n << " rows, " << taps << " taps";
    }
  }
}

TYPED_TEST(DepthwiseConvOf, RespectsMasks) {
  using T = TypeParam;
  Context context;
  Problem<T> p(300, 7, 33);
  const auto keep_key = test::random_keep(300, 0.6, 404), keep_query = test::random_keep(300, 0.7, 405);
  for (Index j = 0; j < 300; ++j) {
    if (!reference::kept(keep_key, j)) p.v.row(j).setConstant(test::kNaN<T>);
  }
  const Mask keys{.keep_key = keep_key}, both{.keep_key = keep_key, .keep_query = keep_query};
  EXPECT_LE(test::relative_error(p.convolved(context, keys), p.defined(keys)), kTolerance<T>);
  const Matrix<T> out = p.convolved(context, both);
  EXPECT_LE(test::relative_error(out, p.defined(both)), kTolerance<T>);
  for (Index i = 0; i < 300; ++i) {
    if (!reference::kept(keep_query, i)) {
      EXPECT_TRUE(test::same_row(out, p.before, i));
    }
  }
}

TYPED_TEST(DepthwiseConvOf, BitwiseEqualWhateverTheWorkersAndStrides) {
  using T = TypeParam;
  const Problem<T> p(1000, 12, 35);
  Context serial;
  const Matrix<T> expected = p.convolved(serial);
  for (auto& [name, context] : test::contexts())
    EXPECT_TRUE(test::bitwise_equal(p.convolved(context), expected)) << name;
  Padded<T> v(p.v, 3, test::kNaN<T>), out(p.before, 5, T(-7));
  attn::depthwise_conv(v.view(), p.filter, out.view(), serial);
  EXPECT_TRUE(test::bitwise_equal(out.matrix(), expected));
  EXPECT_TRUE(out.padding_untouched());
}

template <class T>
class NarrowDepthwiseConv : public ::testing::Test {};
TYPED_TEST_SUITE(NarrowDepthwiseConv, test::NarrowScalars);

TYPED_TEST(NarrowDepthwiseConv, RoundsItsSumsOnce) {
  using T = TypeParam;
  const auto keep_key = test::random_keep(700, 0.6, 404), keep_query = test::random_keep(700, 0.7, 405);
  Context context;
  for (const Index n : {1, 33, 257, 700}) {
    const auto first = [&](const std::vector<std::uint8_t>& all) {
      return std::span(all).first(static_cast<std::size_t>(n));
    };
    for (const Mask& mask : {Mask{}, Mask{.keep_key = first(keep_key), .keep_query = first(keep_query)}}) {
      const Problem<T> p(n, 21, 33);
      EXPECT_LE(test::share_beyond_one_rounding<T>(p.convolved(context, mask), p.defined(mask)),
                test::kShareOfHardCases)
          << n;
    }
  }
  const Problem<T> p(700, 21, 33);
  for (auto& [name, other] : test::contexts())
    EXPECT_TRUE(test::bitwise_equal(p.convolved(other), p.convolved(context))) << name;
}

/// dv_j = before_j + sum_i filter_(j - i + 16) dout_i is the convolution with the filter turned round, and dfilter_t is
/// sum_i dout_i.v_(i + t - 16).
TYPED_TEST(NarrowDepthwiseConv, RoundsItsGradientsOnce) {
  using T = TypeParam;
  const auto keep_key = test::random_keep(700, 0.6, 404), keep_query = test::random_keep(700, 0.7, 405);
  const Matrix<T> dout = test::Random(406).normal(700, 21).template cast<T>();
  Context context;
  for (const Mask& mask : {Mask{}, Mask{.keep_key = keep_key, .keep_query = keep_query}}) {
    const Problem<T> p(700, 21, 33);
    Problem<T> turned = p;
    turned.v = dout;
    turned.filter.assign(p.filter.rbegin(), p.filter.rend());
    reference::Matrix dfilter_exact = reference::Matrix::Zero(1, 33);
    for (Index t = 0; t < 33; ++t) {
      for (Index i = std::max<Index>(0, 16 - t); i < std::min<Index>(700, 716 - t); ++i) {
        if (!reference::kept(mask.keep_query, i) || !reference::kept(mask.keep_key, i + t - 16)) continue;
        dfilter_exact(0, t) += dout.row(i).template cast<double>().dot(p.v.row(i + t - 16).template cast<double>());
      }
    }
    Matrix<T> dv = p.before, dfilter(1, 33);
    attn::depthwise_conv_backward(p.v, p.filter, dout, dv, {dfilter.data(), 33}, context, mask);
    const Mask swapped{.keep_key = mask.keep_query, .keep_query = mask.keep_key};
    EXPECT_LE(test::share_beyond_one_rounding<T>(dv, turned.defined(swapped)), test::kShareOfHardCases);
    EXPECT_LE(test::share_beyond_one_rounding<T>(dfilter, dfilter_exact), 2.0 / 33);
  }
}

/// Views with strides, temporaries and vectors, as for float.
TYPED_TEST(NarrowDepthwiseConv, TakesViews) {
  using T = TypeParam;
  const Problem<T> p(300, 12, 9);
  Context context;
  Padded<T> v(p.v, 3, T(7)), out(p.before, 5, T(-7)), dv(p.before, 2, T(-7));
  attn::depthwise_conv(v.view(), p.filter, out.view(), context);
  EXPECT_TRUE(test::bitwise_equal(out.matrix(), p.convolved(context)));
  std::vector<T> dfilter(9), expected_dfilter(9);
  Matrix<T> expected_dv = p.before;
  attn::depthwise_conv_backward(v.view(), p.filter, v.view(), dv.view(), dfilter, context);
  attn::depthwise_conv_backward<T>(p.v, p.filter, p.v, expected_dv, expected_dfilter, context);
  EXPECT_TRUE(test::bitwise_equal(dv.matrix(), expected_dv));
  EXPECT_EQ(dfilter, expected_dfilter);
  EXPECT_TRUE(out.padding_untouched() && dv.padding_untouched());
}

TEST(DepthwiseConv, RefusesWhatDoesNotFit) {
  const auto error = [](Index rows, Index out_rows, Index out_cols, std::size_t taps, const Mask& mask = {}) {
    const Matrix<float> v = Matrix<float>::Zero(rows, 4);
    Matrix<float> out = Matrix<float>::Zero(out_rows, out_cols);
    Context context;
    return test::error_of([&] { attn::depthwise_conv<float>(v, std::vector<float>(taps), out, context, mask); });
  };
  const std::vector<std::uint8_t> five(5, 1);
  EXPECT_EQ(error(6, 6, 4, 3), "no error");
  EXPECT_EQ(error(0, 0, 4, 3), "depthwise_conv: v is empty (0 x 4)");
  EXPECT_EQ(error(6, 5, 4, 3), "depthwise_conv: out is 5 x 4, should be 6 x 4");
  EXPECT_EQ(error(6, 6, 3, 3), "depthwise_conv: out is 6 x 3, should be 6 x 4");
  EXPECT_EQ(error(6, 6, 4, 4), "depthwise_conv: filter has 4 taps, should be odd");
  EXPECT_EQ(error(6, 6, 4, 0), "depthwise_conv: filter has 0 taps, should be odd");
  EXPECT_EQ(error(6, 6, 4, 3, {.keep_key = five}), "depthwise_conv: keep_key has 5 entries, v has 6 rows");
  EXPECT_EQ(error(6, 6, 4, 3, {.keep_query = five}), "depthwise_conv: keep_query has 5 entries, v has 6 rows");
}

/// The convolution is linear in v and in the filter, so its gradients are its adjoints: dv.x = dout.(filter * x) for
/// every x, and dfilter_t = dout.(e_t * v).
TYPED_TEST(DepthwiseConvOf, GradientsAreItsAdjoints) {
  using T = TypeParam;
  const auto keep = test::random_keep(300, 0.8, 404), keep_query = test::random_keep(300, 0.7, 405);
  for (const Index n : {1, 5, 300}) {
    const auto first = [&](const std::vector<std::uint8_t>& all) {
      return std::span(all).first(static_cast<std::size_t>(n));
    };
    for (const Mask& mask : {Mask{}, Mask{.keep_key = first(keep), .keep_query = first(keep_query)}}) {
      const Problem<T> p(n, 7, 9), other(n, 7, 9);
      const Matrix<T> dout = test::Random(406).normal(n, 7).template cast<T>();
      Matrix<T> expected_dv;
      for (auto& [name, context] : test::contexts()) {
        Matrix<T> dv = other.before;
        std::vector<T> dfilter(9, test::kNaN<T>);
        attn::depthwise_conv_backward(p.v, p.filter, dout, dv, dfilter, context, mask);
        Problem<T> probe(n, 7, 9);
        probe.before.setZero();
        probe.v = test::Random(407).normal(n, 7).template cast<T>();
        const double added =
            ((dv - other.before).template cast<double>().array() * probe.v.template cast<double>().array()).sum();
        EXPECT_NEAR(added, (probe.defined(mask).array() * dout.template cast<double>().array()).sum(),
                    100 * kTolerance<T> * dout.norm());
        probe.v = p.v;
        for (std::size_t t = 0; t < 9; ++t) {
          probe.filter.assign(9, T(0));
          probe.filter[t] = 1;
          EXPECT_NEAR(static_cast<double>(dfilter[t]),
                      (probe.defined(mask).array() * dout.template cast<double>().array()).sum(),
                      100 * kTolerance<T> * dout.norm())
              << t;
        }
        if (expected_dv.size() == 0) expected_dv = dv;
        EXPECT_TRUE(test::bitwise_equal(dv, expected_dv)) << name;
      }
    }
  }
}

TYPED_TEST(DepthwiseConvOf, GradientsOfStridedViewsAreThoseOfDenseOnes) {
  using T = TypeParam;
  const Problem<T> p(300, 7, 9);
  const Matrix<T> dout = test::Random(408).normal(300, 7).template cast<T>();
  Matrix<T> dv = p.before;
  std::vector<T> dfilter(9), of_views(9);
  Context context;
  attn::depthwise_conv_backward(p.v, p.filter, dout, dv, dfilter, context);
  Padded<T> v(p.v, 3, test::kNaN<T>), seed(dout, 1, test::kNaN<T>), to(p.before, 2, T(-7));
  attn::depthwise_conv_backward<T>(v.view(), p.filter, seed.view(), to.view(), of_views, context);
  EXPECT_TRUE(test::bitwise_equal(to.matrix(), dv));
  EXPECT_EQ(of_views, dfilter);
  EXPECT_TRUE(to.padding_untouched());
}

TEST(DepthwiseConv, BackwardRefusesWhatDoesNotFit) {
  const Matrix<float> v = Matrix<float>::Zero(6, 4), dout = Matrix<float>::Zero(5, 4);
  Matrix<float> dv = Matrix<float>::Zero(6, 4);
  std::vector<float> filter(3), dfilter(2);
  Context context;
  const auto error = [&](const Matrix<float>& gradient) {
    return test::error_of([&] { attn::depthwise_conv_backward<float>(v, filter, gradient, dv, dfilter, context); });
  };
  EXPECT_EQ(error(dout), "depthwise_conv_backward: dout is 5 x 4, should be 6 x 4");
  EXPECT_EQ(error(v), "depthwise_conv_backward: dfilter has 2 entries, filter has 3");
}

}  // namespace
