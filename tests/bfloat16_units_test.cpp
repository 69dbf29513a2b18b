/// Exact attention of bfloat16 tokens, whose products may be computed by units for them: everything here holds with
/// such units and without.
#include <attn/attn.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace {

using attn::Causal;
using attn::Products;
using test::Context;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;
using Bfloat16 = Eigen::bfloat16;
using Softmax = attn::SoftmaxAttention<Bfloat16>;
using Gaussian = attn::GaussianAttention<Bfloat16>;

constexpr double kRounding = 0x1p-8;  // of a number to bfloat16, relative
const Bfloat16 kNaN = Bfloat16(test::kNaN<float>), kInfinity = Bfloat16(test::kInf<float>);

test::Tokens<Bfloat16> tokens(const test::Shape& shape, std::uint64_t seed, double size = 1) {
  const auto x = test::scaled(test::make_tokens<float>(test::Family::smooth, shape, seed), size);
  return {x.q.cast<Bfloat16>(), x.k.cast<Bfloat16>(), x.v.cast<Bfloat16>()};
}

/// Every entry is as near to the exact one as it is where each weight is rounded once and then the result:
///   |out - exact| <= u |exact| + u sum_j p_j |v_j - exact|        with raw rows |v_j|; u a little above one rounding
void expect_rounded(const Matrix<Bfloat16>& out, const reference::Kernel& kernel, const Inputs<Bfloat16>& in) {
  reference::Problem problem = test::to_reference(in);
  const reference::Matrix exact = reference::attend(kernel, problem).out, v = problem.v;
  problem.v = reference::Matrix::Identity(v.rows(), v.rows());
  const reference::Matrix weights = reference::attend(kernel, problem).out;
  const double unit = 1.05 * kRounding;
  for (Index i = 0; i < out.rows(); ++i) {
    for (Index c = 0; c < out.cols(); ++c) {
      const double origin = kernel.normalized ? exact(i, c) : 0;
      const double spread = weights.row(i).dot((v.col(c).array() - origin).abs().matrix());
      ASSERT_LE(std::abs(static_cast<double>(static_cast<float>(out(i, c))) - exact(i, c)),
                unit * (std::abs(exact(i, c)) + spread) + 1e-30)
          << i << ", " << c << ": " << test::describe(in);
    }
  }
}

/// Results are the same bits in every row below end.
void expect_same_rows(const Matrix<Bfloat16>& a, const Matrix<Bfloat16>& b, Index end, const std::string& what) {
  for (Index i = 0; i < end; ++i) ASSERT_TRUE(test::same_row(a, b, i)) << "row " << i << ": " << what;
}

/// Masks for so many queries and keys, and a key bias with each.
struct Masks {
  Masks(Index n_q, Index n_k)
      : keep_query(test::random_keep(n_q, 0.8, 1)), keep_key(test::random_keep(n_k, 0.8, 2)), bias(keep_key.size()) {
    const auto wide = test::random_key_bias<float>(n_k, 0.1, 3);
    std::transform(wide.begin(), wide.end(), bias.begin(), [](float x) { return Bfloat16(x); });
  }

  std::vector<Inputs<Bfloat16>> inputs(const test::Tokens<Bfloat16>& x) const {
    std::vector<Inputs<Bfloat16>> all;
    for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
      all.push_back({.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}});
      all.push_back(
          {.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal, .keep_key = keep_key, .keep_query = keep_query}});
      all.push_back({.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}, .key_bias = bias});
      if (causal == Causal::none) continue;
      all.push_back({.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}, .key_bias = bias, .alibi_slope = 0.125});
      for (const Index window : {1, 20, 67}) {
        const Mask mask{.causal = causal, .window = window, .num_sinks = window % 4};
        all.push_back({.q = x.q, .k = x.k, .v = x.v, .mask = mask, .key_bias = bias});
      }
    }
    return all;
  }

  std::vector<std::uint8_t> keep_query, keep_key;
  std::vector<Bfloat16> bias;
};

