/// A cache gives what causal attention of the whole sequence gives, in whatever pieces tokens come.
#include <attn/key_cache.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using attn::CacheShape;
using attn::Causal;
using attn::Clusters;
using attn::KeyCache;
using attn::Multipole;
using test::Context;
using test::Index;
using test::Inputs;
using test::Matrix;

/// Tokens of all heads side by side.
template <class T>
struct Sequence {
  CacheShape shape;
  Matrix<T> q, k, v;

  Sequence(const CacheShape& of, Index n, std::uint64_t seed = 2301)
      : shape(of), q(n, of.heads * of.d), k(n, of.key_heads * of.d), v(n, of.key_heads * of.d_v) {
    for (Index h = 0; h < of.heads; ++h) {
      const auto x =
          test::make_tokens<T>(test::Family::clusters, {n, n, of.d, of.d_v}, seed + static_cast<unsigned>(h));
      q.middleCols(h * of.d, of.d) = x.q;
      if (h >= of.key_heads) continue;
      k.middleCols(h * of.d, of.d) = x.k;
      v.middleCols(h * of.d_v, of.d_v) = x.v;
    }
  }

  Index length() const { return q.rows(); }

  /// What a method gives for the whole sequence under a causal mask.
  template <class Method>
  Matrix<T> whole(const Method& method) const {
    Matrix<T> out(length(), shape.heads * shape.d_v);
    Context context;
    for (Index h = 0; h < shape.heads; ++h) {
      const Index kv = h / (shape.heads / shape.key_heads);
      method.forward({.q = q.middleCols(h * shape.d, shape.d),
                      .k = k.middleCols(kv * shape.d, shape.d),
                      .v = v.middleCols(kv * shape.d_v, shape.d_v),
                      .mask = {.causal = Causal::upper_left}},
                     out.middleCols(h * shape.d_v, shape.d_v), context);
    }
    return out;
  }

  template <class Cache>
  void append(Cache& cache, Index first, Index count) const {
    cache.append(k.middleRows(first, count), v.middleRows(first, count), q.middleRows(first, count));
  }

  /// The same in pieces of the given lengths, again and again.
  template <class Cache>
  Matrix<T> pieces(Cache& cache, const std::vector<Index>& lengths, Context& context, bool exactly = false) const {
    Matrix<T> out(length(), shape.heads * shape.d_v);
    std::size_t i = 0;
    for (Index first = cache.length(); first < length();) {
      const Index count = std::min(length() - first, lengths[i++ % lengths.size()]);
      append(cache, first, count);
      const attn::ConstMatrixRef<T> some = q.middleRows(first, count);
      if (exactly) {
        cache.attend_exactly(some, out.middleRows(first, count), context);
      } else {
        cache.attend(some, out.middleRows(first, count), context);
      }
      first += count;
    }
    return out;
  }
};

constexpr CacheShape kGrouped{.heads = 4, .key_heads = 2, .d = 16, .d_v = 9};

template <class T>
class KeyCacheOf : public ::testing::Test {};
using AllScalars = ::testing::Types<float, double, Eigen::half, Eigen::bfloat16>;
TYPED_TEST_SUITE(KeyCacheOf, AllScalars);

TYPED_TEST(KeyCacheOf, GivesTheBitsOfTheWholeSequenceInAnyPieces) {
  const Sequence<TypeParam> x(kGrouped, 1700);
  const Matrix<TypeParam> whole = x.whole(Multipole<TypeParam>{});
  Context context;
  const std::vector<std::vector<Index>> cuts{{1700}, {700, 1, 1, 50, 333}, {544, 1}, {64}};
  for (const auto& lengths : cuts) {
    KeyCache<TypeParam> cache(kGrouped);
    EXPECT_TRUE(test::bitwise_equal(x.pieces(cache, lengths, context), whole)) << lengths.front();
  }
}

TYPED_TEST(KeyCacheOf, AttendsExactlyAsSoftmaxAttention) {
  constexpr double kTolerance = std::is_same_v<TypeParam, double>        ? 1e-13
                                : std::is_same_v<TypeParam, float>       ? 2e-6
                                : std::is_same_v<TypeParam, Eigen::half> ? 2e-3
                                                                         : 1.6e-2;
  const Sequence<TypeParam> x(kGrouped, 700);
  KeyCache<TypeParam> cache(kGrouped);
  Context context;
  const Matrix<TypeParam> out = x.pieces(cache, {300, 1, 1, 20}, context, true);
  for (Index h = 0; h < kGrouped.heads; ++h) {
    const auto part = [](const Matrix<TypeParam>& m, Index head, Index d) {
      return Matrix<TypeParam>(m.middleCols(head * d, d));
    };
    const Matrix<TypeParam> q = part(x.q, h, kGrouped.d), k = part(x.k, h / 2, kGrouped.d),
                            v = part(x.v, h / 2, kGrouped.d_v);
    const reference::Result exact =
        attend(reference::softmax_kernel(kGrouped.d),
               test::to_reference<TypeParam>({.q = q, .k = k, .v = v, .mask = {.causal = Causal::upper_left}}));
    EXPECT_LT(test::relative_error(Matrix<double>(part(out, h, kGrouped.d_v).template cast<double>()), exact.out),
              kTolerance)
        << h;
  }
}

