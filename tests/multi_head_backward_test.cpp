/// Gradients of batches and heads: those of every head alone, added up over the query heads that share a key head.
#include <attn/multi_head.hpp>
#include <attn/any_approximator.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using attn::HeadsView;
using attn::token_major;
using test::Context;
using test::Index;
using test::Mask;
using test::Matrix;

/// Arrays [batch, length, heads, dim] of one training step: 2 batch items, grouped heads.
struct Step {
  static constexpr Index kBatch = 2, kQueries = 4, kKeys = 2, kD = 5, kDv = 3;

  explicit Step(Index n) : length(n) {
    test::Random random(7);
    for (auto* array : {&q, &k, &v, &dout}) {
      const Index heads = array == &q || array == &dout ? kQueries : kKeys, dim = array == &q || array == &k ? kD : kDv;
      for (Index i = 0; i < kBatch * n * heads * dim; ++i) array->push_back(0.7 * random.normal());
    }
    out.resize(dout.size());
    for (auto [gradient, of] : {std::pair{&dq, &q}, std::pair{&dk, &k}, std::pair{&dv, &v}}) {
      gradient->assign(of->size(), test::kNaN<double>);
    }
  }

  template <class T>
  HeadsView<T> queries(T* x, Index dim) const {
    return token_major(x, kBatch, length, kQueries, dim);
  }
  template <class T>
  HeadsView<T> keys(T* x, Index dim) const {
    return token_major(x, kBatch, length, kKeys, dim);
  }

  template <class A>
  void run(const A& a, std::span<const Mask> masks, Context& context, std::vector<typename A::Saved>& saved) {
    attn::multi_head(a, queries(std::as_const(q).data(), kD), keys(std::as_const(k).data(), kD),
                     keys(std::as_const(v).data(), kDv), queries(out.data(), kDv), masks, context, saved);
    backward(a, masks, context, saved);
  }

  template <class A>
  void backward(const A& a, std::span<const Mask> masks, Context& context,
                const std::vector<typename A::Saved>& saved) {
    attn::multi_head_backward(a, queries(std::as_const(q).data(), kD), keys(std::as_const(k).data(), kD),
                              keys(std::as_const(v).data(), kDv), queries(std::as_const(out).data(), kDv),
                              queries(std::as_const(dout).data(), kDv), masks, saved,
                              {queries(dq.data(), kD), keys(dk.data(), kD), keys(dv.data(), kDv)}, context);
  }

  Index length;
  std::vector<double> q, k, v, dout, out, dq, dk, dv;
};

/// Each head's own backward pass, sums over the query heads of a group in their order.
template <class A>
void check_heads(const A& a, const Step& step, const std::vector<Mask>& masks) {
  constexpr Index kGroup = Step::kQueries / Step::kKeys;
  const Index n = step.length;
  for (Index b = 0; b < Step::kBatch; ++b) {
    const Mask mask = masks.empty() ? Mask{} : masks[masks.size() == 1 ? 0 : static_cast<std::size_t>(b)];
    for (Index kv = 0; kv < Step::kKeys; ++kv) {
      Matrix<double> dk = Matrix<double>::Zero(n, Step::kD), dv = Matrix<double>::Zero(n, Step::kDv);
      const Matrix<double> k = step.keys(step.k.data(), Step::kD)(b, kv),
                           v = step.keys(step.v.data(), Step::kDv)(b, kv);
      for (Index h = kv * kGroup; h < (kv + 1) * kGroup; ++h) {
        const Matrix<double> q = step.queries(step.q.data(), Step::kD)(b, h),
                             dout = step.queries(step.dout.data(), Step::kDv)(b, h);
        Matrix<double> out(n, Step::kDv), dq(n, Step::kD), one_dk(n, Step::kD), one_dv(n, Step::kDv);
        Context context;
        typename A::Saved saved;
        a.forward({q, k, v, mask}, out, context, saved);
        a.backward({q, k, v, mask}, out, dout, saved, {dq, one_dk, one_dv}, context);
        EXPECT_TRUE(test::bitwise_equal<double>(step.queries(step.dq.data(), Step::kD)(b, h), dq))
            << b << ", query head " << h;
        dk += one_dk;
        dv += one_dv;
      }
      EXPECT_LE(test::relative_error<double>(step.keys(step.dk.data(), Step::kD)(b, kv), dk), 1e-15)
          << b << ", key head " << kv;
      EXPECT_LE(test::relative_error<double>(step.keys(step.dv.data(), Step::kDv)(b, kv), dv), 1e-15)
          << b << ", key head " << kv;
    }
  }
}

TEST(MultiHeadBackward, IsThatOfEachHeadAddedUpOverGroups) {
  const auto keep = test::random_keep(60, 0.8, 3), other = test::random_keep(60, 0.5, 4);
  const Mask first{.keep_key = keep, .keep_query = keep}, second{.keep_key = other, .keep_query = other};
  for (const std::string name : {"softmax", "gaussian", "nystrom", "shifted-nystrom", "skyformer"}) {
    SCOPED_TRACE(name);
    const auto a = attn::find_method<double>(name).make({.num_landmarks = 8});
    for (const std::vector<Mask>& masks : {std::vector<Mask>{}, {first}, {first, second}}) {
      Step step(60);
      Context context;
      std::vector<attn::AnyApproximator<double>::Saved> saved;
      step.run(a, masks, context, saved);
      check_heads(a, step, masks);
    }
  }
}

