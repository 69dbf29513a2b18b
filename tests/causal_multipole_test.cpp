/// Multipole attention under causal masks: nothing leaks, and what is exact is.
#include <attn/multipole.hpp>

#include "common/kernels.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using attn::Causal;
using attn::Clusters;
using attn::GaussianKernel;
using attn::Multipole;
using attn::Rows;
using attn::SoftmaxKernel;
using test::Context;
using test::describe;
using test::Family;
using test::for_each_kernel;
using test::forward;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;
using test::Tokens;

/// Three chunks and a piece: nodes of one and of two chunks.
constexpr Index kLength = 1700;
constexpr Clusters kFew{.num_clusters = 24, .num_groups = 5, .num_near = 3, .num_branches = 6, .num_open = 4},
    kAllOpen{.num_clusters = 20, .num_near = 4}, kUsual{};

/// A problem with masks and a key bias of its own.
template <class T>
struct Problem {
  explicit Problem(const test::Shape& shape, std::uint64_t seed = 1101, Family family = Family::clusters)
      : x(test::make_tokens<T>(family, shape, seed)),
        keep_query(test::random_keep(shape.n_q, 0.8, seed + 1)),
        keep_key(test::random_keep(shape.n_k, 0.8, seed + 2)),
        bias(test::random_key_bias<T>(shape.n_k, 0.1, seed + 3)) {}
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  Inputs<T> inputs(Causal causal = Causal::upper_left) const {
    return {.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
  }

  /// Without anything, with either mask, and with all.
  std::vector<Inputs<T>> all(Causal causal = Causal::upper_left) const {
    std::vector<Inputs<T>> result(4, inputs(causal));
    result[1].mask.keep_key = keep_key;
    result[2].mask.keep_query = keep_query;
    result[3].mask.keep_key = keep_key;
    result[3].mask.keep_query = keep_query;
    result[3].key_bias = bias;
    return result;
  }

  Tokens<T> x;
  std::vector<std::uint8_t> keep_query, keep_key;
  std::vector<T> bias;
};

template <class T>
reference::Matrix exact(const reference::Kernel& kernel, const Inputs<T>& in) {
  return attend(kernel, test::to_reference(in)).out;
}

/// Inputs like others, of other tokens.
template <class T>
Inputs<T> with_tokens(const Inputs<T>& in, const Tokens<T>& x) {
  return {.q = x.q, .k = x.k, .v = x.v, .mask = in.mask, .key_bias = in.key_bias};
}

template <class T>
void expect_same_rows(const Matrix<T>& a, const Matrix<T>& b, Index rows) {
  for (Index i = 0; i < rows; ++i) ASSERT_TRUE(test::same_row(a, b, i)) << "row " << i;
}

template <class T>
class CausalMultipoleOf : public ::testing::Test {};
TYPED_TEST_SUITE(CausalMultipoleOf, test::Scalars);

/// Whatever comes after row i, rows up to i have the same bits.
TYPED_TEST(CausalMultipoleOf, ShowsNoRowWhatComesAfterIt) {
  using T = TypeParam;
  const Problem<T> problem({kLength, kLength, 8, 5});
  const Tokens<T> others = test::make_tokens<T>(Family::init, {kLength, kLength, 8, 5}, 1102);
  Context context(test::Threads{2});
  for (const Inputs<T>& in : problem.all()) {
    for_each_kernel(8, [&](const auto& kernel, const auto&) {
      const Multipole<T, std::decay_t<decltype(kernel)>> method(kFew, kernel);
      const Matrix<T> out = forward(method, in);
      for (const Index last : {1087, 1599}) {
        for (const std::optional<T> fill :
             {std::optional<T>{}, std::optional<T>{test::kNaN<T>}, std::optional<T>{test::kInf<T>}}) {
          SCOPED_TRACE(describe(in) + ", after " + std::to_string(last));
          Tokens<T> x = problem.x;
          const Index rest = kLength - last - 1;
          for (auto [to, from] : {std::pair{&x.q, &others.q}, std::pair{&x.k, &others.k}, std::pair{&x.v, &others.v}}) {
            to->bottomRows(rest) = from->bottomRows(rest);
            if (fill) to->bottomRows(rest).setConstant(*fill);
          }
          expect_same_rows(forward(method, with_tokens(in, x), context), out, last + 1);
        }
      }
    });
  }
}

/// With options set, and also by default where both have nodes.
TYPED_TEST(CausalMultipoleOf, GivesPrefixesWhatTheyGetAlone) {
  using T = TypeParam;
  const Problem<T> problem({kLength, kLength, 8, 5});
  for (const auto& [counts, bias] :
       {std::pair{kFew, false}, std::pair{kFew, true}, std::pair{kAllOpen, false}, std::pair{kUsual, false}}) {
    const Multipole<T> method(counts);
    Inputs<T> in = problem.inputs();
    if (bias) in.key_bias = problem.bias;
    const Matrix<T> out = forward(method, in);
    for (const Index n : {1, 500, 544, 545, 700, 1088, 1601}) {
      const Tokens<T> x{problem.x.q.topRows(n), problem.x.k.topRows(n), problem.x.v.topRows(n)};
      Inputs<T> prefix = with_tokens(in, x);
      if (bias) prefix.key_bias = prefix.key_bias.first(static_cast<std::size_t>(n));
      const Matrix<T> alone = forward(method, prefix);
      if (counts == kUsual && n <= 544) {
        EXPECT_LE(test::relative_error(alone, out.topRows(n).template cast<double>()), test::kExactTolerance<T>);
      } else {
        expect_same_rows(alone, out, n);
      }
    }
  }
}

TYPED_TEST(CausalMultipoleOf, IsTheSameForEveryExecutor) {
  using T = TypeParam;
  const Problem<T> problem({kLength, kLength, 8, 5});
  for (const Inputs<T>& in : problem.all()) {
    const Matrix<T> out = forward(Multipole<T>(kFew), in);
    for (auto& [name, context] : test::contexts()) {
      EXPECT_TRUE(test::bitwise_equal(forward(Multipole<T>(kFew), in, context), out)) << name << describe(in);
    }
  }
}

TYPED_TEST(CausalMultipoleOf, IsExactWhereEveryClusterIsNearOrEveryKeyAClusterOrNoChunkIsComplete) {
  using T = TypeParam;
  for (const Index n_q : {1300, 900, 1500}) {
    const Problem<T> problem({n_q, 1300, 8, 5});
    for (const Causal causal : {Causal::upper_left, Causal::lower_right}) {
      for (const Inputs<T>& in : problem.all(causal)) {
        SCOPED_TRACE(describe(in));
        for_each_kernel(8, [&](const auto& kernel, const reference::Kernel& oracle) {
          for (const Clusters& counts :
               {Clusters{.num_clusters = 9, .num_near = 1000}, Clusters{.num_clusters = 512},
                Clusters{.num_clusters = 12, .num_near = 1000, .num_branches = 3, .num_open = 6}}) {
            const Multipole<T, std::decay_t<decltype(kernel)>> method(counts, kernel);
            ASSERT_LE(test::relative_error(forward(method, in), exact(oracle, in)), sizeof(T) == 4 ? 5e-6 : 1e-12);
          }
        });
      }
    }
  }
  for (const Index n : {1, 300, 544}) {
    const Problem<T> problem({n, n, 8, 5});
    for (const Clusters& counts : {kUsual, kFew}) {
      EXPECT_LE(test::relative_error(forward(Multipole<T>(counts), problem.inputs()),
                                     exact(reference::softmax_kernel(8), problem.inputs())),
                test::kExactTolerance<T>);
    }
  }
}

TYPED_TEST(CausalMultipoleOf, IsCloseOnTokensWithStructure) {
  using T = TypeParam;
  for (const Family family : {Family::smooth, Family::clusters}) {
    const Problem<T> problem({2500, 2500, 16, 4}, 1103, family);
    const Inputs<T> in = problem.inputs();
    const double error = test::relative_error(forward(Multipole<T>{}, in), exact(reference::softmax_kernel(16), in));
    EXPECT_LE(error, family == Family::smooth ? 0.1 : 0.25);
    EXPECT_GE(error, 1e-6) << "exact";
  }
}

TYPED_TEST(CausalMultipoleOf, IsCloserWithMoreNearClustersBranchesAndLandmarks) {
  using T = TypeParam;
  const Problem<T> problem({kLength, kLength, 16, 4}, 1104);
  for (const Inputs<T>& in : problem.all()) {
    const reference::Matrix expected = exact(reference::softmax_kernel(16), in);
    double before = 1;
    for (const Clusters& counts : {Clusters{.num_groups = 2, .num_near = 1, .num_open = 2},
                                   Clusters{.num_groups = 8, .num_near = 8, .num_open = 6},
                                   Clusters{.num_groups = 32, .num_near = 40, .num_open = 8}}) {
      const double error = test::relative_error(forward(Multipole<T>(counts), in), expected);
      EXPECT_LE(error, 0.8 * before) << describe(in) << ", near " << *counts.num_near;
      before = error;
    }
  }
}

TYPED_TEST(CausalMultipoleOf, StaysInTheRangeOfValues) {
  using T = TypeParam;
  Problem<T> problem({kLength, kLength, 8, 5}, 1105, Family::unit);
  problem.x.q *= 30;
  problem.x.v.col(2).setConstant(3);
  for (const Inputs<T>& in : problem.all()) {
    const Matrix<T> out = forward(Multipole<T>(kFew), in);
    for (Index i = 0; i < kLength; ++i) {
      if (!reference::kept(in.mask.keep_query, i) || i < 20) continue;
      for (Index c = 0; c < 5; ++c) {
        ASSERT_LE(out(i, c), problem.x.v.col(c).maxCoeff() + T(1e-5));
        ASSERT_GE(out(i, c), problem.x.v.col(c).minCoeff() - T(1e-5));
      }
      ASSERT_NEAR(static_cast<double>(out(i, 2)), 3, 1e-5);
    }
  }
}

/// What a mask drops has no influence, and is as if it were not there.
TYPED_TEST(CausalMultipoleOf, GivesMaskedTokensWhatTrimmedOnesGet) {
  using T = TypeParam;
  const Problem<T> problem({kLength, kLength, 8, 5}, 1106);
  for (const auto& keep : {problem.keep_key, [] {
                             std::vector<std::uint8_t> padded(static_cast<std::size_t>(kLength), std::uint8_t{1});
                             std::fill_n(padded.begin(), 77, std::uint8_t{0});
                             std::fill_n(padded.rbegin(), 33, std::uint8_t{0});
                             return padded;
                           }()}) {
    const Tokens<T> trimmed{reference::kept_rows(problem.x.q.template cast<double>(), keep).template cast<T>(),
                            reference::kept_rows(problem.x.k.template cast<double>(), keep).template cast<T>(),
                            reference::kept_rows(problem.x.v.template cast<double>(), keep).template cast<T>()};
    Tokens<T> x = problem.x;
    for (Index i = 0; i < kLength; ++i) {
      if (reference::kept(keep, i)) continue;
      for (Matrix<T>* const part : {&x.q, &x.k, &x.v}) part->row(i).setConstant(i % 2 == 0 ? test::kNaN<T> : T(1e30));
    }
    for (const Causal causal : {Causal::upper_left, Causal::lower_right}) {
      Inputs<T> in = problem.inputs(causal);
      in.mask.keep_key = in.mask.keep_query = keep;
      const Matrix<T> out = forward(Multipole<T>(kFew), in);
      EXPECT_TRUE(test::bitwise_equal(forward(Multipole<T>(kFew), with_tokens(in, x)), out));
      Inputs<T> alone = with_tokens(problem.inputs(causal), trimmed);
      const Matrix<T> expected = forward(Multipole<T>(kFew), alone);
      for (Index i = 0, row = 0; i < kLength; ++i) {
        if (!reference::kept(keep, i)) {
          ASSERT_TRUE((out.row(i).array() == 0).all());
          continue;
        }
        ASSERT_EQ(std::memcmp(out.row(i).data(), expected.row(row++).data(), 5 * sizeof(T)), 0) << i;
      }
    }
  }
}

/// Keys before the first query have no queries of their own.
TYPED_TEST(CausalMultipoleOf, TakesOtherNumbersOfQueriesThanKeys) {
  using T = TypeParam;
  const Problem<T> problem({900, 2600, 16, 4}, 1107, Family::init);
  const Inputs<T> in = problem.inputs(Causal::lower_right);
  const Matrix<T> out = forward(Multipole<T>{}, in);
  const double error = test::relative_error(out, exact(reference::softmax_kernel(16), in));
  EXPECT_LE(error, 0.25);
  EXPECT_GE(error, 1e-6) << "exact";
  Tokens<T> x = problem.x;
  x.q.bottomRows(300).setConstant(test::kNaN<T>);
  x.k.bottomRows(300).setConstant(test::kInf<T>);
  x.v.bottomRows(300).setConstant(test::kNaN<T>);
  expect_same_rows(forward(Multipole<T>{}, with_tokens(in, x)), out, 600);
  const Tokens<T> first{problem.x.q.topRows(600), problem.x.k.topRows(2300), problem.x.v.topRows(2300)};
  expect_same_rows(forward(Multipole<T>{}, with_tokens(in, first)), out, 600);

  const Problem<T> more({1400, 1000, 16, 4}, 1108, Family::smooth);
  for (const Causal causal : {Causal::upper_left, Causal::lower_right}) {
    const Inputs<T> of_more = more.inputs(causal);
    const Matrix<T> result = forward(Multipole<T>(kFew), of_more);
    EXPECT_LE(test::relative_error(result, exact(reference::softmax_kernel(16), of_more)), 0.15);
    EXPECT_EQ((result.topRows(400).array() == 0).all(), causal == Causal::lower_right);
  }
}

/// A NaN reaches the rows that see it, and no column but its own where it is in a value.
TYPED_TEST(CausalMultipoleOf, KeepsNaNsToTheirRows) {
  using T = TypeParam;
  const Problem<T> problem({kLength, kLength, 8, 5});
  const Inputs<T> in = problem.inputs();
  Tokens<T> x = problem.x;
  x.q.row(130).setConstant(test::kNaN<T>);
  x.q(600, 3) = test::kInf<T>;
  Matrix<T> out = forward(Multipole<T>(kFew), with_tokens(in, x));
  for (const Index row : {130, 600}) {
    EXPECT_FALSE(out.row(row).array().isFinite().any());
    out.row(row).setZero();
  }
  EXPECT_TRUE(out.array().isFinite().all());
  x = problem.x;
  x.v(200, 3) = test::kNaN<T>;
  out = forward(Multipole<T>(kFew), with_tokens(in, x));
  for (Index i = 0; i < kLength; ++i) EXPECT_EQ(std::isnan(out(i, 3)), i >= 200) << i;
  out.col(3).setZero();
  EXPECT_TRUE(out.array().isFinite().all());
  x = problem.x;
  x.k(200, 3) = test::kNaN<T>;
  out = forward(Multipole<T>(kFew), with_tokens(in, x));
  for (Index i = 0; i < kLength; ++i) EXPECT_EQ(std::isnan(out(i, 0)), i >= 200) << i;
}

template <class T>
class NarrowCausalMultipole : public ::testing::Test {};
TYPED_TEST_SUITE(NarrowCausalMultipole, test::NarrowScalars);

TYPED_TEST(NarrowCausalMultipole, IsThatOfFloatRoundedOnce) {
  using T = TypeParam;
  const Problem<float> problem({900, 1300, 16, 12});
  const Tokens<T> narrow{problem.x.q.cast<T>(), problem.x.k.cast<T>(), problem.x.v.cast<T>()};
  const Tokens<float> wide{narrow.q.template cast<float>(), narrow.k.template cast<float>(),
                           narrow.v.template cast<float>()};
  const Mask mask{.causal = Causal::lower_right, .keep_key = problem.keep_key};
  Matrix<T> out(900, 12);
  Context context;
  Multipole<T>(kFew).forward({.q = narrow.q, .k = narrow.k, .v = narrow.v, .mask = mask}, out, context);
  EXPECT_TRUE(
      out == forward(Multipole<float>(kFew), {.q = wide.q, .k = wide.k, .v = wide.v, .mask = mask}).template cast<T>());
}

/// Tokens are not measured from a key that is far from all others, though it is the first.
TEST(CausalMultipole, OfAFirstKeyFarFromAllOthersKeepsItsDigits) {
  test::Tokens<float> x = test::make_tokens<float>(Family::init, {700, 700, 16, 5}, 1109);
  for (const float far : {10.0F, 1e3F, 1e4F}) {
    x.k.row(0).setConstant(far);
    const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = Causal::upper_left}};
    for (const Rows rows : {Rows::raw, Rows::normalized}) {
      const GaussianKernel kernel{.rows = rows};
      const reference::Result exact =
          attend(reference::gaussian_kernel(16, {}, rows == Rows::normalized), test::to_reference(in));
      const Matrix<float> out =
          forward(Multipole<float, GaussianKernel>({.num_near = 1000000, .num_open = 100000}, kernel), in);
      EXPECT_LT(test::relative_error(out, exact.out), 2e-6) << far;
    }
  }
}

TEST(CausalMultipole, SaysWhatItSupports) {
  const Problem<float> problem({kLength, kLength, 8, 5});
  for (const Causal causal : {Causal::upper_left, Causal::lower_right}) {
    const Inputs<float> in = problem.inputs(causal);
    EXPECT_TRUE(Multipole<float>{}.supports(in));
    EXPECT_EQ(test::error_of([&] {
                Multipole<float>::Saved saved;
                Matrix<float> out(kLength, 5);
                Context context;
                Multipole<float>{}.forward(in, out, context, saved);
              }),
              "multipole: under causal masks there is no backward pass for more than 544 keys");
  }
}

}  // namespace