TEST(KeyCache, OfOtherKernelsAndOptionsGivesTheBitsOfTheWholeSequence) {
  const CacheShape shape{.heads = 1, .key_heads = 1, .d = 20, .d_v = 8};
  const Sequence<float> x(shape, 1800);
  const std::vector<Clusters> options{
      {.num_clusters = 24, .num_groups = 5, .num_near = 3, .num_branches = 6, .num_open = 4},
      {.num_clusters = 20, .num_near = 4},
      {}};
  Context context;
  for (const attn::Rows rows : {attn::Rows::raw, attn::Rows::normalized}) {
    const attn::GaussianKernel kernel{.rows = rows};
    for (const Clusters& clusters : options) {
      KeyCache<float, attn::GaussianKernel> cache(shape, clusters, kernel);
      EXPECT_TRUE(test::bitwise_equal(x.pieces(cache, {901, 1, 13}, context),
                                      x.whole(Multipole<float, attn::GaussianKernel>{clusters, kernel})));
    }
  }
}

TEST(KeyCache, GivesTheSameBitsWithAnyWorkers) {
  const Sequence<float> x(kGrouped, 1300);
  const Matrix<float> whole = x.whole(Multipole<float>{});
  for (auto& [name, context] : test::contexts()) {
    KeyCache<float> cache(kGrouped);
    EXPECT_TRUE(test::bitwise_equal(x.pieces(cache, {1100, 1}, context), whole)) << name;
  }
}

TEST(KeyCache, TruncatedGoesOnAsIfWhatIsForgottenHadNeverBeen) {
  const Sequence<float> x(kGrouped, 1800), other(kGrouped, 1800, 2399);
  const Matrix<float> whole = x.whole(Multipole<float>{});
  for (const Index kept : {1795, 1601, 1100, 1024, 700, 3, 0}) {
    KeyCache<float> cache(kGrouped);
    Context context;
    x.append(cache, 0, kept);
    other.append(cache, kept, 1800 - kept);
    Matrix<float> ignored(200, kGrouped.heads * kGrouped.d_v);
    cache.attend(other.q.bottomRows(200), ignored, context);  // makes nodes, of tokens to be forgotten too
    cache.truncate(kept);
    EXPECT_EQ(cache.length(), kept);
    const Matrix<float> rest = x.pieces(cache, {37}, context);
    EXPECT_TRUE(
        test::bitwise_equal(Matrix<float>(rest.bottomRows(1800 - kept)), Matrix<float>(whole.bottomRows(1800 - kept))))
        << kept;
  }
}

/// Nodes of what was forgotten are forgotten, though queries to come have nodes in the same places.
TEST(KeyCache, TruncatedForgetsNodes) {
  const Sequence<float> x(kGrouped, 1800), other(kGrouped, 1800, 2399);
  const Matrix<float> whole = x.whole(Multipole<float>{});
  Context context;
  for (const Index kept : {1200, 600, 0}) {
    KeyCache<float> cache(kGrouped);
    x.append(cache, 0, kept);
    other.append(cache, kept, 1800 - kept);
    Matrix<float> last(50, whole.cols());
    cache.attend(other.q.bottomRows(50), last, context);
    cache.truncate(kept);
    x.append(cache, kept, 1800 - kept);
    cache.attend(x.q.bottomRows(50), last, context);
    EXPECT_TRUE(test::bitwise_equal(last, Matrix<float>(whole.bottomRows(50)))) << kept;
  }
}

TEST(KeyCache, TakesRowsOfWiderMatrices) {
  const Sequence<float> x(kGrouped, 700);
  const auto wider = [](const Matrix<float>& m, Index more) {
    Matrix<float> made = Matrix<float>::Constant(m.rows(), m.cols() + more, test::kNaN<float>);
    made.leftCols(m.cols()) = m;
    return made;
  };
  const Matrix<float> q = wider(x.q, 3), k = wider(x.k, 5), v = wider(x.v, 1), whole = x.whole(Multipole<float>{});
  Matrix<float> out = wider(whole, 2);
  out.leftCols(whole.cols()).setZero();
  KeyCache<float> cache(kGrouped);
  Context context;
  cache.append(k.leftCols(x.k.cols()), v.leftCols(x.v.cols()), q.leftCols(x.q.cols()));
  cache.attend(q.leftCols(x.q.cols()), out.leftCols(whole.cols()), context);
  EXPECT_TRUE(test::bitwise_equal(Matrix<float>(out.leftCols(whole.cols())), whole));
  EXPECT_TRUE(out.rightCols(2).array().isNaN().all());
}

TEST(KeyCache, ClearedKeepsItsRoom) {
  const Sequence<float> x(kGrouped, 1200);
  KeyCache<float> cache(kGrouped);
  cache.reserve(2000);
  Context context;
  const Matrix<float> first = x.pieces(cache, {1200}, context);
  const Index capacity = cache.capacity();
  cache.clear();
  EXPECT_EQ(cache.length(), 0);
  EXPECT_EQ(cache.capacity(), capacity);
  EXPECT_TRUE(test::bitwise_equal(x.pieces(cache, {500}, context), first));
}