TEST(MultiHeadBackward, BitwiseEqualWhateverTheWorkers) {
  const attn::SoftmaxAttention<double> a;
  Step expected(150);
  Context serial;
  std::vector<attn::SoftmaxAttention<double>::Saved> saved;
  expected.run(a, {}, serial, saved);
  for (auto& [name, context] : test::contexts()) {
    Step step(150);
    for (int twice = 0; twice < 2; ++twice) {
      step.run(a, {}, context, saved);
      EXPECT_EQ(step.dq, expected.dq) << name;
      EXPECT_EQ(step.dk, expected.dk) << name;
      EXPECT_EQ(step.dv, expected.dv) << name;
    }
  }
}

TEST(MultiHeadBackward, SavedOfOtherHeadsAndWrongShapesAreRefused) {
  const attn::SoftmaxAttention<double> a;
  Step step(6);
  Context context;
  std::vector<attn::SoftmaxAttention<double>::Saved> saved(3);
  EXPECT_EQ(test::error_of([&] { step.backward(a, {}, context, saved); }),
            "multi_head: saved is of 3 heads, there are 8");
  step.run(a, {}, context, saved);
  const auto queries = step.queries(std::as_const(step.q).data(), Step::kD);
  EXPECT_EQ(test::error_of([&] {
              attn::multi_head_backward(a, queries, step.keys(std::as_const(step.k).data(), Step::kD),
                                        step.keys(std::as_const(step.v).data(), Step::kDv),
                                        step.queries(std::as_const(step.out).data(), Step::kDv),
                                        step.queries(std::as_const(step.dout).data(), Step::kDv), {}, saved,
                                        {step.queries(step.dq.data(), Step::kD), step.queries(step.dq.data(), Step::kD),
                                         step.keys(step.dv.data(), Step::kDv)},
                                        context);
            }),
            "multi_head: dk is 2 x 4 x 6 x 5, k is 2 x 2 x 6 x 5");
}

/// What one training step of heads in T leaves in the arrays of dq, dk and dv: 2 batch items, 4 query heads; tokens and
/// what the forward pass found are rounded to Stored.
template <class T, class Stored = T>
struct Trained {
  template <class A>
  Trained(const A& a, Index key_heads, Index n) : dq(q_size(n)), dk(k_size(n, key_heads)), dv(v_size(n, key_heads)) {
    test::Random random(11);
    std::vector<T> q(dq.size()), k(dk.size()), v(dv.size()), dout(static_cast<std::size_t>(2 * n * 4 * 3)),
        out(dout.size());
    for (auto* array : {&q, &k, &v, &dout}) {
      for (T& x : *array) x = static_cast<T>(static_cast<Stored>(static_cast<float>(random.normal())));
    }
    const auto queries = [&](auto* x, Index dim) { return token_major(x, 2, n, 4, dim); };
    const auto keys = [&](auto* x, Index dim) { return token_major(x, 2, n, key_heads, dim); };
    const auto read = [](const std::vector<T>& x) { return x.data(); };
    std::vector<typename A::Saved> saved;
    Context context;
    attn::multi_head(a, queries(read(q), 5), keys(read(k), 5), keys(read(v), 3), queries(out.data(), 3), {}, context,
                     saved);
    for (T& x : out) x = static_cast<T>(static_cast<Stored>(x));
    attn::multi_head_backward(a, queries(read(q), 5), keys(read(k), 5), keys(read(v), 3), queries(read(out), 3),
                              queries(read(dout), 3), {}, saved,
                              {queries(dq.data(), 5), keys(dk.data(), 5), keys(dv.data(), 3)}, context);
  }

  static std::size_t q_size(Index n) { return static_cast<std::size_t>(2 * n * 4 * 5); }
  static std::size_t k_size(Index n, Index heads) { return static_cast<std::size_t>(2 * n * heads * 5); }
  static std::size_t v_size(Index n, Index heads) { return static_cast<std::size_t>(2 * n * heads * 3); }

  std::vector<T> dq, dk, dv;
};

/// Whether x is y, rounded once.
template <class T>
bool is_rounded(const std::vector<T>& x, const std::vector<float>& y) {
  return std::equal(x.begin(), x.end(), y.begin(), y.end(), [](T a, float b) { return a == static_cast<T>(b); });
}

/// A narrow method as a user would write it: its results are rounded, whoever adds them up.
template <class T>
struct OwnMethod {
  using Scalar = T;
  using Saved = typename attn::SoftmaxAttention<T>::Saved;
  static constexpr std::string_view kName = "own";

