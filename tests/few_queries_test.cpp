/// Few queries on many keys, which are computed with features along the lanes: decoding with a cache, with and without
/// heads that share their keys.
#include <attn/exact.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/multi_head.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <span>
#include <utility>
#include <vector>

namespace test {
namespace {

using attn::Causal;
using attn::GaussianKernel;
using attn::kernel_matmul;
using attn::Rows;
using attn::SoftmaxKernel;

constexpr Causal kAlignments[] = {Causal::none, Causal::upper_left, Causal::lower_right};
constexpr Index kQueries[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 15, 16, 17};

reference::Kernel oracle_of(const SoftmaxKernel& kernel, Index d) {
  return reference::softmax_kernel(d, kernel.scale);
}
reference::Kernel oracle_of(const GaussianKernel& kernel, Index d) {
  return reference::gaussian_kernel(d, kernel.bandwidth, kernel.rows == Rows::normalized);
}

/// Results and log-sums agree with the oracle's; rows of all matrices have padding, and so begin anywhere.
template <class T, class Kernel>
void expect_matches(const Kernel& kernel, const Inputs<T>& in, Context& context) {
  const reference::Kernel expected_kernel = oracle_of(kernel, in.q.cols());
  const reference::Problem p = to_reference(in);
  const reference::Result expected = attend(expected_kernel, p);
  Padded<T> q(in.q, 3, kNaN<T>), k(in.k, 1, kNaN<T>), v(in.v, 5, kNaN<T>), out(in.q.rows(), in.v.cols(), 3, kNaN<T>);
  std::vector<T> lse(static_cast<std::size_t>(in.q.rows()), kNaN<T>);
  const Inputs<T> padded{.q = q.view(), .k = k.view(), .v = v.view(), .mask = in.mask, .key_bias = in.key_bias};
  kernel_matmul(kernel, padded, out.view(), std::span<T>(lse), context);
  expect_close(out.matrix(), expected, p, expected_kernel);
  EXPECT_TRUE(out.padding_untouched());
  for (Index i = 0; i < in.q.rows(); ++i) {
    const auto actual = static_cast<double>(lse[static_cast<std::size_t>(i)]);
    if (expected.lse[i] == -kInf<double>) {
      EXPECT_EQ(actual, -kInf<double>);
    } else {
      EXPECT_NEAR(actual, expected.lse[i], kExactTolerance<T> * (1 + std::abs(expected.lse[i])));
    }
  }
  kernel_matmul(kernel, in, out.view(), context);  // raw rows of a Gaussian then need no maximum
  expect_close(out.matrix(), expected, p, expected_kernel);
}

template <class T>
void expect_all_kernels_match(const Inputs<T>& in) {
  SCOPED_TRACE(describe(in));
  Context context;
  expect_matches(SoftmaxKernel{}, in, context);
  expect_matches(GaussianKernel{.rows = Rows::raw}, in, context);
  expect_matches(GaussianKernel{.rows = Rows::normalized}, in, context);
}

template <class T>
class FewQueries : public ::testing::Test {};
TYPED_TEST_SUITE(FewQueries, Scalars);

TYPED_TEST(FewQueries, AgreeWithTheOracleAtEveryTail) {
  for (const Index n_q : kQueries) {
    for (const auto& [n_k, d, d_v] : {std::array<Index, 3>{1, 1, 1}, {127, 16, 37}, {130, 64, 64}, {1025, 19, 3}}) {
      const auto x = make_tokens<TypeParam>(Family::unit, {n_q, n_k, d, d_v}, 3);
      expect_all_kernels_match<TypeParam>({.q = x.q, .k = x.k, .v = x.v});
    }
  }
  for (Index d = 1; d < 36; ++d) {
    const auto x = make_tokens<TypeParam>(Family::unit, {3, 70, d, 36 - d}, 4);
    expect_all_kernels_match<TypeParam>({.q = x.q, .k = x.k, .v = x.v});
  }
}

TYPED_TEST(FewQueries, ObeyMasksAndBiases) {
  for (const Index n_q : {1, 3, 4, 8, 16}) {
    for (const Index n_k : {2, 9, 128, 300, 1500}) {
      const auto x = scaled(make_tokens<TypeParam>(Family::unit, {n_q, n_k, 21, 18}, 5), 0.7);
      const auto keep_key = random_keep(n_k, 0.7, 6), keep_query = random_keep(n_q, 0.7, 7);
      const auto bias = random_key_bias<TypeParam>(n_k, 0.1, 8);
      for (const Causal causal : kAlignments) {
        for (int masks = 0; masks < 8; ++masks) {
          Inputs<TypeParam> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
          if ((masks & 1) != 0) in.mask.keep_key = keep_key;
          if ((masks & 2) != 0) in.mask.keep_query = keep_query;
          if ((masks & 4) != 0) in.key_bias = bias;
          expect_all_kernels_match<TypeParam>(in);
        }
      }
    }
  }
}

TYPED_TEST(FewQueries, SumsAreShortHoweverManyTheyAre) {
  const auto long_cache = make_tokens<TypeParam>(Family::unit, {1, 90000, 8, 4}, 9);
  expect_all_kernels_match<TypeParam>({.q = long_cache.q, .k = long_cache.k, .v = long_cache.v});
  const auto long_rows = scaled(make_tokens<TypeParam>(Family::unit, {1, 20, 5003, 3}, 9), 0.2);
  expect_all_kernels_match<TypeParam>({.q = long_rows.q, .k = long_rows.k, .v = long_rows.v});
}

TYPED_TEST(FewQueries, ARowHasTheSameBitsWhateverTheOthers) {
  using T = TypeParam;
  const Index n_q = attn::SoftmaxAttention<T>{}.most_shared_queries(37), n_k = 1100;
  const auto x = make_tokens<T>(Family::unit, {n_q, n_k, 37, 21}, 10);
  for (const Causal causal : {Causal::none, Causal::lower_right}) {
    const attn::SoftmaxAttention<T> method;
    const Mask mask{.causal = causal};
    const Matrix<T> all = forward(method, Inputs<T>{.q = x.q, .k = x.k, .v = x.v, .mask = mask});
    for (Index last = 1; last <= n_q; ++last) {  // the last rows see all keys
      const Matrix<T> some = forward(method, Inputs<T>{.q = x.q.bottomRows(last), .k = x.k, .v = x.v, .mask = mask});
      EXPECT_TRUE(bitwise_equal<T>(some, all.bottomRows(last))) << last;
    }
  }
}

TYPED_TEST(FewQueries, StatesOfPartsMerge) {
  using T = TypeParam;
  const Index n_q = 2, n_k = 700;
  const auto x = make_tokens<T>(Family::unit, {n_q, n_k, 20, 19}, 11);
  const auto bias = random_key_bias<T>(n_k, 0.1, 12);
  Context context;
  const auto check = [&](const auto& kernel) {
    std::vector<T> maximum(2), sum(2), more_maximum(2), more_sum(2), lse(2);
    Matrix<T> weighted(n_q, 19), more_weighted(n_q, 19);
    const attn::RowStates<T> total{maximum, sum, weighted}, more{more_maximum, more_sum, more_weighted};
    const Index ends[] = {0, 1, 300, 300, n_k};
    for (std::size_t part = 0; part + 1 < std::size(ends); ++part) {
      const Index first = ends[part], count = ends[part + 1] - first;
      const Inputs<T> in{
          .q = x.q,
          .k = x.k.middleRows(first, count),
          .v = x.v.middleRows(first, count),
          .key_bias = std::span(bias).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count))};
      kernel_matmul_partial(kernel, in, part == 0 ? total : more, context);
      if (part > 0) merge(total, more);
    }
    finish(kernel, total, 20, weighted, lse);
    const reference::Problem p = to_reference<T>({.q = x.q, .k = x.k, .v = x.v, .key_bias = bias});
    const reference::Result expected = attend(oracle_of(kernel, 20), p);
    expect_close(weighted, expected, p, oracle_of(kernel, 20));
    for (std::size_t i = 0; i < lse.size(); ++i) {
      EXPECT_NEAR(static_cast<double>(lse[i]), expected.lse[static_cast<Index>(i)], 10 * kExactTolerance<T>);
    }
  };
  check(SoftmaxKernel{});
  check(GaussianKernel{.rows = Rows::raw});
  check(GaussianKernel{.rows = Rows::normalized});
}

