/// What multi_head takes beside arrays and masks: lengths, packed sequences, biases and slopes, log-sums.
#include <attn/exact.hpp>
#include <attn/multi_head.hpp>
#include <attn/nystrom.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

namespace test {
namespace {

using attn::Causal;
using attn::HeadGradients;
using attn::HeadInputs;
using attn::HeadsView;
using attn::Lengths;
using attn::multi_head;
using attn::multi_head_backward;
using attn::SoftmaxAttention;

template <class T>
using Log = attn::detail::Arithmetic<T>;

template <class T>
const T kBad = static_cast<T>(std::numeric_limits<float>::quiet_NaN());

/// Arrays [batch, heads, length, dim] of seeded tokens, with room for results and gradients, which hold NaN.
template <class T>
struct Arrays {
  Index batch, q_heads, k_heads, n_q, n_k, d = 9, d_v = 6;
  std::vector<T> q, k, v, dout, out, dq, dk, dv;
  std::vector<Log<T>> lse;

  Arrays(Index b, Index of_q, Index of_k, Index queries, Index keys)
      : batch(b), q_heads(of_q), k_heads(of_k), n_q(queries), n_k(keys) {
    std::uint64_t seed = 1;
    for (auto& [x, size] : {std::pair{&q, b * of_q * n_q * d},
                            {&k, b * of_k * n_k * d},
                            {&v, b * of_k * n_k * d_v},
                            {&dout, b * of_q * n_q * d_v}}) {
      const Matrix<T> tokens = (0.5 * Random(++seed).normal(1, size)).template cast<T>();
      x->assign(tokens.data(), tokens.data() + size);
    }
    out.assign(dout.size(), kBad<T>), dq.assign(q.size(), kBad<T>), dk.assign(k.size(), kBad<T>);
    dv.assign(v.size(), kBad<T>), lse.assign(static_cast<std::size_t>(b * of_q * n_q), kNaN<Log<T>>);
  }

  template <class U>
  HeadsView<U> of_q(std::vector<U>& x, Index dim) {
    return attn::head_major(x.data(), batch, q_heads, n_q, dim);
  }
  template <class U>
  HeadsView<U> of_k(std::vector<U>& x, Index dim) {
    return attn::head_major(x.data(), batch, k_heads, n_k, dim);
  }
  HeadInputs<T> inputs() { return {.q = of_q(q, d), .k = of_k(k, d), .v = of_k(v, d_v)}; }
  HeadGradients<T> gradients() { return {of_q(dq, d), of_k(dk, d), of_k(dv, d_v)}; }

