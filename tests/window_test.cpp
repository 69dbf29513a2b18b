/// Sliding windows and the first keys that stay in sight, in every path of the exact methods.
#include <attn/exact.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/multi_head.hpp>
#include <attn/nystrom.hpp>

#include "common/exact_matches.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace test {
namespace {

using attn::Causal;
using attn::GaussianKernel;
using attn::Rows;
using attn::SoftmaxKernel;

constexpr Causal kAlignments[] = {Causal::upper_left, Causal::lower_right};

template <class T>
class Window : public ::testing::Test {};
using AllScalars = ::testing::Types<float, double, Eigen::half, Eigen::bfloat16>;
TYPED_TEST_SUITE(Window, AllScalars);

struct Case {
  Index n_q, n_k, window, num_sinks;
};
constexpr Case kCases[] = {{1, 1, 1, 0},       {2, 300, 7, 3},      {17, 300, 20, 0},    {60, 60, 1, 0},
                           {130, 130, 13, 2},  {40, 300, 129, 1},   {300, 200, 31, 140}, {200, 500, 100, 4},
                           {450, 450, 128, 0}, {60, 40, 1000, 9},   {5, 1500, 600, 70},  {33, 700, 2, 700},
                           {400, 900, 300, 4}, {1, 1200, 300, 300}, {97, 96, 64, 1}};

template <class T>
Tokens<T> tokens(const Case& c, std::uint64_t seed) {
  const auto x = make_tokens<double>(Family::init, {c.n_q, c.n_k, 9, 6}, seed);
  return {x.q.template cast<T>(), x.k.template cast<T>(), x.v.template cast<T>()};
}

TYPED_TEST(Window, AgreesWithTheOracle) {
  for (const Case& c : kCases) {
    const auto x = tokens<TypeParam>(c, 1);
    for (const Causal causal : kAlignments) {
      const Mask mask{.causal = causal, .window = c.window, .num_sinks = c.num_sinks};
      expect_all_kernels_match<TypeParam>({.q = x.q, .k = x.k, .v = x.v, .mask = mask});
    }
  }
}

TYPED_TEST(Window, GoesWithMasksAndBiases) {
  using T = TypeParam;
  for (const Case& c : kCases) {
    const auto x = tokens<T>(c, 2);
    auto keep_key = random_keep(c.n_k, 0.7, 6);
    const auto keep_query = random_keep(c.n_q, 0.7, 7);
    for (Index j = 0; j < c.n_k / 20; ++j) keep_key[static_cast<std::size_t>(j)] = 0;  // padding in front
    const auto wide_bias = random_key_bias<double>(c.n_k, 0.1, 8);
    std::vector<T> bias;
    for (const double b : wide_bias) bias.push_back(static_cast<T>(b));
    for (const int masks : {1, 2, 4, 7}) {
      Mask mask{.causal = kAlignments[masks % 2], .window = c.window, .num_sinks = c.num_sinks};
      if ((masks & 1) != 0) mask.keep_key = keep_key;
      if ((masks & 2) != 0) mask.keep_query = keep_query;
      Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask};
      if ((masks & 4) != 0) in.key_bias = bias;
      expect_all_kernels_match(in);
    }
  }
}

template <class T>
class WideWindow : public ::testing::Test {};
TYPED_TEST_SUITE(WideWindow, Scalars);

TYPED_TEST(WideWindow, GivesLogSums) {
  using T = TypeParam;
  for (const Case& c : kCases) {
    const auto x = tokens<T>(c, 4);
    const Inputs<T> in{.q = x.q,
                       .k = x.k,
                       .v = x.v,
                       .mask = {.causal = Causal::lower_right, .window = c.window, .num_sinks = c.num_sinks}};
    SCOPED_TRACE(text(in));
    std::vector<T> lse(static_cast<std::size_t>(c.n_q));
    Matrix<T> out(c.n_q, 6);
    Context context;
    kernel_matmul(SoftmaxKernel{}, in, out, std::span<T>(lse), context);
    const auto expected = attend(reference::softmax_kernel(9), to_reference(in));
    for (Index i = 0; i < c.n_q; ++i) {
      if (expected.lse[i] == -kInf<double>) {
        EXPECT_EQ(lse[static_cast<std::size_t>(i)], -kInf<T>);
      } else {
        EXPECT_NEAR(static_cast<double>(lse[static_cast<std::size_t>(i)]), expected.lse[i], 10 * kExactTolerance<T>);
      }
    }
  }
}

/// A row with a hidden key that holds NaN has the bits that it has with any other.
TYPED_TEST(WideWindow, HidesWhateverKeysHold) {
  using T = TypeParam;
  for (const auto& [queries, keys] : {std::pair<Index, Index>{300, 300}, {4, 300}, {60, 400}}) {
    const Index n_q = queries, n_k = keys;
    auto x = tokens<T>({n_q, n_k, 0, 0}, 5);
    const Mask mask{.causal = Causal::lower_right, .window = 40, .num_sinks = 2};
    const Matrix<T> dout = Random(6).normal(n_q, 6).template cast<T>();
    const attn::SoftmaxAttention<T> method;
    const auto run = [&](Matrix<T>& dq) {
      Matrix<T> out(n_q, 6), dk(n_k, 9), dv(n_k, 6);
      typename attn::SoftmaxAttention<T>::Saved saved;
      Context context;
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask};
      method.forward(in, out, context, saved);
      method.backward(in, out, dout, saved, {dq, dk, dv}, context);
      return forward(method, in);
    };
    Matrix<T> dq(n_q, 9), other_dq(n_q, 9);
    const Matrix<T> expected = run(dq);
    const Index key = n_k - n_q + n_q / 2 - 20;
    for (const bool in_value : {false, true}) {
      auto clean = x;
      (in_value ? x.v : x.k).row(key).setConstant(kNaN<T>);
      const Matrix<T> out = run(other_dq);
      for (Index i = 0; i < n_q; ++i) {
        const Index last = i + n_k - n_q;
        const bool sees = key <= last && key > last - 40;
        EXPECT_EQ(same_row(out, expected, i), !sees) << i;
        EXPECT_EQ((other_dq.row(i) - dq.row(i)).norm() <= kTolerance<T> * dq.norm(), !sees)
            << i;  // NaN where it sees it
        EXPECT_EQ(out.row(i).array().isNaN().all(), sees) << i;
      }
      x = clean;
    }
  }
}