TYPED_TEST(FewQueries, ANaNReachesTheRowsThatSeeItAndNoOther) {
  using T = TypeParam;
  const Index n_q = 2, n_k = 150;
  for (const bool in_value : {false, true}) {
    for (const Index row : {Index{3}, n_k - 1}) {
      auto x = make_tokens<T>(Family::unit, {n_q, n_k, 18, 17}, 13);
      const attn::SoftmaxAttention<T> method;
      const Mask causal{.causal = Causal::lower_right};
      std::vector<std::uint8_t> keep(static_cast<std::size_t>(n_k), 1);
      keep[static_cast<std::size_t>(row)] = 0;
      const Mask without{.keep_key = keep};
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
      const Matrix<T> clean = forward(method, Inputs<T>{in.q, in.k, in.v, causal}),
                      dropped = forward(method, Inputs<T>{in.q, in.k, in.v, without});
      (in_value ? x.v : x.k).row(row).setConstant(kNaN<T>);
      EXPECT_TRUE(bitwise_equal(forward(method, Inputs<T>{in.q, in.k, in.v, without}), dropped));
      const Matrix<T> out = forward(method, Inputs<T>{in.q, in.k, in.v, causal});
      EXPECT_TRUE(out.row(1).array().isNaN().all());
      if (row == 3) {
        EXPECT_TRUE(out.row(0).array().isNaN().all());
      } else {
        EXPECT_TRUE(same_row(out, clean, 0));
      }
    }
  }
}

