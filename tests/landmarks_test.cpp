#include <attn/landmarks.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <ostream>
#include <set>
#include <tuple>
#include <vector>

namespace {

using attn::StridedSample;
using attn::UniformSample;
using test::Context;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;

/// Tokens of one feature that say which row they are: query i holds i, key j holds -1 - j.
struct Numbered {
  Numbered(Index n_q, Index n_k) : q(n_q, 1), k(n_k, 1), v(Matrix<double>::Zero(n_k, 1)) {
    for (Index i = 0; i < n_q; ++i) q(i, 0) = static_cast<double>(i);
    for (Index j = 0; j < n_k; ++j) k(j, 0) = static_cast<double>(-1 - j);
  }
  Inputs<double> inputs(const Mask& mask = {}) const { return {.q = q, .k = k, .v = v, .mask = mask}; }

  Matrix<double> q, k, v;
};

struct Rows {
  std::vector<Index> q, k;
  bool operator==(const Rows&) const = default;
  friend std::ostream& operator<<(std::ostream& out, const Rows& rows) {
    return out << ::testing::PrintToString(rows.q) << " of q, " << ::testing::PrintToString(rows.k) << " of k";
  }
};

/// Which rows of Numbered tokens a policy selects.
template <class Landmarks>
Rows select(const Landmarks& landmarks, const Inputs<double>& in) {
  Context context;
  auto scratch = context.scratch();
  const Matrix<double> selected = landmarks.select(in, scratch);
  EXPECT_EQ(selected.cols(), 1);
  Rows rows;
  for (Index i = 0; i < selected.rows(); ++i) {
    const double x = selected(i, 0);
    EXPECT_TRUE(x < 0 || rows.k.empty()) << "queries come first";
    if (x >= 0) {
      rows.q.push_back(static_cast<Index>(x));
    } else {
      rows.k.push_back(static_cast<Index>(-1 - x));
    }
  }
  return rows;
}

/// The rows behind ranks among the kept ones.
std::vector<Index> kept_at(const std::vector<Index>& ranks, const std::vector<std::uint8_t>& keep) {
  std::vector<Index> kept, rows;
  for (std::size_t i = 0; i < keep.size(); ++i) {
    if (keep[i] != 0) kept.push_back(static_cast<Index>(i));
  }
  for (const Index rank : ranks) rows.push_back(kept[static_cast<std::size_t>(rank)]);
  return rows;
}

template <class Landmarks>
class Samples : public ::testing::Test {};
using Samplers = ::testing::Types<StridedSample, UniformSample>;
TYPED_TEST_SUITE(Samples, Samplers);

TYPED_TEST(Samples, HalfTheLandmarksAreQueries) {
  const Numbered x(50, 70);
  for (const auto& [m, m_q, m_k] : {std::tuple<Index, Index, Index>{24, 12, 12},
                                    {25, 12, 13},
                                    {1, 0, 1},
                                    {2, 1, 1},
                                    {120, 50, 70},
                                    {110, 50, 60},
                                    {200, 50, 70},
                                    {1000, 50, 70}}) {
    SCOPED_TRACE(m);
    const Rows rows = select(TypeParam{.num_landmarks = m}, x.inputs());
    EXPECT_EQ(static_cast<Index>(rows.q.size()), m_q);
    EXPECT_EQ(static_cast<Index>(rows.k.size()), m_k);
  }
}

TYPED_TEST(Samples, FewQueriesLeaveTheirShareToKeys) {
  const Numbered x(3, 70);
  const Rows rows = select(TypeParam{.num_landmarks = 24}, x.inputs());
  EXPECT_EQ(rows.q, (std::vector<Index>{0, 1, 2}));
  EXPECT_EQ(rows.k.size(), 21U);
}

TYPED_TEST(Samples, NoRowIsDrawnTwice) {
  const Numbered x(60, 90);
  for (const Index m : {2, 11, 64, 120, 149}) {
    const Rows rows = select(TypeParam{.num_landmarks = m}, x.inputs());
    EXPECT_EQ(std::set<Index>(rows.q.begin(), rows.q.end()).size(), rows.q.size());
    EXPECT_EQ(std::set<Index>(rows.k.begin(), rows.k.end()).size(), rows.k.size());
  }
}

TYPED_TEST(Samples, RespectMasks) {
  const Numbered x(60, 90);
  const auto keep_query = test::random_keep(60, 0.5, 31), keep_key = test::random_keep(90, 0.3, 32);
  const Rows rows = select(TypeParam{.num_landmarks = 20}, x.inputs({.keep_key = keep_key, .keep_query = keep_query}));
  EXPECT_EQ(rows.q.size(), 10U);
  EXPECT_EQ(rows.k.size(), 10U);
  for (const Index i : rows.q) EXPECT_TRUE(reference::kept(keep_query, i)) << i;
  for (const Index j : rows.k) EXPECT_TRUE(reference::kept(keep_key, j)) << j;
}

TYPED_TEST(Samples, PassOverKeysThatABiasRemoves) {
  const Numbered x(60, 90);
  const auto bias = test::random_key_bias<double>(90, 0.7, 35);
  Inputs<double> in = x.inputs();
  in.key_bias = bias;
  for (const Index j : select(TypeParam{.num_landmarks = 20}, in).k)
    EXPECT_TRUE(std::isfinite(bias[static_cast<std::size_t>(j)])) << j;
}

TYPED_TEST(Samples, FewerKeptRowsThanLandmarks) {
  const Numbered x(60, 90);
  std::vector<std::uint8_t> keep_query(60, 0), keep_key(90, 0);
  for (const std::size_t i : {5U, 17U, 59U}) keep_query[i] = 1;
  for (const std::size_t j : {0U, 88U}) keep_key[j] = 1;
  const Rows rows = select(TypeParam{.num_landmarks = 20}, x.inputs({.keep_key = keep_key, .keep_query = keep_query}));
  EXPECT_EQ(rows, (Rows{{5, 17, 59}, {0, 88}}));
}

TYPED_TEST(Samples, PaddedIsTrimmed) {
  const Numbered padded(90, 90), trimmed(71, 71);
  std::vector<std::uint8_t> keep(90, 0);
  std::fill_n(keep.begin(), 71, std::uint8_t{1});
  const TypeParam landmarks{.num_landmarks = 16};
  EXPECT_EQ(select(landmarks, padded.inputs({.keep_key = keep, .keep_query = keep})),
            select(landmarks, trimmed.inputs()));
}

TEST(StridedSample, FollowsItsFormula) {
  const Numbered x(61, 90);
  for (const Index m : {1, 2, 7, 24, 151}) {
    const Rows rows = select(StridedSample{.num_landmarks = m}, x.inputs());
    const Index m_q = std::min<Index>(m / 2, 61);
    EXPECT_EQ(rows.q, reference::strided_rows(61, m_q));
    EXPECT_EQ(rows.k, reference::strided_rows(90, m - m_q));
  }
}

TEST(StridedSample, CountsKeptRows) {
  const Numbered x(61, 90);
  const auto keep_query = test::random_keep(61, 0.7, 33), keep_key = test::random_keep(90, 0.4, 34);
  const auto count = [](const auto& keep) {
    return static_cast<Index>(keep.size()) - std::count(keep.begin(), keep.end(), 0);
  };
  const Rows rows =
      select(StridedSample{.num_landmarks = 15}, x.inputs({.keep_key = keep_key, .keep_query = keep_query}));
  EXPECT_EQ(rows.q, kept_at(reference::strided_rows(count(keep_query), 7), keep_query));
  EXPECT_EQ(rows.k, kept_at(reference::strided_rows(count(keep_key), 8), keep_key));
}

TEST(UniformSample, IsTheSameAtEveryCall) {
  const Numbered x(500, 800);
  const UniformSample landmarks{.num_landmarks = 64, .seed = 7};
  EXPECT_EQ(select(landmarks, x.inputs()), select(landmarks, x.inputs()));
}

TEST(UniformSample, ItsSeedChangesIt) {
  const Numbered x(500, 800);
  const Rows first = select(UniformSample{.num_landmarks = 64, .seed = 0}, x.inputs());
  for (std::uint64_t seed = 1; seed < 20; ++seed) {
    const Rows rows = select(UniformSample{.num_landmarks = 64, .seed = seed}, x.inputs());
    EXPECT_NE(rows.q, first.q);
    EXPECT_NE(rows.k, first.k);
  }
}

TEST(UniformSample, DrawsQueriesAndKeysApart) {
  const Numbered x(500, 500);
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const Rows rows = select(UniformSample{.num_landmarks = 64, .seed = seed}, x.inputs());
    EXPECT_NE(rows.q, rows.k);
  }
}