  bool supports(const attn::Inputs<T>& in) const { return method.supports(in); }
  void forward(const attn::Inputs<T>& in, attn::MatrixRef<T> out, Context& context) const {
    method.forward(in, out, context);
  }
  void forward(const attn::Inputs<T>& in, attn::MatrixRef<T> out, Context& context, Saved& saved) const {
    method.forward(in, out, context, saved);
  }
  void backward(const attn::Inputs<T>& in, attn::ConstMatrixRef<T> out, attn::ConstMatrixRef<T> dout,
                const Saved& saved, const attn::Gradients<T>& gradients, Context& context) const {
    method.backward(in, out, dout, saved, gradients, context);
  }

  attn::SoftmaxAttention<T> method{attn::Products::float32};
};

template <class T>
class NarrowMultiHeadBackward : public ::testing::Test {};
TYPED_TEST_SUITE(NarrowMultiHeadBackward, test::NarrowScalars);

TYPED_TEST(NarrowMultiHeadBackward, AddsGroupsUpInFloatAndRoundsOnce) {
  using T = TypeParam;
  for (const Index key_heads : {1, 2, 4}) {
    SCOPED_TRACE(key_heads);
    const Trained<float, T> wide(attn::SoftmaxAttention<float>{}, key_heads, 40);
    const Trained<T> narrow(attn::SoftmaxAttention<T>{attn::Products::float32}, key_heads, 40);
    EXPECT_TRUE(is_rounded(narrow.dq, wide.dq));
    EXPECT_TRUE(is_rounded(narrow.dk, wide.dk));
    EXPECT_TRUE(is_rounded(narrow.dv, wide.dv));
    const Trained<T> chosen(attn::make_approximator<T>("softmax", {.products = attn::Products::float32}), key_heads,
                            40);
    EXPECT_EQ(chosen.dq, narrow.dq);
    EXPECT_EQ(chosen.dk, narrow.dk);
    EXPECT_EQ(chosen.dv, narrow.dv);
  }
}

/// Sums of gradients that are rounded already, in float: the error of one more rounding, not of four.
TYPED_TEST(NarrowMultiHeadBackward, AddsUpWhatMethodsOfOnesOwnRound) {
  using T = TypeParam;
  constexpr float kUnit = std::is_same_v<T, Eigen::half> ? 0x1p-10F : 0x1p-7F;
  const Trained<float, T> wide(attn::SoftmaxAttention<float>{}, 1, 40);
  const Trained<T> own(OwnMethod<T>{}, 1, 40), chosen(attn::AnyApproximator<T>(OwnMethod<T>{}), 1, 40);
  EXPECT_TRUE(is_rounded(own.dq, wide.dq));
  EXPECT_EQ(own.dk, chosen.dk);
  EXPECT_EQ(own.dv, chosen.dv);
  float error = 0, size = 0;
  for (std::size_t i = 0; i < own.dv.size(); ++i) {
    error += (static_cast<float>(own.dv[i]) - wide.dv[i]) * (static_cast<float>(own.dv[i]) - wide.dv[i]);
    size += wide.dv[i] * wide.dv[i];
  }
  EXPECT_LE(std::sqrt(error / size), 0.5F * kUnit);
}

TEST(MultiHeadBackward, EveryShapeIsChecked) {
  const attn::SoftmaxAttention<double> a;
  Step step(6);
  Context context;
  std::vector<attn::SoftmaxAttention<double>::Saved> saved;
  step.run(a, {}, context, saved);
  const std::vector<double> before = step.dv;
  const auto backward = [&](const auto& change) {
    auto dout = step.queries(std::as_const(step.dout).data(), Step::kDv);
    auto dq = step.queries(step.dq.data(), Step::kD), dk = step.keys(step.dk.data(), Step::kD),
         dv = step.keys(step.dv.data(), Step::kDv);
    change(dout, dq, dk, dv);
    attn::multi_head_backward(
        a, step.queries(std::as_const(step.q).data(), Step::kD), step.keys(std::as_const(step.k).data(), Step::kD),
        step.keys(std::as_const(step.v).data(), Step::kDv), step.queries(std::as_const(step.out).data(), Step::kDv),
        dout, {}, saved, {dq, dk, dv}, context);
  };
  const auto expect_refused = [&](const auto& change) {
    EXPECT_THROW(backward(change), std::invalid_argument);
    EXPECT_EQ(step.dv, before);
  };
  EXPECT_NO_THROW(backward([](auto&, auto&, auto&, auto&) {}));
  for (Index HeadsView<double>::*const size :
       {&HeadsView<double>::batch, &HeadsView<double>::heads, &HeadsView<double>::length, &HeadsView<double>::dim}) {
    expect_refused([&](auto&, auto& dq, auto&, auto&) { --(dq.*size); });
    expect_refused([&](auto&, auto&, auto& dk, auto&) { --(dk.*size); });
    expect_refused([&](auto&, auto&, auto&, auto& dv) { --(dv.*size); });
  }
  for (Index HeadsView<const double>::*const size : {&HeadsView<const double>::batch, &HeadsView<const double>::heads,
                                                     &HeadsView<const double>::length, &HeadsView<const double>::dim}) {
    expect_refused([&](auto& dout, auto&, auto&, auto&) { --(dout.*size); });
  }
}

}  // namespace