/// Features that are read twice must count once: 0 times infinity would be NaN.
TYPED_TEST(FewQueries, AnInfiniteFeatureThatRemovesAKeyRemovesNothingElse) {
  using T = TypeParam;
  for (const Index d : {3, 17, 31}) {
    for (Index c = 0; c < d; ++c) {
      auto x = make_tokens<T>(Family::unit, {2, 40, d, 5}, 14);
      x.q = x.q.cwiseAbs().array() + T(0.1);
      x.k(7, c) = -kInf<T>;
      std::vector<std::uint8_t> keep(40, 1);
      keep[7] = 0;
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
      const attn::SoftmaxAttention<T> method;
      const Matrix<T> expected = forward(method, Inputs<T>{in.q, in.k, in.v, {.keep_key = keep}});
      EXPECT_LT(relative_error(forward(method, in), expected.template cast<double>()), kExactTolerance<T>);
    }
  }
}

/// A Gaussian of tokens far from all others, and from zero.
TYPED_TEST(FewQueries, FarTokensKeepTheirDigits) {
  using T = TypeParam;
  for (const double far : {50.0, 1000.0}) {
    auto x = make_tokens<T>(Family::unit, {4, 500, 24, 9}, 15);
    x.q.bottomRows(2).array() += static_cast<T>(far), x.k.bottomRows(200).array() += static_cast<T>(far);
    for (const Causal causal : kAlignments) {
      expect_all_kernels_match<T>({.q = x.q.bottomRows(3), .k = x.k, .v = x.v, .mask = {.causal = causal}});
    }
  }
}

TYPED_TEST(FewQueries, AreTheSameForEveryExecutor) {
  using T = TypeParam;
  const auto x = make_tokens<T>(Family::unit, {2, 20001, 33, 17}, 16);
  const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
  const Matrix<T> expected = forward(attn::SoftmaxAttention<T>{}, in);
  for (auto& [name, context] : contexts()) {
    EXPECT_TRUE(bitwise_equal(forward(attn::SoftmaxAttention<T>{}, in, context), expected)) << name;
  }
}

template <class T>
class FewNarrowQueries : public ::testing::Test {};
TYPED_TEST_SUITE(FewNarrowQueries, NarrowScalars);