  /// Rows of x that belong to no token hold NaN.
  static void spoil(HeadsView<T> x, Index b, Index first, Index last) {
    for (Index h = 0; h < x.heads; ++h) {
      for (Index i = first; i < last; ++i) x(b, h).row(i).setConstant(kBad<T>);
    }
  }
};

/// An item of a batch: its rows in the arrays, and what else it has.
struct Item {
  Index b, first_query, queries, first_key, keys;
  Mask mask;
};

/// multi_head, forward, for training, with log-sums and backward, gives bitwise what the method gives each head of each
/// item. more(inputs, item, head): sets biases and slopes.
template <class T>
void expect_as_alone(
    Arrays<T>& x, const HeadInputs<T>& in, const std::vector<Item>& items, Context& context,
    const std::function<void(Inputs<T>&, const Item&, Index)>& more = [](auto&, auto&, auto) {}) {
  const SoftmaxAttention<T> method;
  std::vector<typename SoftmaxAttention<T>::Saved> saved;
  const auto out = x.of_q(x.out, x.d_v);
  multi_head(method, in, out, context);
  const std::vector<T> inference = x.out;
  multi_head(method, in, out, x.of_q(x.lse, 1), context);
  multi_head(method, in, out, context, saved);
  const HeadGradients<T> gradients = x.gradients();
  multi_head_backward(method, in, out, x.of_q(x.dout, x.d_v), saved, gradients, context);

  const Index group = x.q_heads / x.k_heads;
  Context serial;
  for (const Item& item : items) {
    const auto rows = [&](const auto& view, Index h, Index first, Index count) {
      const Matrix<T> m = view(item.b, h).middleRows(first, count);
      return m;
    };
    for (Index kv = 0; kv < x.k_heads && item.queries > 0 && item.keys > 0; ++kv) {
      const Matrix<T> k = rows(in.k, kv, item.first_key, item.keys), v = rows(in.v, kv, item.first_key, item.keys);
      Matrix<double> dk = Matrix<double>::Zero(item.keys, x.d), dv = Matrix<double>::Zero(item.keys, x.d_v);
      for (Index h = kv * group; h < (kv + 1) * group; ++h) {
        SCOPED_TRACE("item " + std::to_string(&item - items.data()) + ", head " + std::to_string(h));
        const Matrix<T> q = rows(in.q, h, item.first_query, item.queries);
        Inputs<T> alone{.q = q, .k = k, .v = v, .mask = item.mask};
        more(alone, item, h);
        Matrix<T> expected(item.queries, x.d_v), dq(item.queries, x.d), some_dk(item.keys, x.d),
            some_dv(item.keys, x.d_v);
        method.forward(alone, expected, serial);
        HeadsView<const T> inferred = out;
        inferred.data = inference.data();
        EXPECT_TRUE(bitwise_equal(rows(inferred, h, item.first_query, item.queries), expected));
        std::vector<Log<T>> lse(static_cast<std::size_t>(item.queries));
        method.forward(alone, expected, std::span(lse), serial);
        for (Index i = 0; i < item.queries; ++i) {
          EXPECT_EQ(x.of_q(x.lse, 1)(item.b, h)(item.first_query + i, 0), lse[static_cast<std::size_t>(i)]);
        }
        typename SoftmaxAttention<T>::Saved own;
        method.forward(alone, expected, serial, own);
        EXPECT_TRUE(bitwise_equal(rows(out, h, item.first_query, item.queries), expected));
        const Matrix<T> dout = rows(x.of_q(x.dout, x.d_v), h, item.first_query, item.queries);
        method.backward(alone, expected, dout, own, {dq, some_dk, some_dv}, serial);
        EXPECT_TRUE(bitwise_equal(rows(gradients.dq, h, item.first_query, item.queries), dq));
        dk += some_dk.template cast<double>(), dv += some_dv.template cast<double>();
      }
      const double tolerance = sizeof(T) == 2 ? 1e-2 : sizeof(T) == 4 ? 1e-6 : 1e-14;
      EXPECT_LE(relative_error(rows(gradients.dk, kv, item.first_key, item.keys), dk), tolerance);
      EXPECT_LE(relative_error(rows(gradients.dv, kv, item.first_key, item.keys), dv), tolerance);
    }
  }
}

template <class T>
bool all_zero(const HeadsView<T>& x, Index b, Index first, Index last) {
  for (Index h = 0; h < x.heads; ++h) {
    for (Index i = first; i < last; ++i) {
      if (!(x(b, h).row(i).array() == T(0)).all()) return false;
    }
  }
  return true;
}

template <class T>
class HeadInput : public ::testing::Test {};
using AllScalars = ::testing::Types<float, double, Eigen::half, Eigen::bfloat16>;
TYPED_TEST_SUITE(HeadInput, AllScalars);

TYPED_TEST(HeadInput, HasLengthsOfItsOwn) {
  using T = TypeParam;
  const std::vector<Lengths> lengths = {{5, 40}, {2, 17}, {0, 40}, {5, 0}, {5, 1}};
  for (const Index n_q : {5, 70}) {  // heads that share keys are computed together, or not
    for (auto& [name, context] : contexts()) {
      SCOPED_TRACE(name);
      Arrays<T> x(5, 4, 2, n_q, 40);
      std::vector<Item> items;
      std::vector<Mask> masks;
      const auto keep = random_keep(40, 0.8, 3);
      for (Index b = 0; b < 5; ++b) {
        const auto [queries, keys] = lengths[static_cast<std::size_t>(b)];
        const Causal causal = b % 2 == 0 ? Causal::lower_right : Causal::none;
        masks.push_back({.causal = causal, .keep_key = keep});
        items.push_back({b,
                         0,
                         queries,
                         0,
                         keys,
                         {.causal = causal, .keep_key = std::span(keep).first(static_cast<std::size_t>(keys))}});
        Arrays<T>::spoil(x.of_q(x.q, x.d), b, queries, n_q), Arrays<T>::spoil(x.of_q(x.dout, x.d_v), b, queries, n_q);
        Arrays<T>::spoil(x.of_k(x.k, x.d), b, keys, 40), Arrays<T>::spoil(x.of_k(x.v, x.d_v), b, keys, 40);
      }
      HeadInputs<T> in = x.inputs();
      in.masks = masks, in.lengths = lengths;
      expect_as_alone<T>(x, in, items, context);
      for (const Item& item : items) {
        const Index queries = item.keys == 0 ? 0 : item.queries, keys = item.queries == 0 ? 0 : item.keys;
        EXPECT_TRUE(all_zero(x.of_q(x.out, x.d_v), item.b, queries, n_q));
        EXPECT_TRUE(all_zero(x.of_q(x.dq, x.d), item.b, queries, n_q));
        EXPECT_TRUE(all_zero(x.of_k(x.dk, x.d), item.b, keys, 40));
        EXPECT_TRUE(all_zero(x.of_k(x.dv, x.d_v), item.b, keys, 40));
        for (Index h = 0; h < 4; ++h) {
          for (Index i = queries; i < n_q; ++i) {
            EXPECT_EQ(x.of_q(x.lse, 1)(item.b, h)(i, 0), -kInf<Log<T>>);
          }
        }
      }
    }
  }
}

TYPED_TEST(HeadInput, OfPackedSequencesIsEachByItself) {
  using T = TypeParam;
  const std::vector<Index> query_offsets = {0, 3, 3, 40, 41, 300}, key_offsets = {0, 30, 60, 97, 97, 400};
  for (auto& [name, context] : contexts()) {
    SCOPED_TRACE(name);
    Arrays<T> x(1, 4, 2, 300, 400);
    const Mask mask{.causal = Causal::lower_right, .window = 50};
    std::vector<Item> items;
    for (std::size_t b = 0; b + 1 < query_offsets.size(); ++b) {
      items.push_back({0, query_offsets[b], query_offsets[b + 1] - query_offsets[b], key_offsets[b],
                       key_offsets[b + 1] - key_offsets[b], mask});
    }
    HeadInputs<T> in = x.inputs();
    in.masks = {&mask, 1}, in.query_offsets = query_offsets, in.key_offsets = key_offsets;
    expect_as_alone<T>(x, in, items, context);
    EXPECT_TRUE(all_zero(x.of_q(x.out, x.d_v), 0, 40, 41)) << "a query without keys";
    EXPECT_TRUE(all_zero(x.of_q(x.dq, x.d), 0, 40, 41));
    EXPECT_TRUE(all_zero(x.of_k(x.dk, x.d), 0, 30, 60)) << "keys without a query";
  }
}

TYPED_TEST(HeadInput, HasBiasesAndSlopesOfItsHeads) {
  using T = TypeParam;
  constexpr Index kKeys = 150;
  const Mask mask{.causal = Causal::lower_right};
  const auto wide = random_key_bias<double>(2 * 4 * kKeys, 0.1, 5);
  std::vector<T> bias;
  for (const double b : wide) bias.push_back(static_cast<T>(b));
  for (const Index n_q : {2, 60}) {
    for (const bool of_heads : {false, true}) {
      for (const bool slopes : {false, true}) {
        Arrays<T> x(2, 4, 2, n_q, kKeys);
        HeadInputs<T> in = x.inputs();
        in.masks = {&mask, 1};
        in.key_bias = {bias.data(), 4 * kKeys, of_heads ? kKeys : 0};
        const std::vector<double> of_head = {0.5, 0.3, 0.125, 0};
        if (slopes) in.alibi_slopes = of_head;
        std::vector<Item> items;
        for (Index b = 0; b < 2; ++b) items.push_back({b, 0, n_q, 0, kKeys, mask});
        Context context;
        expect_as_alone<T>(x, in, items, context, [&](Inputs<T>& alone, const Item& item, Index h) {
          alone.key_bias = {bias.data() + item.b * 4 * kKeys + (of_heads ? h * kKeys : 0), kKeys};
          if (slopes) alone.alibi_slope = of_head[static_cast<std::size_t>(h)];
        });
      }
    }
  }
}

template <class Cache>
class HeadInputOfACache : public ::testing::Test {};
TYPED_TEST_SUITE(HeadInputOfACache, NarrowScalars);

/// Keys and values in a narrow type give what they give when they are widened, by every path.
TYPED_TEST(HeadInputOfACache, IsThatOfFloat) {
  using Cache = TypeParam;
  const std::vector<Lengths> lengths = {{2, 150}, {1, 60}};
  const std::vector<double> slopes = {0.5, 0.25, 0.125, 0.1};
  const SoftmaxAttention<float> method;
  for (const Index n_q : {2, 100}) {
    Arrays<float> x(2, 4, 2, n_q, 150), result(2, 4, 2, n_q, 150);
    Arrays<Cache> cache(2, 4, 2, n_q, 150);
    for (auto [wide, narrow] : {std::pair{&x.k, &cache.k}, {&x.v, &cache.v}}) {
      for (std::size_t i = 0; i < wide->size(); ++i) (*wide)[i] = static_cast<float>((*narrow)[i]);
    }
    const Mask mask{.causal = Causal::lower_right, .window = 90, .num_sinks = 3};
    for (const bool with_slopes : {false, true}) {
      HeadInputs<float> in = x.inputs();
      HeadInputs<float, Cache> narrow{.q = in.q, .k = cache.of_k(cache.k, x.d), .v = cache.of_k(cache.v, x.d_v)};
      in.masks = narrow.masks = {&mask, 1};
      in.lengths = narrow.lengths = lengths;
      if (with_slopes) in.alibi_slopes = narrow.alibi_slopes = slopes;
      Context context;
      multi_head(method, in, x.of_q(x.out, x.d_v), context);
      multi_head(method, narrow, result.of_q(result.out, x.d_v), context);
      EXPECT_EQ(x.out, result.out);
      multi_head(method, in, x.of_q(x.out, x.d_v), x.of_q(x.lse, 1), context);
      multi_head(method, narrow, result.of_q(result.out, x.d_v), result.of_q(result.lse, 1), context);
      EXPECT_EQ(x.out, result.out);
      EXPECT_EQ(x.lse, result.lse);
    }
  }
}

TYPED_TEST(HeadInputOfACache, MayBeInParts) {
  using Cache = TypeParam;
  const auto x = make_tokens<float>(Family::init, {3, 90, 9, 6}, 12);
  const Matrix<Cache> k = x.k.template cast<Cache>(), v = x.v.template cast<Cache>();
  const Matrix<float> wide_k = k.template cast<float>(), wide_v = v.template cast<float>();
  std::vector<float> maximum(3), sum(3), expected_maximum(3), expected_sum(3);
  Matrix<float> weighted(3, 6), expected(3, 6);
  Context context;
  const attn::GaussianKernel kernel{.rows = attn::Rows::normalized};
  kernel_matmul_partial(kernel, attn::CacheInputs<Cache>{.q = x.q, .k = k, .v = v},
                        attn::RowStates<float>{maximum, sum, weighted}, context);
  kernel_matmul_partial(kernel, Inputs<float>{.q = x.q, .k = wide_k, .v = wide_v},
                        attn::RowStates<float>{expected_maximum, expected_sum, expected}, context);
  EXPECT_EQ(maximum, expected_maximum);
  EXPECT_EQ(sum, expected_sum);
  EXPECT_TRUE(bitwise_equal(weighted, expected));
}

TEST(HeadInputOfOneToken, MayHaveAnyRowStride) {
  Arrays<float> x(2, 4, 2, 1, 40);
  HeadInputs<float> in = x.inputs();
  Context context;
  multi_head(SoftmaxAttention<float>{}, in, x.of_q(x.out, x.d_v), context);
  const std::vector<float> expected = x.out;
  in.q.row_stride = 0;
  auto out = x.of_q(x.out, x.d_v);
  out.row_stride = 0;
  x.out.assign(x.out.size(), 0.0F);
  multi_head(SoftmaxAttention<float>{}, in, out, context);
  EXPECT_EQ(x.out, expected);
}

TEST(HeadInputOfApproximations, IsTrimmedToo) {
  Arrays<float> x(2, 2, 2, 80, 90);
  const std::vector<Lengths> lengths = {{60, 50}, {80, 90}};
  HeadInputs<float> in = x.inputs();
  in.lengths = lengths;
  const attn::Nystrom<float> method{attn::SegmentMeans{.num_landmarks = 8}};
  Context context;
  multi_head(method, in, x.of_q(x.out, x.d_v), context);
  for (Index h = 0; h < 2; ++h) {
    Matrix<float> expected(60, 6);
    method.forward({.q = in.q(0, h).topRows(60), .k = in.k(0, h).topRows(50), .v = in.v(0, h).topRows(50)}, expected,
                   context);
    EXPECT_TRUE(bitwise_equal(Matrix<float>(x.of_q(x.out, x.d_v)(0, h).topRows(60)), expected));
  }
}

TEST(HeadInputs, OfAnEmptyItemLeaveNothingOfAnEarlierStepToTheBackwardPass) {
  Arrays<float> x(1, 2, 2, 5, 7);
  HeadInputs<float> in = x.inputs();
  const std::vector<Lengths> empty = {{0, 7}};
  const SoftmaxAttention<float> method;
  std::vector<SoftmaxAttention<float>::Saved> saved;
  Context context;
  const auto out = x.of_q(x.out, x.d_v);
  multi_head(method, in, out, context, saved);
  in.lengths = empty;
  multi_head(method, in, out, context, saved);
  in.lengths = {};
  Arrays<float> of(1, 2, 2, 5, 7);
  EXPECT_NE(error_of([&] {
              multi_head_backward(method, in, out, x.of_q(x.dout, x.d_v), saved,
                                  {of.of_q(of.q, of.d), of.of_k(of.k, of.d), of.of_k(of.v, of.d_v)}, context);
            }),
            "no error");
}

TEST(HeadInputs, AreChecked) {
  Arrays<float> x(2, 4, 2, 5, 7);
  const auto error = [&](const auto& change, const auto& method) {
    HeadInputs<float> in = x.inputs();
    change(in);
    Context context;
    return error_of([&] { multi_head(method, in, x.of_q(x.out, x.d_v), context); });
  };
  const SoftmaxAttention<float> softmax;
  std::vector<Lengths> lengths = {{5, 7}};
  EXPECT_EQ(error([&](auto& in) { in.lengths = lengths; }, softmax),
            "multi_head: lengths has 1 entries, there are 2 batch items");
  lengths = {{5, 7}, {6, 7}};
  EXPECT_EQ(error([&](auto& in) { in.lengths = lengths; }, softmax),
            "multi_head: lengths[1] is 6 queries and 7 keys, should be at least 0 and at most 5 and 7");
  std::vector<Index> offsets = {0, 5}, other = {0, 3, 7};
  EXPECT_EQ(error([&](auto& in) { in.query_offsets = offsets; }, softmax),
            "multi_head: query_offsets has 2 entries, key_offsets has 0");
  EXPECT_EQ(error([&](auto& in) { in.query_offsets = in.key_offsets = offsets; }, softmax),
            "multi_head: packed sequences have a batch of 2 and 0 lengths, should have one item and none");
  offsets = {0, 4, 3};
  const auto packed = [&](auto& in) {
    in.q.batch = in.k.batch = in.v.batch = 1;
    in.query_offsets = offsets, in.key_offsets = other;
  };
  Context context;
  HeadInputs<float> in = x.inputs();
  packed(in);
  auto out = x.of_q(x.out, x.d_v);
  out.batch = 1;
  EXPECT_EQ(error_of([&] { multi_head(softmax, in, out, context); }),
            "multi_head: query_offsets[2] is 3, should be at least 4 and at most 5");
  const std::vector<double> slopes = {0.5, 0.5, 0.5}, enough = {0.5, 0.5, 0.5, 0.25};
  EXPECT_EQ(error([&](auto& some) { some.alibi_slopes = slopes; }, softmax),
            "multi_head: alibi_slopes has 3 entries, there are 4 query heads");
  EXPECT_EQ(error([&](auto& some) { some.alibi_slopes = enough; }, softmax),
            "multi_head: an alibi_slope needs a causal mask");
  EXPECT_EQ(error(
                [&](auto& some) {
                  some.key_bias = {x.out.data(), 0, 0};
                },
                softmax),
            "multi_head: out overlaps key_bias");
  EXPECT_EQ(error(
                [&](auto& some) {
                  some.key_bias = {x.q.data(), 0, 0};
                },
                attn::Nystrom<float>{}),
            "multi_head: nystrom does not support batch item 0: 5 queries, 7 keys, key_bias");
  auto lse = x.of_q(x.lse, 1);
  lse.row_stride = 2;
  EXPECT_EQ(error_of([&] { multi_head(softmax, x.inputs(), x.of_q(x.out, x.d_v), lse, context); }),
            "multi_head: lse is 2 x 4 x 5 x 1 with rows 2 apart, should be 2 x 4 x 5 x 1, 1 apart");
}

}  // namespace
}  // namespace test