/// 2000 draws of 8 out of 20: every row is drawn 800 times on average, with a standard deviation of 22.
TEST(UniformSample, DrawsEveryRowEquallyOften) {
  const Numbered x(20, 20);
  std::vector<int> of_q(20, 0), of_k(20, 0);
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    const Rows rows = select(UniformSample{.num_landmarks = 16, .seed = seed}, x.inputs());
    for (const Index i : rows.q) ++of_q[static_cast<std::size_t>(i)];
    for (const Index j : rows.k) ++of_k[static_cast<std::size_t>(j)];
  }
  for (std::size_t i = 0; i < 20; ++i) {
    EXPECT_NEAR(of_q[i], 800, 110) << "query " << i;
    EXPECT_NEAR(of_k[i], 800, 110) << "key " << i;
  }
}

/// The first numbers of Steele, Lea and Flood's generator from 0.
TEST(SplitMix64, IsTheGeneratorOfItsName) {
  attn::detail::SplitMix64 random(0);
  for (const std::uint64_t x : {0xe220a8397b1dcdafU, 0x6e789e6aa1b965f4U, 0x06c45d188009454fU}) EXPECT_EQ(random(), x);
}

/// 2^64 = 2 n + 2^62 for n = 3 2^61: the first quarter of all numbers would favour remainders below 2^62.
TEST(SplitMix64, ThrowsAwayNumbersThatWouldFavourSmallOnes) {
  constexpr std::uint64_t kBound = std::uint64_t{3} << 61U, kRejected = std::uint64_t{1} << 62U;
  attn::detail::SplitMix64 random(36), numbers(36);
  int rejected = 0;
  for (int i = 0; i < 100; ++i) {
    std::uint64_t x = numbers();
    for (; x < kRejected; x = numbers()) ++rejected;
    ASSERT_EQ(random.below(static_cast<Index>(kBound)), static_cast<Index>(x % kBound)) << i;
  }
  EXPECT_GT(rejected, 10);
}

/// The rows of one seed, written down: the generator is part of the interface, the same on every platform and in every
/// version.
TEST(UniformSample, IsTheSameOnEveryPlatform) {
  const Numbered x(1000, 1000);
  const Rows rows = select(UniformSample{.num_landmarks = 8, .seed = 42}, x.inputs());
  EXPECT_EQ(rows, (Rows{{26, 182, 413, 552}, {558, 643, 930, 955}}));
}

}  // namespace