TEST(Bfloat16Units, RoundWeightsAndResultsOnly) {
  constexpr std::array<test::Shape, 8> kShapes{{{40, 1, 8, 3},
                                                {47, 7, 1, 1},
                                                {48, 16, 33, 17},
                                                {49, 127, 64, 64},
                                                {33, 129, 31, 65},
                                                {100, 130, 65, 40},
                                                {97, 260, 2, 9},
                                                {31, 1100, 5, 7}}};
  Context context;
  for (const test::Shape& shape : kShapes) {
    const auto x = tokens(shape, 4);
    const Masks masks(shape.n_q, shape.n_k);
    for (const auto& in : masks.inputs(x)) {
      expect_rounded(test::forward(Softmax{}, in, context), reference::softmax_kernel(shape.d), in);
      for (const auto rows : {attn::Rows::raw, attn::Rows::normalized}) {
        const Gaussian gaussian(attn::GaussianKernel{.rows = rows});
        expect_rounded(test::forward(gaussian, in, context),
                       reference::gaussian_kernel(shape.d, {}, rows == attn::Rows::normalized), in);
      }
    }
  }
}

TEST(Bfloat16Units, TakeAnyNumberOfQueries) {
  Context context;
  for (Index n_q = 1; n_q <= 67; n_q += n_q < 18 ? 1 : 7) {
    const auto x = tokens({n_q, 61, 19, 21}, static_cast<std::uint64_t>(n_q));
    for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
      const Inputs<Bfloat16> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
      expect_rounded(test::forward(Softmax{}, in, context), reference::softmax_kernel(19), in);
    }
  }
}

TEST(Bfloat16Units, TakeManyFeaturesLargeScoresAndAnyScale) {
  Context context;
  const auto wide = tokens({50, 70, 1100, 530}, 5), large = tokens({50, 70, 24, 10}, 6, 4);
  for (const auto* x : {&wide, &large}) {
    const Inputs<Bfloat16> in{.q = x->q, .k = x->k, .v = x->v};
    for (const double scale : {-0.125, 0.0, 0.3}) {
      expect_rounded(test::forward(Softmax{attn::SoftmaxKernel{.scale = scale}}, in, context),
                     reference::softmax_kernel(x->q.cols(), scale), in);
    }
  }
}

TEST(Bfloat16Units, RowsStayWithinTheValues) {
  const auto x = tokens({90, 200, 16, 30}, 7, 2);
  for (const Causal causal : {Causal::none, Causal::lower_right}) {
    const Matrix<float> out =
        test::forward(Softmax{}, {.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}}).cast<float>();
    const Matrix<float> v = x.v.cast<float>();
    for (Index c = 0; c < 30; ++c) {
      EXPECT_LE(out.col(c).maxCoeff(), v.col(c).maxCoeff());
      EXPECT_GE(out.col(c).minCoeff(), v.col(c).minCoeff());
    }
  }
}

TEST(Bfloat16Units, AreExactWhereWeightsAre) {
  auto x = tokens({60, 1, 16, 30}, 8);
  const Matrix<Bfloat16> of_one = test::forward(Softmax{}, {.q = x.q, .k = x.k, .v = x.v});
  for (Index i = 0; i < 60; ++i) EXPECT_TRUE(of_one.row(i) == x.v.row(0));
  x = tokens({60, 200, 16, 30}, 9);
  x.k.rowwise() = x.k.row(0).eval();  // so that all weights are 1
  for (const Causal causal : {Causal::none, Causal::upper_left}) {
    const Inputs<Bfloat16> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
    const auto exact = reference::attend(reference::softmax_kernel(16), test::to_reference(in)).out;
    const Matrix<float> out = test::forward(Softmax{}, in).cast<float>();
    for (Index i = 0; i < 60; ++i) {
      for (Index c = 0; c < 30; ++c) {
        EXPECT_LE(std::abs(static_cast<double>(out(i, c)) - exact(i, c)),
                  1.01 * kRounding * std::abs(exact(i, c)) + 1e-6);
      }
    }
  }
}

