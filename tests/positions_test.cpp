/// What depends on where tokens are in the sequence: parts of it under a causal mask, and weights that fall with
/// distance (ALiBi).
#include <attn/exact.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/skyformer.hpp>

#include "common/exact_matches.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <string>
#include <type_traits>
#include <vector>

namespace test {
namespace {

using attn::Causal;
using attn::GaussianKernel;
using attn::Rows;
using attn::SoftmaxKernel;

template <class T>
Tokens<T> tokens(Index n_q, Index n_k, std::uint64_t seed) {
  const auto x = make_tokens<double>(Family::init, {n_q, n_k, 9, 6}, seed);
  return {x.q.template cast<T>(), x.k.template cast<T>(), x.v.template cast<T>()};
}

template <class T>
class Positions : public ::testing::Test {};
using AllScalars = ::testing::Types<float, double, Eigen::half, Eigen::bfloat16>;
TYPED_TEST_SUITE(Positions, AllScalars);

struct Lengths {
  Index n_q, n_k;
};
constexpr Lengths kLengths[] = {{1, 300}, {3, 40}, {17, 129}, {130, 130}, {90, 300}, {300, 250}, {60, 700}};

TYPED_TEST(Positions, OfPartsOfASequence) {
  using T = TypeParam;
  for (const auto& [n_q, n_k] : kLengths) {
    const auto x = tokens<T>(n_q, n_k, 1);
    for (const auto& [first_query, first_key] : {Lengths{n_k - 1, 0}, {10, 100}, {100, 10}, {0, 1000}, {1000, 20}}) {
      for (const Index window : {0, 50}) {
        const Mask mask{.causal = Causal::upper_left,
                        .window = window,
                        .num_sinks = 30,
                        .first_query = first_query,
                        .first_key = first_key};
        expect_all_kernels_match<T>({.q = x.q, .k = x.k, .v = x.v, .mask = mask});
      }
    }
  }
}

TYPED_TEST(Positions, WeighDistances) {
  using T = TypeParam;
  for (const auto& [n_q, n_k] : kLengths) {
    const auto x = tokens<T>(n_q, n_k, 2);
    const auto keep_key = random_keep(n_k, 0.7, 6), keep_query = random_keep(n_q, 0.7, 7);
    const auto wide_bias = random_key_bias<double>(n_k, 0.1, 8);
    std::vector<T> bias;
    for (const double b : wide_bias) bias.push_back(static_cast<T>(b));
    for (const double slope : {0.003, 0.3}) {
      for (int variant = 0; variant < 4; ++variant) {
        const Causal causal = variant % 2 == 0 ? Causal::lower_right : Causal::upper_left;
        Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}, .alibi_slope = slope};
        if (variant == 1) in.mask.window = 70, in.mask.num_sinks = 3;
        if (variant == 2) in.key_bias = bias;
        if (variant == 3) in.mask.keep_key = keep_key, in.mask.keep_query = keep_query;
        expect_all_kernels_match(in);
      }
    }
  }
}

template <class T>
class WidePositions : public ::testing::Test {};
TYPED_TEST_SUITE(WidePositions, Scalars);

/// What absolute biases m j in float would lose 12 digits of.
TYPED_TEST(WidePositions, WeighDistancesExactlyHoweverLongTheSequence) {
  using T = TypeParam;
  constexpr Index kKeys = 65536;
  const auto x = scaled(make_tokens<T>(Family::unit, {700, kKeys, 9, 6}, 4), 0.7);
  for (const double slope : {0.7071, 0.3, 0.0041}) {
    for (const Index n_q : {1, 5, 40, 700}) {
      for (const bool few_left : {false, true}) {
        auto keep = random_keep(kKeys, few_left ? 0.01 : 0.9, 5);
        keep.back() = 1;
        const Inputs<T> in{.q = x.q.topRows(n_q),
                           .k = x.k,
                           .v = x.v,
                           .mask = {.causal = Causal::lower_right, .keep_key = keep},
                           .alibi_slope = slope};
        const Index rows = std::min<Index>(n_q, 5);  // the oracle takes long
        const Inputs<T> last{.q = in.q.bottomRows(rows), .k = x.k, .v = x.v, .mask = in.mask, .alibi_slope = slope};
        const reference::Problem p = to_reference(last);
        const auto oracle = reference::softmax_kernel(9);
        const Matrix<T> out = forward(attn::SoftmaxAttention<T>{}, in);
        SCOPED_TRACE(text(in));
        expect_close(Matrix<T>(out.bottomRows(rows)), attend(oracle, p), p, oracle);
      }
    }
  }
}

/// Keys in shards: each knows where it begins.
TYPED_TEST(WidePositions, OfShardsMerge) {
  using T = TypeParam;
  for (const Index n_q : {3, 200}) {
    const Index n_k = 500, first_query = n_k - n_q;
    const auto x = tokens<T>(n_q, n_k, 9);
    Mask mask{.causal = Causal::upper_left, .window = 120, .num_sinks = 5, .first_query = first_query};
    const Inputs<T> whole{.q = x.q, .k = x.k, .v = x.v, .mask = mask, .alibi_slope = 0.01};
    const auto rows = static_cast<std::size_t>(n_q);
    std::vector<T> maximum(rows), sum(rows), more_maximum(rows), more_sum(rows), lse(rows);
    Matrix<T> weighted(n_q, 6), more_weighted(n_q, 6);
    const attn::RowStates<T> total{maximum, sum, weighted}, more{more_maximum, more_sum, more_weighted};
    Context context;
    const Index ends[] = {0, 2, 2, 130, 390, n_k};  // one of them is empty
    for (std::size_t part = 0; part + 1 < std::size(ends); ++part) {
      const Index first = ends[part], count = ends[part + 1] - first;
      mask.first_key = first;
      const Inputs<T> in{.q = x.q,
                         .k = x.k.middleRows(first, count),
                         .v = x.v.middleRows(first, count),
                         .mask = mask,
                         .alibi_slope = 0.01};
      kernel_matmul_partial(SoftmaxKernel{}, in, part == 0 ? total : more, context);
      if (part > 0) merge(total, more);
    }
    finish(SoftmaxKernel{}, total, 9, weighted, lse);
    const auto oracle = reference::softmax_kernel(9);
    const reference::Problem p = to_reference(whole);
    const reference::Result expected = attend(oracle, p);
    expect_close(weighted, expected, p, oracle);
    for (std::size_t i = 0; i < rows; ++i) {
      EXPECT_NEAR(static_cast<double>(lse[i]), expected.lse[static_cast<Index>(i)], 20 * kExactTolerance<T>);
    }
  }
}