/// A key that a window has left behind takes no digits from those in it, however large its bias.
TYPED_TEST(WideWindow, CountsBiasesFromTheLargestInSight) {
  using T = TypeParam;
  for (const Index n_q : {3, 400}) {
    auto x = tokens<T>({n_q, 400, 0, 0}, 7);
    std::vector<T> bias(400, T(0.25));
    bias[1] = bias[350] = T(1e30);
    for (const Index num_sinks : {0, 1}) {
      const Inputs<T> in{.q = x.q,
                         .k = x.k,
                         .v = x.v,
                         .mask = {.causal = Causal::lower_right, .window = 20, .num_sinks = num_sinks},
                         .key_bias = bias};
      const auto oracle = reference::softmax_kernel(9);
      const reference::Problem p = to_reference(in);
      expect_close(forward(attn::SoftmaxAttention<T>{}, in), attend(oracle, p), p, oracle);
    }
  }
}

TYPED_TEST(WideWindow, OfFewQueriesGivesARowTheSameBitsWhateverTheOthers) {
  using T = TypeParam;
  const attn::SoftmaxAttention<T> method;
  const Index n_q = method.most_shared_queries(9);
  const auto x = tokens<T>({n_q, 1100, 0, 0}, 8);
  for (const Index window : {3, 70, 900}) {
    const Mask mask{.causal = Causal::lower_right, .window = window, .num_sinks = 5};
    const Matrix<T> all = forward(method, Inputs<T>{.q = x.q, .k = x.k, .v = x.v, .mask = mask});
    for (Index last = 1; last <= n_q; ++last) {
      const Matrix<T> some = forward(method, Inputs<T>{.q = x.q.bottomRows(last), .k = x.k, .v = x.v, .mask = mask});
      EXPECT_TRUE(bitwise_equal<T>(some, all.bottomRows(last))) << last;
    }
  }
}

TYPED_TEST(WideWindow, OfEveryExecutorAndHeadIsThatOfForward) {
  using T = TypeParam;
  const attn::SoftmaxAttention<T> method;
  for (const Index n_q : {2, 600}) {
    const auto x = tokens<T>({4 * n_q, 2 * 700, 0, 0}, 9);
    const Mask mask{.causal = Causal::lower_right, .window = 90, .num_sinks = 4};
    Matrix<T> expected(4 * n_q, 6);
    for (Index h = 0; h < 4; ++h) {
      const Inputs<T> in{.q = x.q.middleRows(h * n_q, n_q),
                         .k = x.k.middleRows(h / 2 * 700, 700),
                         .v = x.v.middleRows(h / 2 * 700, 700),
                         .mask = mask};
      expected.middleRows(h * n_q, n_q) = forward(method, in);
    }
    for (auto& [name, context] : contexts()) {
      Matrix<T> out(4 * n_q, 6);
      attn::multi_head(method, attn::head_major(x.q.data(), 1, 4, n_q, 9), attn::head_major(x.k.data(), 1, 2, 700, 9),
                       attn::head_major(x.v.data(), 1, 2, 700, 6), attn::head_major(out.data(), 1, 4, n_q, 6),
                       {&mask, 1}, context);
      EXPECT_TRUE(bitwise_equal(out, expected)) << name;
    }
  }
}

TEST(Windows, AreRefusedWhereTheyMeanNothing) {
  const auto x = tokens<float>({5, 5, 0, 0}, 10);
  const auto error = [&](const auto& method, const Mask& mask) {
    return error_of([&] { attn::attention(method, x.q, x.k, x.v, mask); });
  };
  const attn::SoftmaxAttention<float> softmax;
  EXPECT_EQ(error(softmax, {.window = 3}), "softmax: a window needs a causal mask");
  EXPECT_EQ(error(softmax, {.causal = Causal::upper_left, .window = -1}),
            "softmax: window is -1, should be at least 0");
  EXPECT_EQ(error(softmax, {.causal = Causal::upper_left, .window = 1, .num_sinks = -1}),
            "softmax: num_sinks is -1, should be at least 0");
  EXPECT_EQ(error(attn::Nystrom<float>{}, {.causal = Causal::upper_left, .window = 3}),
            "nystrom: causal masks are not supported");
}

TEST(Windows, BackwardRefusesAnother) {
  const auto x = tokens<float>({5, 5, 0, 0}, 11);
  const attn::SoftmaxAttention<float> softmax;
  attn::SoftmaxAttention<float>::Saved saved;
  Matrix<float> out(5, 6), dq(5, 9), dk(5, 9), dv(5, 6);
  Context context;
  Inputs<float> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = Causal::upper_left, .window = 3}};
  softmax.forward(in, out, context, saved);
  in.mask.window = 4;
  EXPECT_EQ(error_of([&] {
              softmax.backward(in, out, out, saved, {dq, dk, dv}, context);
            }),
            "softmax: saved is of a forward pass with another mask");
}

}  // namespace
}  // namespace test