TEST(Bfloat16Units, NothingComesFromTheFuture) {
  Context context;
  for (const Causal causal : {Causal::upper_left, Causal::lower_right}) {
    for (const Index n_k : {150, 177}) {
      const auto x = tokens({150, n_k, 18, 11}, 10);
      const Index offset = causal == Causal::lower_right ? n_k - 150 : 0;
      const Mask mask{.causal = causal, .window = n_k == 150 ? 0 : 43, .num_sinks = n_k == 150 ? 0 : 3};
      const auto expected = test::forward(Softmax{}, {.q = x.q, .k = x.k, .v = x.v, .mask = mask}, context);
      for (const Index first : {1, 2, 17, 47, 48, 63, 127, 128, 129, 149}) {  // whose row and later ones change
        for (const Bfloat16 poison : {kNaN, kInfinity, Bfloat16(1e30F)}) {
          auto y = x;
          y.q.bottomRows(150 - first).setConstant(poison);
          y.k.bottomRows(n_k - first - offset).setConstant(poison);
          y.v.bottomRows(n_k - first - offset).setConstant(poison);
          expect_same_rows(test::forward(Softmax{}, {.q = y.q, .k = y.k, .v = y.v, .mask = mask}, context), expected,
                           first, "from " + std::to_string(first));
        }
      }
    }
  }
}

TEST(Bfloat16Units, NothingComesFromDroppedRows) {
  Context context;
  const Masks masks(150, 150);
  const auto x = tokens({150, 150, 18, 11}, 11);
  auto y = x;
  for (Index i = 0; i < 150; ++i) {
    const auto at = static_cast<std::size_t>(i);
    if (masks.keep_query[at] == 0) y.q.row(i).setConstant(kNaN);
    if (masks.keep_key[at] == 0) y.k.row(i).setConstant(kNaN);
    if (masks.keep_key[at] == 0) y.v.row(i).setConstant(kInfinity);
  }
  for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
    const Mask mask{.causal = causal, .keep_key = masks.keep_key, .keep_query = masks.keep_query};
    const auto expected = test::forward(Softmax{}, {.q = x.q, .k = x.k, .v = x.v, .mask = mask}, context);
    const auto out = test::forward(Softmax{}, {.q = y.q, .k = y.k, .v = y.v, .mask = mask}, context);
    expect_same_rows(out, expected, 150, "dropped");
    for (Index i = 0; i < 150; ++i) {
      if (masks.keep_query[static_cast<std::size_t>(i)] != 0) continue;
      EXPECT_TRUE((out.row(i).array() == Bfloat16(0)).all());
    }
  }
}

/// In k it reaches all columns, in v its own.
TEST(Bfloat16Units, ANaNReachesTheRowsThatSeeIt) {
  Context context;
  const auto x = tokens({150, 150, 18, 11}, 12);
  for (const Index window : {0, 30, 31}) {
    const Mask mask{.causal = Causal::upper_left, .window = window};
    const auto expected = test::forward(Softmax{}, {.q = x.q, .k = x.k, .v = x.v, .mask = mask}, context);
    for (const Index at : {0, 40, 41, 127, 128, 149}) {
      auto k = x.k, v = x.v;
      k(at, 3) = v(at, 5) = kNaN;
      const auto of_k = test::forward(Softmax{}, {.q = x.q, .k = k, .v = x.v, .mask = mask}, context),
                 of_v = test::forward(Softmax{}, {.q = x.q, .k = x.k, .v = v, .mask = mask}, context);
      for (Index i = 0; i < 150; ++i) {
        const bool sees = i >= at && (window == 0 || i - at < window);
        for (Index c = 0; c < 11; ++c) {
          const auto is_expected = [&](const Matrix<Bfloat16>& out, bool reached) {
            return reached ? (Eigen::numext::isnan)(out(i, c)) : out(i, c) == expected(i, c);
          };
          ASSERT_TRUE(is_expected(of_k, sees) && is_expected(of_v, sees && c == 5)) << i << ", " << c << " from " << at;
        }
      }
    }
  }
}

TEST(Bfloat16Units, BitwiseEqualWhateverTheWorkersAndTheMemory) {
  for (const auto& [n_q, n_k] : {std::pair<Index, Index>{700, 333}, {40, 3000}}) {
    const auto x = tokens({n_q, n_k, 17, 9}, 13);
    test::Padded<Bfloat16> q(x.q, 3, kNaN), k(x.k, 2, kNaN), v(x.v, 4, kNaN), out(n_q, 9, 5, Bfloat16(7));
    for (const Causal causal : {Causal::none, Causal::lower_right}) {
      const Mask mask{.causal = causal};
      const auto expected = test::forward(Softmax{}, {.q = x.q, .k = x.k, .v = x.v, .mask = mask});
      for (auto& [name, context] : test::contexts()) {
        Softmax{}.forward({.q = q.view(), .k = k.view(), .v = v.view(), .mask = mask}, out.view(), context);
        EXPECT_TRUE(test::bitwise_equal(out.matrix(), expected)) << name;
        EXPECT_TRUE(out.padding_untouched()) << name;
      }
    }
  }
}