TEST(KeyCache, ThatWasMovedFromIsEmpty) {
  const Sequence<float> x(kGrouped, 1200);
  Context context;
  KeyCache<float> cache(kGrouped);
  const Matrix<float> first = x.pieces(cache, {1200}, context);
  KeyCache<float> other(std::move(cache));
  EXPECT_EQ(other.length(), 1200);
  EXPECT_EQ(cache.length(), 0);  // NOLINT: what is tested
  EXPECT_TRUE(test::bitwise_equal(x.pieces(cache, {700}, context), first));
  KeyCache<float>& same = other;
  other = std::move(same);
  Matrix<float> again(300, first.cols());
  other.attend(x.q.bottomRows(300), again, context);
  EXPECT_TRUE(test::bitwise_equal(again, Matrix<float>(first.bottomRows(300))));
  EXPECT_THROW(other.reserve((Index{1} << 61) + 700), std::bad_alloc);
  EXPECT_EQ(other.length(), 1200);
}

TEST(KeyCache, CanBeAttendedToAgain) {
  const Sequence<float> x(kGrouped, 1300);
  KeyCache<float> cache(kGrouped);
  Context context;
  const Matrix<float> whole = x.pieces(cache, {1300}, context);
  for (const Index count : {1300, 700, 1}) {
    Matrix<float> again(count, whole.cols());
    cache.attend(x.q.bottomRows(count), again, context);
    EXPECT_TRUE(test::bitwise_equal(again, Matrix<float>(whole.bottomRows(count)))) << count;
  }
}

TEST(KeyCache, HoldsAboutWhatItsDocumentationSays) {
  const CacheShape shape{.heads = 2, .key_heads = 1, .d = 64, .d_v = 64};
  constexpr Index kTokens = 4200;
  const Sequence<float> x(shape, kTokens);
  KeyCache<float> cache(shape);
  cache.reserve(kTokens);
  Context context;
  x.pieces(cache, {kTokens}, context);
  const double token = 4.0 * static_cast<double>(shape.heads * shape.d + shape.key_heads * (shape.d + shape.d_v)),
               node = 4.0 * static_cast<double>(shape.key_heads * (shape.d + shape.d_v));
  const double most = 1.1 * kTokens * (token + node + 2 * node);  // and small things
  EXPECT_LT(static_cast<double>(cache.bytes()), most);
  EXPECT_GT(static_cast<double>(cache.bytes()), kTokens * token);
}

TEST(KeyCache, RefusesWhatDoesNotFit) {
  const auto made = [](const CacheShape& shape, const Clusters& clusters = {}) {
    return test::error_of([&] { KeyCache<float> cache(shape, clusters); });
  };
  EXPECT_EQ(made({.heads = 3, .key_heads = 2}), "key_cache: heads is 3, should be a multiple of key_heads, which is 2");
  EXPECT_EQ(made({.heads = 0}), "key_cache: heads is 0, should be a multiple of key_heads, which is 1");
  EXPECT_EQ(made({.d = 0}), "key_cache: d is 0, should be at least 1");
  EXPECT_EQ(made({}, {.num_near = -1}), "key_cache: num_near is -1, should be at least 0");

  KeyCache<float> cache(CacheShape{.heads = 2, .key_heads = 1, .d = 4, .d_v = 3});
  const Matrix<float> k = Matrix<float>::Random(5, 4), v = Matrix<float>::Random(5, 3), q = Matrix<float>::Random(5, 8);
  Matrix<float> out(5, 6);
  Context context;
  const auto appended = [&](const Matrix<float>& a, const Matrix<float>& b, const Matrix<float>& c) {
    return test::error_of([&] { cache.append(a, b, c); });
  };
  EXPECT_EQ(appended(q, v, q), "key_cache: k is 5 x 8, should be 5 x 4");
  EXPECT_EQ(appended(k, k, q), "key_cache: v is 5 x 4, should be 5 x 3");
  EXPECT_EQ(appended(k, v, k), "key_cache: q is 5 x 4, should be 5 x 8");
  EXPECT_EQ(cache.length(), 0);
  const auto attended = [&](attn::ConstMatrixRef<float> of, attn::MatrixRef<float> to) {
    return test::error_of([&] { cache.attend(of, to, context); });
  };
  EXPECT_EQ(attended(q, out), "key_cache: q has 5 rows, the cache 0 tokens");
  cache.append(k, v, q);
  EXPECT_EQ(attended(q.leftCols(6), out), "key_cache: q is 5 x 6, should be 5 x 8");
  EXPECT_EQ(attended(q, out.leftCols(5)), "key_cache: out is 5 x 5, should be 5 x 6");
  Matrix<float> both = Matrix<float>::Random(5, 8);
  EXPECT_NE(attended(both, both.leftCols(6)).find("overlap"), std::string::npos);
  EXPECT_EQ(test::error_of([&] { cache.truncate(6); }), "key_cache: truncate(6) of 5 tokens");
  EXPECT_EQ(attended(q, out), "no error");
}

}  // namespace