/// Widening is exact, so that only the results are rounded.
TYPED_TEST(FewNarrowQueries, GiveTheRoundedResultsOfFloat) {
  using T = TypeParam;
  for (const Index n_q : {1, 4, 5}) {
    for (const Shape& shape : {Shape{n_q, 700, 64, 64}, {n_q, 131, 37, 19}, {n_q, 40, 3, 5}}) {
      const auto x = make_tokens<float>(Family::unit, shape, 17);
      const Matrix<T> q = x.q.template cast<T>(), k = x.k.template cast<T>(), v = x.v.template cast<T>();
      const Matrix<float> wide_q = q.template cast<float>(), wide_k = k.template cast<float>(),
                          wide_v = v.template cast<float>();
      for (const Causal causal : kAlignments) {
        const Inputs<T> narrow{.q = q, .k = k, .v = v, .mask = {.causal = causal}};
        const Inputs<float> wide{.q = wide_q, .k = wide_k, .v = wide_v, .mask = {.causal = causal}};
        const auto check = [&](const auto& kernel) {
          Matrix<T> out(n_q, shape.d_v);
          Matrix<float> expected(n_q, shape.d_v);
          std::vector<float> lse(static_cast<std::size_t>(n_q)), expected_lse(lse);
          Context context;
          kernel_matmul(kernel, narrow, out, std::span<float>(lse), context);
          kernel_matmul(kernel, wide, expected, std::span<float>(expected_lse), context);
          EXPECT_TRUE(bitwise_equal<T>(out, expected.template cast<T>())) << describe(narrow);
          EXPECT_EQ(lse, expected_lse);
        };
        check(SoftmaxKernel{});
        check(GaussianKernel{});
      }
    }
  }
}

/// Arrays [heads, length, dim] of seeded tokens.
template <class T>
struct Heads {
  Index q_heads, k_heads, n_q, n_k, d, d_v;
  Matrix<T> q, k, v;

  Heads(Index of_q, Index of_k, const Shape& s)
      : q_heads(of_q), k_heads(of_k), n_q(s.n_q), n_k(s.n_k), d(s.d), d_v(s.d_v) {
    const auto x = make_tokens<double>(Family::unit, {of_q * n_q, of_k * n_k, d, d_v}, 18);
    q = x.q.template cast<T>(), k = x.k.template cast<T>(), v = x.v.template cast<T>();
  }

  Matrix<T> run(const attn::SoftmaxAttention<T>& method, const Mask& mask, Context& context) const {
    Matrix<T> out = Matrix<T>::Constant(q_heads * n_q, d_v, T(-1));
    const auto view = [](auto* data, Index heads, Index n, Index dim) {
      return attn::head_major(data, 1, heads, n, dim);
    };
    attn::multi_head(method, view(q.data(), q_heads, n_q, d), view(k.data(), k_heads, n_k, d),
                     view(v.data(), k_heads, n_k, d_v), view(out.data(), q_heads, n_q, d_v), {&mask, 1}, context);
    return out;
  }

  Matrix<T> alone(const attn::SoftmaxAttention<T>& method, Index h, const Mask& mask) const {
    const Index of_k = h / (q_heads / k_heads);
    const Matrix<T> of_q = q.middleRows(h * n_q, n_q), k_head = k.middleRows(of_k * n_k, n_k),
                    v_head = v.middleRows(of_k * n_k, n_k);
    Matrix<T> out(n_q, d_v);
    Context context;
    method.forward(Inputs<T>{.q = of_q, .k = k_head, .v = v_head, .mask = mask}, out, context);
    return out;
  }
};

template <class T>
class FewQueriesOfHeads : public ::testing::Test {};
using AllScalars = ::testing::Types<float, double, Eigen::half, Eigen::bfloat16>;
TYPED_TEST_SUITE(FewQueriesOfHeads, AllScalars);

TYPED_TEST(FewQueriesOfHeads, ThatShareKeysGetWhatEachHeadGetsAlone) {
  using T = TypeParam;
  const attn::SoftmaxAttention<T> method;
  for (const auto& [q_heads, k_heads] : {std::pair<Index, Index>{4, 2}, {17, 1}, {9, 3}}) {
    for (const Index n_q : {1, 2, 3, 5}) {
      const Heads<T> x(q_heads, k_heads, {n_q, 200, 19, 33});
      const auto keep_key = random_keep(200, 0.7, 19), keep_query = random_keep(n_q, 0.6, 20);
      for (const Causal causal : kAlignments) {
        for (auto& [name, context] : contexts()) {
          SCOPED_TRACE(name);
          const Mask mask{.causal = causal, .keep_key = keep_key, .keep_query = keep_query};
          const Matrix<T> out = x.run(method, mask, context);
          for (Index h = 0; h < q_heads; ++h) {
            EXPECT_TRUE(bitwise_equal<T>(out.middleRows(h * n_q, n_q), x.alone(method, h, mask))) << h;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace test