TEST(Bfloat16Units, CanBeLeftAlone) {
  const auto x = tokens({90, 130, 24, 10}, 14);
  const Matrix<float> q = x.q.cast<float>(), k = x.k.cast<float>(), v = x.v.cast<float>();
  for (const std::string name : {"softmax", "gaussian"}) {
    const auto wide = attn::attention(attn::make_approximator<float>(name), q, k, v);
    const auto float32 = attn::make_approximator<Bfloat16>(name, {.products = Products::float32});
    EXPECT_TRUE(attn::attention(float32, x.q, x.k, x.v) == wide.cast<Bfloat16>()) << name;
    const auto fastest = attn::attention(attn::make_approximator<Bfloat16>(name), x.q, x.k, x.v);
    EXPECT_EQ(fastest != wide.cast<Bfloat16>(), attn::detail::kHasBfloat16Units) << name;
  }
}

/// There float products, which have a center, keep the digits.
TEST(Bfloat16Units, AreLeftAloneByAGaussianOfTokensFarFromZero) {
  auto x = tokens({90, 130, 24, 10}, 15);
  x.q = (x.q.cast<float>().array() + 64.0F).cast<Bfloat16>();
  x.k = (x.k.cast<float>().array() + 64.0F).cast<Bfloat16>();
  for (const auto rows : {attn::Rows::raw, attn::Rows::normalized}) {
    const attn::GaussianKernel kernel{.rows = rows};
    const Inputs<Bfloat16> in{.q = x.q, .k = x.k, .v = x.v};
    const auto out = test::forward(Gaussian{kernel}, in);
    EXPECT_TRUE(test::bitwise_equal(out, test::forward(Gaussian{Products::float32, kernel}, in)));
    expect_rounded(out, reference::gaussian_kernel(24, {}, rows == attn::Rows::normalized), in);
  }
}

/// The backward pass, in float, takes up what the forward pass has saved.
TEST(Bfloat16Units, GradientsFollowTheOracle) {
  const auto x = tokens({90, 130, 24, 10}, 16), seed = tokens({90, 90, 24, 10}, 17);
  Context context;
  for (const Causal causal : {Causal::none, Causal::lower_right}) {
    const Inputs<Bfloat16> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
    Matrix<Bfloat16> out(90, 10), dq(90, 24), dk(130, 24), dv(130, 10);
    for (const bool normalized : {false, true}) {
      const Gaussian gaussian{attn::GaussianKernel{.rows = normalized ? attn::Rows::normalized : attn::Rows::raw}};
      Gaussian::Saved saved;
      gaussian.forward(in, out, context, saved);
      gaussian.backward(in, out, seed.v, saved, {dq, dk, dv}, context);
      const auto expected = reference::attend_backward(reference::gaussian_kernel(24, {}, normalized),
                                                       test::to_reference(in), seed.v.cast<double>());
      EXPECT_LE(test::relative_error(dv, expected.dv), 1e-2);
      EXPECT_LE(test::relative_error(dq, expected.dq), 5e-2);
      EXPECT_LE(test::relative_error(dk, expected.dk), 5e-2);
    }
    Softmax::Saved saved;
    Softmax{}.forward(in, out, context, saved);
    Softmax{}.backward(in, out, seed.v, saved, {dq, dk, dv}, context);
    const auto expected =
        reference::attend_backward(reference::softmax_kernel(24), test::to_reference(in), seed.v.cast<double>());
    EXPECT_LE(test::relative_error(dv, expected.dv), 1e-2);
    EXPECT_LE(test::relative_error(dq, expected.dq), 5e-2);
    EXPECT_LE(test::relative_error(dk, expected.dk), 5e-2);
  }
}

}  // namespace