TYPED_TEST(WidePositions, OfFewQueriesGiveARowTheSameBitsWhateverTheOthers) {
  using T = TypeParam;
  const attn::SoftmaxAttention<T> method;
  const Index n_q = method.most_shared_queries(9);
  const auto x = tokens<T>(n_q, 1100, 8);
  const Mask mask{.causal = Causal::lower_right};
  const Matrix<T> all = forward(method, Inputs<T>{.q = x.q, .k = x.k, .v = x.v, .mask = mask, .alibi_slope = 0.1});
  for (Index last = 1; last <= n_q; ++last) {
    const Matrix<T> some =
        forward(method, Inputs<T>{.q = x.q.bottomRows(last), .k = x.k, .v = x.v, .mask = mask, .alibi_slope = 0.1});
    EXPECT_TRUE(bitwise_equal<T>(some, all.bottomRows(last))) << last;
  }
}

TEST(Position, IsRefusedWhereItMeansNothing) {
  const auto x = tokens<float>(5, 5, 10);
  const auto error = [&](const auto& method, const Mask& mask, double slope) {
    return error_of(
        [&] { forward(method, Inputs<float>{.q = x.q, .k = x.k, .v = x.v, .mask = mask, .alibi_slope = slope}); });
  };
  const attn::SoftmaxAttention<float> softmax;
  EXPECT_EQ(error(softmax, {}, 0.5), "softmax: an alibi_slope needs a causal mask");
  EXPECT_EQ(error(softmax, {.causal = Causal::upper_left}, -0.5),
            "softmax: alibi_slope is -0.5, should be finite and at least 0");
  EXPECT_EQ(error(softmax, {.causal = Causal::lower_right, .first_key = 3}, 0),
            "softmax: first_query and first_key need the causal mask upper_left");
  EXPECT_EQ(error(softmax, {.causal = Causal::upper_left, .first_query = -3}, 0),
            "softmax: first_query is -3, should be at least 0");
  constexpr Index kMost = std::numeric_limits<Index>::max();
  EXPECT_EQ(error(softmax, {.causal = Causal::upper_left, .first_query = kMost}, 0),
            "softmax: first_query is " + std::to_string(kMost) + ", first_key 0, should be at most " +
                std::to_string(kMost / 4));
  EXPECT_EQ(error(softmax, {.causal = Causal::upper_left}, 1e30),
            "softmax: alibi_slope is 1e+30, should be at most 1.84467e+19");
  EXPECT_EQ(error(attn::Skyformer<float>{}, {.causal = Causal::upper_left}, 0.5),
            "skyformer: causal masks are not supported");
  EXPECT_EQ(attn::detail::MaskSupport{.causal = true}.lacks(Inputs<float>{
                .q = x.q, .k = x.k, .v = x.v, .mask = {.causal = Causal::upper_left}, .alibi_slope = 0.5}),
            std::string("ALiBi slopes"));
}

TEST(Position, IsTheSameInABackwardPass) {
  const auto x = tokens<float>(5, 5, 11);
  const attn::SoftmaxAttention<float> softmax;
  attn::SoftmaxAttention<float>::Saved saved;
  Matrix<float> out(5, 6), dq(5, 9), dk(5, 9), dv(5, 6);
  Context context;
  Inputs<float> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = Causal::upper_left}, .alibi_slope = 0.5};
  softmax.forward(in, out, context, saved);
  const auto backward_error = [&] {
    return error_of([&] { softmax.backward(in, out, out, saved, {dq, dk, dv}, context); });
  };
  in.alibi_slope = 0.25;
  EXPECT_EQ(backward_error(), "softmax: saved is of a forward pass with another alibi_slope");
  in.alibi_slope = 0.5;
  in.mask.first_query = 2;
  EXPECT_EQ(backward_error(), "softmax: saved is of a forward pass with another mask");

  in.mask = {.causal = Causal::upper_left, .window = 1, .num_sinks = 1, .first_query = 1, .first_key = 1};
  softmax.forward(in, out, context, saved);
  in.mask.first_query = in.mask.first_key = 0;  // of which the first row is one that stays in sight
  EXPECT_EQ(backward_error(), "softmax: saved is of a forward pass with another mask");
}

TEST(Position, OfAWindowMayBeAsLongAsAnIndexIs) {
  auto x = tokens<float>(40, 40, 12);
  x.v(30, 0) = kNaN<float>;
  constexpr Index kMost = std::numeric_limits<Index>::max();
  for (const Index window : {kMost, kMost - 1, Index{40}}) {
    const Matrix<float> out =
        forward(attn::SoftmaxAttention<float>{},
                Inputs<float>{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = Causal::upper_left, .window = window}});
    for (Index i = 0; i < 40; ++i) EXPECT_EQ(std::isnan(out(i, 0)), i >= 30) << window << ", " << i;
  }
}

}  // namespace
}  // namespace test
