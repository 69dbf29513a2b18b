#include <attn/heads.hpp>
#include <attn/multi_head.hpp>
#include <attn/exact.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using attn::Causal;
using attn::fused_heads;
using attn::heads_of;
using attn::HeadsView;
using attn::multi_head;
using test::Context;
using test::Index;
using test::Mask;
using test::Matrix;

constexpr Index kBatch = 2, kLength = 5, kHeads = 4, kKeyHeads = 2, kDim = 3;

Matrix<float> counted(Index rows, Index cols) {
  Matrix<float> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<float>(i % 91) / 91;
  return m;
}

void expect_heads(const auto& view, const Matrix<float>& x, Index first_column, Index heads) {
  EXPECT_EQ(view.batch, kBatch);
  EXPECT_EQ(view.heads, heads);
  EXPECT_EQ(view.length, kLength);
  EXPECT_EQ(view.dim, kDim);
  for (Index b = 0; b < kBatch; ++b) {
    for (Index h = 0; h < heads; ++h)
      EXPECT_EQ(view(b, h), x.block(b * kLength, first_column + h * kDim, kLength, kDim)) << b << ", " << h;
  }
}

TEST(HeadsOf, AMatrixOrABlockOfColumns) {
  Matrix<float> x = counted(kBatch * kLength, kHeads * kDim), wide = counted(kBatch * kLength, 7 + kHeads * kDim);
  static_assert(std::is_same_v<decltype(heads_of(x, kHeads)), HeadsView<float>>);
  static_assert(std::is_same_v<decltype(heads_of(std::as_const(x), kHeads)), HeadsView<const float>>);
  static_assert(std::is_same_v<decltype(heads_of(attn::MatrixRef<float>(x), kHeads)), HeadsView<float>>);
  static_assert(std::is_same_v<decltype(heads_of(attn::ConstMatrixRef<float>(x), kHeads)), HeadsView<const float>>);
  expect_heads(heads_of(x, kHeads, kBatch), x, 0, kHeads);
  expect_heads(heads_of(wide.rightCols(kHeads * kDim), kHeads, kBatch), wide, 7, kHeads);
  heads_of(x, kHeads, kBatch)(1, 2)(3, 1) = -1;
  EXPECT_EQ(x(kLength + 3, 2 * kDim + 1), -1);
  const auto one_item = heads_of(x, kHeads);
  EXPECT_EQ(one_item.batch, 1);
  EXPECT_EQ(one_item.length, kBatch * kLength);
}

TEST(FusedHeads, AreThoseOfTheirColumns) {
  const Matrix<float> x = counted(kBatch * kLength, (kHeads + 2 * kKeyHeads) * kDim);
  const auto [q, k, v] = fused_heads(x, kHeads, kKeyHeads, kBatch);
  expect_heads(q, x, 0, kHeads);
  expect_heads(k, x, kHeads * kDim, kKeyHeads);
  expect_heads(v, x, (kHeads + kKeyHeads) * kDim, kKeyHeads);
}

TEST(HeadsViews, OfFirstTokensKeepTheirStrides) {
  Matrix<float> x = counted(kBatch * kLength, kHeads * kDim);
  const auto cache = heads_of(x, kHeads, kBatch), some = cache.first(2);
  EXPECT_EQ(some.length, 2);
  EXPECT_EQ(some(1, 3), x.block(kLength, 3 * kDim, 2, kDim));
  EXPECT_EQ(cache.first(kLength)(1, 3), cache(1, 3));
}

std::string error_of(const auto& call) {
  try {
    call();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "no error";
}

TEST(HeadsViews, RefuseCountsThatDoNotFit) {
  const Matrix<float> x = counted(10, 12);
  EXPECT_EQ(error_of([&] { heads_of(x, 5); }), "heads_of: x has 12 columns, which 5 heads do not divide");
  EXPECT_EQ(error_of([&] { heads_of(x, 4, 3); }), "heads_of: x has 10 rows, which 3 batch items do not divide");
  EXPECT_EQ(error_of([&] { heads_of(x, 0); }), "heads_of: heads is 0, should be at least 1");
  EXPECT_EQ(error_of([&] { heads_of(x, 4, 0); }), "heads_of: batch is 0, should be at least 1");
  EXPECT_EQ(error_of([&] { fused_heads(x, 3, 1); }),
            "fused_heads: x has 12 columns, which 3 heads and twice 1 do not divide");
  EXPECT_EQ(error_of([&] { heads_of(x, 4).first(11); }), "HeadsView: first(11) of 10 tokens");
  EXPECT_EQ(error_of([&] { heads_of(x, 4).first(-1); }), "HeadsView: first(-1) of 10 tokens");
}

/// One step of all heads, by each way to say which masks.
class MultiHeadOverloads : public ::testing::Test {
 protected:
  using Method = attn::SoftmaxAttention<float>;

  template <class... Masks>
  Matrix<float> step(const Masks&... masks) {
    const auto [q, k, v] = fused_heads(std::as_const(x_), kHeads, kKeyHeads, kBatch);
    Matrix<float> out(kBatch * kLength, kHeads * kDim), trained = out, dx(x_.rows(), x_.cols());
    const auto to = heads_of(out, kHeads, kBatch), to_trained = heads_of(trained, kHeads, kBatch);
    const auto [dq, dk, dv] = fused_heads(dx, kHeads, kKeyHeads, kBatch);
    multi_head(method_, q, k, v, to, masks..., context_);
    multi_head(method_, q, k, v, to_trained, masks..., context_, saved_);
    EXPECT_EQ(out, trained);
    attn::multi_head_backward(method_, q, k, v, to, to, masks..., saved_, {dq, dk, dv}, context_);
    Matrix<float> all(out.rows(), out.cols() + dx.cols());
    all << out, dx;
    return all;
  }

  Matrix<float> x_ = counted(kBatch * kLength, (kHeads + 2 * kKeyHeads) * kDim);
  Method method_{};
  std::vector<Method::Saved> saved_{};
  Context context_{};
};

TEST_F(MultiHeadOverloads, WithoutMasksWithOneAndWithAList) {
  const Mask first{.causal = Causal::lower_right}, second{};
  const std::vector<Mask> none, one{first}, both{first, second};
  EXPECT_EQ(step(), step(none));
  EXPECT_EQ(step(first), step(one));
  EXPECT_NE(step(first), step());
  EXPECT_EQ(step(std::initializer_list<Mask>{first, second}), step(both));
  EXPECT_EQ(step(std::initializer_list<Mask>{}), step());
}

TEST_F(MultiHeadOverloads, TakeBraces) {
  const auto [q, k, v] = fused_heads(std::as_const(x_), kHeads, kKeyHeads, kBatch);
  Matrix<float> out(kBatch * kLength, kHeads * kDim), expected = out;
  multi_head(method_, q, k, v, heads_of(out, kHeads, kBatch), {}, context_);
  multi_head(method_, q, k, v, heads_of(expected, kHeads, kBatch), context_);
  EXPECT_EQ(out, expected);
  multi_head(method_, q, k, v, heads_of(out, kHeads, kBatch), {.causal = Causal::upper_left}, context_);
  multi_head(method_, q, k, v, heads_of(expected, kHeads, kBatch), Mask{.causal = Causal::upper_left}, context_);
  EXPECT_EQ(out, expected);
}

TEST(Attention, TakesAContext) {
  const Matrix<float> x = counted(40, 4);
  Context context{test::Threads{.count = 2}};
  const attn::SoftmaxAttention<float> method;
  const Mask causal{.causal = Causal::lower_right};
  EXPECT_EQ(attn::attention(method, x, x, x, context), attn::attention(method, x, x, x));
  EXPECT_EQ(attn::attention(method, x, x, x, causal, context), attn::attention(method, x, x, x, causal));
  EXPECT_GT(context.scratch_bytes(), 0U);
}

}  // namespace
