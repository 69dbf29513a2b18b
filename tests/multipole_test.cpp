/// Multipole attention: against its definition, where it is exact, and what holds whatever it decides.
#include <attn/multipole.hpp>

#include <attn/exact.hpp>
#include <attn/multi_head.hpp>

#include "common/random_problem.hpp"
#include "common/kernels.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

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

/// A problem with masks and a key bias of its own.
template <class T>
struct Problem {
  Problem(const test::Shape& shape, std::uint64_t seed, Family family = Family::init)
      : x(test::make_tokens<T>(family, shape, seed)),
        keep_query(test::random_keep(shape.n_q, 0.8, seed + 1)),
        keep_key(test::random_keep(shape.n_k, 0.7, seed + 2)),
        bias(test::random_key_bias<T>(shape.n_k, 0.1, seed + 3)) {}
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  Inputs<T> plain() const { return {.q = x.q, .k = x.k, .v = x.v}; }

  /// Without and with masks, without and with a key bias.
  std::vector<Inputs<T>> all() const {
    std::vector<Inputs<T>> result;
    for (const bool biased : {false, true}) {
      for (const Mask& mask : {Mask{}, Mask{.keep_key = keep_key}, Mask{.keep_query = keep_query},
                               Mask{.keep_key = keep_key, .keep_query = keep_query}}) {
        Inputs<T> in = plain();
        in.mask = mask;
        if (biased) in.key_bias = bias;
        result.push_back(in);
      }
    }
    return result;
  }

  Tokens<T> x;
  std::vector<std::uint8_t> keep_query, keep_key;
  std::vector<T> bias;
};

std::vector<Index> part_of(const std::vector<Index>& all, Index first, Index last) {
  return {all.begin() + first, all.begin() + last};
}

/// A group in blocks of nearly equal size, of at most a strip each.
template <class T>
std::vector<reference::Fields::Block> blocks_of(const std::vector<Index>& group) {
  const auto size = static_cast<Index>(group.size());
  constexpr Index kStrip = attn::detail::kTileWidth<attn::detail::Arithmetic<T>>;
  const Index count = (size + kStrip - 1) / kStrip;
  std::vector<reference::Fields::Block> blocks;
  for (Index b = 0; b < count; ++b)
    blocks.push_back({.queries = part_of(group, b * size / count, (b + 1) * size / count), .group = group, .near = {}});
  return blocks;
}

/// What a forward pass decided, as it saved it.
template <class T, class Saved>
reference::Fields fields_of(const Saved& saved) {
  reference::Fields fields;
  for (std::size_t c = 0; c + 1 < saved.key_starts.size(); ++c)
    fields.clusters.push_back(part_of(saved.keys, saved.key_starts[c], saved.key_starts[c + 1]));
  fields.clusters_in_a_branch = saved.clusters_in_a_branch;
  fields.all_open = saved.most_open * saved.clusters_in_a_branch == static_cast<Index>(fields.clusters.size());
  const auto in_a_region = static_cast<std::size_t>(saved.groups_in_a_region);
  for (std::size_t g = 0; g + 1 < saved.query_starts.size(); ++g) {
    const std::size_t region = g / in_a_region * in_a_region;
    for (auto block : blocks_of<T>(part_of(saved.queries, saved.query_starts[g], saved.query_starts[g + 1]))) {
      block.region = part_of(saved.queries, saved.query_starts[region], saved.query_starts[region + in_a_region]);
      block.open =
          part_of(saved.open, static_cast<Index>(g) * saved.most_open, static_cast<Index>(g + 1) * saved.most_open);
      const std::size_t number = fields.blocks.size();
      const Index near = static_cast<Index>(number) * saved.most_near;
      block.near = part_of(saved.near, near, near + saved.near_count.at(number));
      fields.blocks.push_back(block);
    }
  }
  EXPECT_EQ(fields.blocks.size(), saved.near_count.size());
  return fields;
}

/// A forward pass and what it decided.
template <class T, class Kernel>
struct Run {
  Run(const Multipole<T, Kernel>& method, const Inputs<T>& in, Context with = {})
      : context(std::move(with)), out(Matrix<T>::Constant(in.q.rows(), in.v.cols(), T(-7))) {
    method.forward(in, out, context, saved);
    if (!saved.exact) fields = fields_of<T>(saved);
  }

  Context context;
  Matrix<T> out;
  typename Multipole<T, Kernel>::Saved saved{};
  reference::Fields fields{};
};

/// Every kept row is in just one part, ascending, and no part is empty.
void expect_parts(const std::vector<std::vector<Index>>& parts, Index rows, const std::function<bool(Index)>& keeps) {
  std::vector<Index> all, kept;
  for (const auto& part : parts) {
    EXPECT_FALSE(part.empty());
    EXPECT_TRUE(std::is_sorted(part.begin(), part.end()));
    all.insert(all.end(), part.begin(), part.end());
  }
  for (Index i = 0; i < rows; ++i) {
    if (keeps(i)) kept.push_back(i);
  }
  std::sort(all.begin(), all.end());
  EXPECT_EQ(all, kept);
}

template <class T>
class MultipoleOf : public ::testing::Test {};
TYPED_TEST_SUITE(MultipoleOf, test::Scalars);

constexpr test::Shape kShapes[] = {
    {130, 210, 16, 12}, {61, 61, 1, 1}, {40, 300, 33, 17}, {300, 40, 3, 5}, {20, 90, 300, 4}};
constexpr Clusters kCounts[] = {{.num_clusters = 8, .num_groups = 3, .num_near = 2},
                                {.num_clusters = 5, .num_groups = 4, .num_near = 0},
                                {.num_clusters = 13, .num_groups = 7, .num_near = 5},
                                {.num_clusters = 1, .num_groups = 1, .num_near = 0},
                                {.num_clusters = 2, .num_groups = 1000, .num_near = 1},
                                {.num_clusters = 18, .num_groups = 5, .num_near = 3, .num_branches = 6, .num_open = 2},
                                {.num_clusters = 14, .num_groups = 4, .num_near = 0, .num_branches = 7, .num_open = 1}};

/// Whatever was decided, for which the oracle takes what the pass saved: so there are no near ties to speak of.
TYPED_TEST(MultipoleOf, IsItsDefinitionForWhatItDecided) {
  using T = TypeParam;
  constexpr double kTolerance = sizeof(T) == 4 ? 1e-5 : 1e-10;
  for (const test::Shape& shape : kShapes) {
    const Problem<T> problem(shape, 901);
    for (const Inputs<T>& in : problem.all()) {
      const reference::Problem p = test::to_reference(in);
      for (const Clusters& counts : kCounts) {
        SCOPED_TRACE(describe(in) + ", clusters " + std::to_string(*counts.num_clusters));
        for_each_kernel(shape.d, [&](const auto& kernel, const reference::Kernel& expected) {
          const Run run(Multipole<T, std::decay_t<decltype(kernel)>>(counts, kernel), in);
          ASSERT_FALSE(run.saved.exact);
          ASSERT_LE(test::relative_error(run.out, multipole(expected, p, run.fields)), kTolerance);
        });
      }
    }
  }
}

/// Shapes, strides, masks, biases and counts by lot.
TYPED_TEST(MultipoleOf, IsItsDefinitionForRandomProblems) {
  using T = TypeParam;
  int compared = 0;
  for (std::uint64_t seed = 0; seed < 150; ++seed) {
    test::Random random(seed);
    test::RandomProblem<T> problem(random, 150, false, true);
    Inputs<T> in = problem.inputs();
    in.mask.causal = attn::Causal::none;
    const Index clusters = 1 + random.below(20);
    const Clusters counts{
        .num_clusters = clusters, .num_groups = 1 + random.below(20), .num_near = random.below(clusters)};
    SCOPED_TRACE("seed " + std::to_string(seed) + ": " + problem.text());
    for_each_kernel(in.q.cols(), [&](const auto& kernel, const reference::Kernel& expected) {
      const Run run(Multipole<T, std::decay_t<decltype(kernel)>>(counts, kernel), in);
      const reference::Problem p = test::to_reference(in);
      const reference::Matrix out = run.saved.exact ? attend(expected, p).out : multipole(expected, p, run.fields);
      EXPECT_LE(test::relative_error(run.out, out), sizeof(T) == 4 ? 1e-5 : 1e-10);
      compared += run.saved.exact ? 0 : 1;
    });
  }
  EXPECT_GE(compared, 150);
}

TYPED_TEST(MultipoleOf, ObeysItsCounts) {
  using T = TypeParam;
  const Problem<T> problem({130, 210, 16, 12}, 902);
  for (const Inputs<T>& in : problem.all()) {
    const reference::Problem p = test::to_reference(in);
    for (const Clusters& counts : kCounts) {
      const Run run(Multipole<T>(counts), in);
      EXPECT_EQ(static_cast<Index>(run.fields.clusters.size()), *counts.num_clusters);
      expect_parts(run.fields.clusters, 210, [&](Index j) { return key_kept(p, j); });
      std::vector<std::vector<Index>> groups;
      for (const auto& block : run.fields.blocks) {
        if (groups.empty() || groups.back() != block.group) groups.push_back(block.group);
        EXPECT_EQ(static_cast<Index>(block.near.size()), *counts.num_near);
        EXPECT_TRUE(std::is_sorted(block.near.begin(), block.near.end()));
      }
      expect_parts(groups, 130, [&](Index i) { return reference::kept(in.mask.keep_query, i); });
      const auto kept = std::accumulate(groups.begin(), groups.end(), Index{0}, [](Index sum, const auto& group) {
        return sum + static_cast<Index>(group.size());
      });
      EXPECT_EQ(static_cast<Index>(groups.size()), std::min(*counts.num_groups, kept));
    }
  }
}

/// Rows in so many parts, each cut of them along an axis of its own and in a gap, half as wide as the gap before: any
/// direction near the principal one finds these parts.
void separate(Matrix<double>& x, const std::vector<Index>& rows, Index parts, double size, Index axis) {
  if (parts <= 1) return;
  const auto cut = static_cast<std::ptrdiff_t>(static_cast<Index>(rows.size()) * (parts / 2) / parts);
  const std::vector<Index> first(rows.begin(), rows.begin() + cut), second(rows.begin() + cut, rows.end());
  for (const Index i : first) x(i, axis) -= size;
  for (const Index i : second) x(i, axis) += size;
  separate(x, first, parts / 2, size / 2, axis + 1);
  separate(x, second, parts - parts / 2, size / 2, axis + 1);
}

/// n rows of 8 features, in so many parts that are found without near ties; which rows is drawn by lot.
Matrix<double> separated(Index n, Index parts, std::uint64_t seed) {
  test::Random random(seed);
  Matrix<double> x = 0.05 * random.normal(n, 8);
  std::vector<Index> rows(static_cast<std::size_t>(n));
  std::iota(rows.begin(), rows.end(), Index{0});
  for (std::size_t i = rows.size(); i > 1; --i)
    std::swap(rows[i - 1], rows[static_cast<std::size_t>(random.below(static_cast<Index>(i)))]);
  separate(x, rows, parts, 3, 0);
  return x;
}

constexpr Clusters kSeparated{.num_clusters = 11, .num_groups = 3, .num_near = 3};

template <class T>
Tokens<T> separated_tokens(std::uint64_t seed) {
  test::Random random(seed);
  return {separated(60, *kSeparated.num_groups, seed + 1).cast<T>(),
          separated(180, *kSeparated.num_clusters, seed + 2).cast<T>(), random.normal(180, 6).cast<T>()};
}

/// The oracle's own decisions; none where error terms are so nearly equal that rounding might choose.
template <class T>
std::optional<reference::Fields> decide(const reference::Kernel& kernel, const reference::Problem& p,
                                        const Clusters& counts) {
  const auto all = [](Index n) {
    std::vector<Index> rows(static_cast<std::size_t>(n));
    std::iota(rows.begin(), rows.end(), Index{0});
    return rows;
  };
  reference::Fields fields{.clusters = reference::bisect(p.k, *counts.num_clusters, all(p.k.rows())), .blocks = {}};
  for (const auto& group : reference::bisect(p.q, *counts.num_groups, all(p.q.rows()))) {
    for (auto block : blocks_of<T>(group)) {
      const reference::Vector terms = reference::error_terms(kernel, p, fields, block);
      std::vector<Index> order = all(terms.size());
      std::sort(order.begin(), order.end(), [&](Index a, Index b) { return terms[a] > terms[b]; });
      const auto near = static_cast<std::size_t>(*counts.num_near);
      if (terms[order[near - 1]] < 1.001 * terms[order[near]]) return {};
      block.near = part_of(order, 0, *counts.num_near);
      fields.blocks.push_back(block);
    }
  }
  return fields;
}

/// Cuts lie in gaps, so that the oracle's decisions are the library's unless error terms are nearly tied.
TYPED_TEST(MultipoleOf, DecidesAsDefinedWhereNothingIsNearlyTied) {
  using T = TypeParam;
  int compared = 0;
  for (const std::uint64_t seed : {911U, 912U, 913U, 914U}) {
    const Tokens<T> x = separated_tokens<T>(seed);
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
    const reference::Problem p = test::to_reference(in);
    for_each_kernel(8, [&](const auto& kernel, const reference::Kernel& expected) {
      const Run run(Multipole<T, std::decay_t<decltype(kernel)>>(kSeparated, kernel), in);
      const auto fields = decide<T>(expected, p, kSeparated);
      if (!fields) return;
      ++compared;
      EXPECT_EQ(run.fields.clusters, fields->clusters);
      EXPECT_LE(test::relative_error(run.out, multipole(expected, p, *fields)), sizeof(T) == 4 ? 1e-5 : 1e-10) << seed;
    });
  }
  EXPECT_GE(compared, 10) << "of 16";
}

TYPED_TEST(MultipoleOf, IsExactWhereEveryClusterIsNearOrEveryKeyAClusterOrEveryQueryAGroup) {
  using T = TypeParam;
  constexpr double kTolerance = sizeof(T) == 4 ? 2e-6 : 1e-12;
  for (const test::Shape& shape : {test::Shape{70, 90, 16, 12}, {61, 61, 1, 1}, {5, 300, 33, 3}}) {
    const Problem<T> problem(shape, 921);
    for (const Inputs<T>& in : problem.all()) {
      SCOPED_TRACE(describe(in));
      const reference::Problem p = test::to_reference(in);
      for (const Clusters& counts : {Clusters{.num_clusters = 16, .num_groups = 3, .num_near = 16},
                                     Clusters{.num_clusters = 16, .num_groups = 3, .num_near = 1000},
                                     Clusters{.num_clusters = 1000, .num_groups = 3, .num_near = 0},
                                     Clusters{.num_clusters = 8, .num_groups = 1000, .num_near = 0},
                                     Clusters{.num_clusters = 8, .num_groups = 1000, .num_near = 3},
                                     Clusters{.num_clusters = 1, .num_groups = 1000, .num_near = 0}}) {
        for_each_kernel(shape.d, [&](const auto& kernel, const reference::Kernel& expected) {
          const Multipole<T, std::decay_t<decltype(kernel)>> method(counts, kernel);
          EXPECT_LE(test::relative_error(forward(method, in), attend(expected, p).out), kTolerance);
        });
      }
    }
  }
}

/// Clusters of keys that are all alike are exact too, far or near.
TYPED_TEST(MultipoleOf, IsExactWhereAClustersKeysAreAllAlike) {
  using T = TypeParam;
  Tokens<T> x = test::make_tokens<T>(Family::unit, {100, 200, 8, 5}, 931);
  for (Index j = 2; j < 200; ++j) x.k.row(j) = x.k.row(j % 2);
  const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
  for (const Index near : {0, 1}) {
    const Multipole<T> method({.num_clusters = 2, .num_groups = 2, .num_near = near});
    EXPECT_LE(
        test::relative_error(forward(method, in), attend(reference::softmax_kernel(8), test::to_reference(in)).out),
        sizeof(T) == 4 ? 2e-6 : 1e-12);
  }
}

/// Equal keys have equal places, so that clusters are runs of rows.
TYPED_TEST(MultipoleOf, OfEqualKeysIsTheMeanOfTheValues) {
  using T = TypeParam;
  Tokens<T> x = test::make_tokens<T>(Family::unit, {50, 96, 8, 5}, 932);
  for (const T value : {T(0), T(-3)}) {
    x.k.setConstant(value);
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
    const Run run(Multipole<T>({.num_clusters = 8, .num_groups = 2, .num_near = 2}), in);
    EXPECT_LE(test::relative_error(run.out, x.v.template cast<double>().colwise().mean().replicate(50, 1)),
              sizeof(T) == 4 ? 2e-6 : 1e-13);
    for (std::size_t c = 0; c < 8; ++c) {
      ASSERT_EQ(run.fields.clusters[c].size(), 12U);
      EXPECT_EQ(run.fields.clusters[c].front(), static_cast<Index>(12 * c));
      EXPECT_EQ(run.fields.clusters[c].back(), static_cast<Index>(12 * c + 11));
    }
  }
}

/// Inputs that are hard to sum up: besides the families, keys in two far clusters, one huge key, one far outlier, large
/// scores, and one token.
template <class T>
std::vector<Tokens<T>> adversarial() {
  std::vector<Tokens<T>> all;
  const test::Shape shape{90, 150, 12, 7};
  for (const Family family : test::kFamilies) all.push_back(test::make_tokens<T>(family, shape, 941));
  const Tokens<T> unit = all.front();
  all.push_back(unit);
  all.back().k.topRows(80).array() += T(1000);
  all.back().k.bottomRows(70).array() -= T(1000);
  for (const T size : {T(1e3), T(1e15)}) {
    all.push_back(unit);
    all.back().k.row(41) *= size;
    all.push_back(unit);
    all.back().q.row(17) *= size;
    all.push_back(test::scaled(unit, static_cast<double>(size)));
  }
  all.push_back(unit);
  all.back().v.row(77) *= T(1e6);
  all.push_back(unit);
  all.back().k.setConstant(T(2));
  all.push_back(unit);
  all.back().q.setZero();
  all.push_back(test::make_tokens<T>(Family::unit, {90, 1, 12, 7}, 942));
  all.push_back(test::make_tokens<T>(Family::unit, {1, 150, 12, 7}, 943));
  all.push_back(test::make_tokens<T>(Family::unit, {90, 150, 1, 1}, 944));
  all.push_back(test::make_tokens<T>(Family::self, {90, 150, 300, 2}, 945));
  return all;
}

constexpr Clusters kMany[] = {{.num_clusters = 8, .num_groups = 3, .num_near = 2},
                              {.num_clusters = 149, .num_groups = 30, .num_near = 148},
                              {.num_clusters = 40, .num_groups = 1, .num_near = 0},
                              {.num_clusters = 1, .num_groups = 1, .num_near = 0}};

/// What rounding may add to a mean of values by positive weights: half an epsilon for each term of its two sums, and as
/// much for those of a summary that is a term of them.
template <class T>
double rounding_of_means(const reference::Matrix& v) {
  return 2 * static_cast<double>(v.rows()) * static_cast<double>(std::numeric_limits<T>::epsilon()) *
         v.cwiseAbs().maxCoeff();
}

TYPED_TEST(MultipoleOf, LeavesNotTheRangeOfTheKeptValues) {
  using T = TypeParam;
  for (const Tokens<T>& x : adversarial<T>()) {
    const auto keep = test::random_keep(x.k.rows(), 0.8, 946);
    for (const Mask& mask : {Mask{}, Mask{.keep_key = keep}}) {
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask};
      const reference::Matrix v = reference::kept_rows(x.v.template cast<double>(), mask.keep_key);
      const double rounding = rounding_of_means<T>(v);
      for (const Clusters& counts : kMany) {
        for (const bool gaussian : {false, true}) {
          const Matrix<T> out = gaussian ? forward(Multipole<T, GaussianKernel>(counts, {.rows = Rows::normalized}), in)
                                         : forward(Multipole<T>(counts), in);
          ASSERT_TRUE(out.allFinite()) << describe(in);
          for (Index c = 0; c < v.cols(); ++c) {
            ASSERT_LE(static_cast<double>(out.col(c).maxCoeff()), v.col(c).maxCoeff() + rounding) << describe(in);
            ASSERT_GE(static_cast<double>(out.col(c).minCoeff()), v.col(c).minCoeff() - rounding) << describe(in);
          }
        }
      }
    }
  }
}

TYPED_TEST(MultipoleOf, GivesBackValuesThatAreAllTheSame) {
  using T = TypeParam;
  for (Tokens<T> x : adversarial<T>()) {
    x.v.rowwise() = x.v.row(0).eval();
    const reference::Matrix expected = x.v.template cast<double>().row(0).replicate(x.q.rows(), 1);
    for (const Clusters& counts : kMany) {
      const Matrix<T> out = forward(Multipole<T>(counts), {.q = x.q, .k = x.k, .v = x.v});
      EXPECT_LE((out.template cast<double>() - expected).cwiseAbs().maxCoeff(),
                rounding_of_means<T>(x.v.template cast<double>()));
    }
  }
}

TYPED_TEST(MultipoleOf, AShiftOfAllKeysChangesNothing) {
  using T = TypeParam;
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  const Tokens<T> x = separated_tokens<T>(951);
  const Multipole<T> method(kSeparated);
  const Run before(method, {.q = x.q, .k = x.k, .v = x.v});
  for (const double size : {1.0, 30.0, 0.01 / epsilon}) {
    const Matrix<T> shift = (size * test::Random(952).normal(1, 8)).template cast<T>();
    const Matrix<T> k = x.k.rowwise() + shift.row(0);
    const Run after(method, {.q = x.q, .k = k, .v = x.v});
    EXPECT_EQ(after.fields.clusters, before.fields.clusters) << size;
    if (size > 100) continue;  // beyond, scores keep few digits
    EXPECT_LE(test::relative_error(after.out, before.out.template cast<double>()), 200 * epsilon * (1 + size)) << size;
  }
}

/// Distances are all that a Gaussian kernel knows.
TYPED_TEST(MultipoleOf, AShiftOfAllTokensChangesNothingForAGaussian) {
  using T = TypeParam;
  const double epsilon = static_cast<double>(std::numeric_limits<T>::epsilon());
  const Tokens<T> x = separated_tokens<T>(953);
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const Multipole<T, GaussianKernel> method(kSeparated, {.rows = rows});
    const Matrix<T> before = forward(method, {.q = x.q, .k = x.k, .v = x.v});
    for (const double size : {1.0, 100.0, 1000.0}) {
      const Matrix<T> shift = (size * test::Random(954).normal(1, 8)).template cast<T>();
      const Matrix<T> q = x.q.rowwise() + shift.row(0), k = x.k.rowwise() + shift.row(0);
      EXPECT_LE(test::relative_error(forward(method, {.q = q, .k = k, .v = x.v}), before.template cast<double>()),
                200 * epsilon * (1 + size))
          << size;
    }
  }
}

/// Bit by bit: what is dropped takes no part in anything.
TYPED_TEST(MultipoleOf, WithMasksIsThatOfTheKeptTokens) {
  using T = TypeParam;
  const Problem<T> problem({140, 200, 12, 9}, 961);
  const auto trimmed = [](const Matrix<T>& m, std::span<const std::uint8_t> keep) -> Matrix<T> {
    return reference::kept_rows(m.template cast<double>(), keep).template cast<T>();
  };
  for (const Inputs<T>& in : problem.all()) {
    if (!in.key_bias.empty()) continue;
    const Matrix<T> q = trimmed(problem.x.q, in.mask.keep_query), k = trimmed(problem.x.k, in.mask.keep_key),
                    v = trimmed(problem.x.v, in.mask.keep_key);
    for_each_kernel(12, [&](const auto& kernel, const auto&) {
      for (const Clusters& counts : kCounts) {
        const Multipole<T, std::decay_t<decltype(kernel)>> method(counts, kernel);
        const Matrix<T> masked = forward(method, in);
        EXPECT_TRUE(test::bitwise_equal(trimmed(masked, in.mask.keep_query), forward(method, {.q = q, .k = k, .v = v})))
            << describe(in) << ", clusters " << *counts.num_clusters;
        for (Index i = 0; i < 140; ++i) {
          const bool is_zero = (masked.row(i).array() == T(0)).all();
          EXPECT_TRUE(is_zero || reference::kept(in.mask.keep_query, i)) << i;
        }
      }
    });
  }
}

TYPED_TEST(MultipoleOf, ABiasOfMinusInfinityDropsAKey) {
  using T = TypeParam;
  const Problem<T> problem({140, 200, 12, 9}, 962);
  std::vector<T> bias(200, T(0));
  for (std::size_t j = 0; j < 200; ++j) bias[j] = problem.keep_key[j] == 0 ? -test::kInf<T> : T(0);
  Inputs<T> by_mask = problem.plain(), by_bias = problem.plain();
  by_mask.mask.keep_key = problem.keep_key;
  by_bias.key_bias = bias;
  for_each_kernel(12, [&](const auto& kernel, const auto&) {
    const Multipole<T, std::decay_t<decltype(kernel)>> method({.num_clusters = 9, .num_groups = 3, .num_near = 2},
                                                              kernel);
    EXPECT_LE(test::relative_error(forward(method, by_bias), forward(method, by_mask).template cast<double>()),
              test::kExactTolerance<T>);
  });
}

TYPED_TEST(MultipoleOf, AllTokensButOneOrAllAreDropped) {
  using T = TypeParam;
  const Problem<T> problem({90, 150, 12, 7}, 963);
  std::vector<std::uint8_t> one_query(90, 0), one_key(150, 0);
  const std::vector<std::uint8_t> no_query = one_query, no_key = one_key;
  one_query[33] = one_key[71] = 1;
  for_each_kernel(12, [&](const auto& kernel, const reference::Kernel& expected) {
    for (const Clusters& counts : kMany) {
      const Multipole<T, std::decay_t<decltype(kernel)>> method(counts, kernel);
      Inputs<T> in = problem.plain();
      in.mask = {.keep_key = one_key};
      EXPECT_LE(test::relative_error(forward(method, in), attend(expected, test::to_reference(in)).out),
                sizeof(T) == 4 ? 2e-6 : 1e-12);
      in.mask = {.keep_query = one_query};
      EXPECT_LE(test::relative_error(forward(method, in), attend(expected, test::to_reference(in)).out),
                sizeof(T) == 4 ? 2e-6 : 1e-12)
          << "the landmark is the query";
      for (const Mask& mask :
           {Mask{.keep_key = no_key}, Mask{.keep_query = no_query}, Mask{.keep_key = no_key, .keep_query = no_query}}) {
        in.mask = mask;
        EXPECT_TRUE((forward(method, in).array() == T(0)).all());
      }
    }
  });
}

TYPED_TEST(MultipoleOf, ComesCloserWithMoreNearClusters) {
  using T = TypeParam;
  for (const Family family : {Family::unit, Family::smooth, Family::clusters}) {
    const Tokens<T> x = test::make_tokens<T>(family, {400, 500, 16, 12}, 971);
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
    const reference::Matrix exact = attend(reference::softmax_kernel(16), test::to_reference(in)).out;
    double before = 1;
    for (const Index near : {0, 4, 8, 16, 24, 31}) {
      const Multipole<T> method({.num_clusters = 32, .num_groups = 10, .num_near = near});
      const double error = test::relative_error(forward(method, in), exact);
      EXPECT_LE(error, near == 0 ? 1 : 0.95 * before) << near << " near";
      before = error;
    }
  }
}

template <class T>
double error_of_other_rows(const Matrix<T>& out, const reference::Matrix& exact, Index row) {
  reference::Matrix difference = out.template cast<double>() - exact;
  difference.row(row).setZero();
  return difference.norm() / exact.norm();
}

/// It belongs to a group, but not to the group's mean, and its error terms do not count.
TYPED_TEST(MultipoleOf, AQueryThatIsNotFiniteReachesItsOwnRowAlone) {
  using T = TypeParam;
  const Tokens<T> x = test::make_tokens<T>(Family::smooth, {300, 400, 16, 12}, 981);
  const reference::Matrix exact =
      attend(reference::softmax_kernel(16), test::to_reference<T>({.q = x.q, .k = x.k, .v = x.v})).out;
  for (const Clusters& counts : {Clusters{.num_clusters = 32, .num_groups = 8, .num_near = 8},
                                 Clusters{.num_clusters = 32, .num_groups = 1, .num_near = 8}}) {
    const Multipole<T> method(counts);
    for (const Index row : {0, 120, 299}) {
      const double clean = error_of_other_rows(forward(method, {.q = x.q, .k = x.k, .v = x.v}), exact, row);
      for (const T poison : {test::kNaN<T>, test::kInf<T>, -test::kInf<T>, std::numeric_limits<T>::max()}) {
        for (const bool everywhere : {false, true}) {
          Matrix<T> q = x.q;
          if (everywhere) q.row(row).setConstant(poison);
          q(row, 5) = poison;
          const Matrix<T> out = forward(method, {.q = q, .k = x.k, .v = x.v});
          EXPECT_LE(error_of_other_rows(out, exact, row), 1.2 * clean) << "row " << row << " of " << poison;
          EXPECT_TRUE(!std::isnan(poison) || out.row(row).array().isNaN().all()) << "row " << row;
        }
      }
    }
  }
}

TYPED_TEST(MultipoleOf, ANaNInAKeyReachesEveryRow) {
  using T = TypeParam;
  Tokens<T> x = test::make_tokens<T>(Family::smooth, {130, 200, 16, 12}, 982);
  const auto keep = test::random_keep(130, 0.8, 983);
  for (const Index row : {0, 77, 199}) {
    Matrix<T> k = x.k;
    k(row, 3) = test::kNaN<T>;
    for (const Clusters& counts : kCounts) {
      const Inputs<T> in{.q = x.q, .k = k, .v = x.v, .mask = {.keep_query = keep}};
      const Matrix<T> out = forward(Multipole<T>(counts), in);
      for (Index i = 0; i < 130; ++i) {
        if (reference::kept(keep, i)) {
          ASSERT_TRUE(out.row(i).array().isNaN().all()) << "row " << i << ", clusters " << *counts.num_clusters;
        } else {
          ASSERT_TRUE((out.row(i).array() == T(0)).all()) << "row " << i;
        }
      }
    }
  }
}

TYPED_TEST(MultipoleOf, AValueThatIsNotFiniteStaysInItsColumn) {
  using T = TypeParam;
  const Tokens<T> x = test::make_tokens<T>(Family::smooth, {130, 200, 16, 12}, 984);
  for (const T poison : {test::kNaN<T>, test::kInf<T>}) {
    Matrix<T> v = x.v;
    v(77, 3) = poison;
    for (const Clusters& counts : kCounts) {
      Matrix<T> out = forward(Multipole<T>(counts), {.q = x.q, .k = x.k, .v = v});
      for (Index i = 0; i < 130; ++i) EXPECT_FALSE(std::isfinite(out(i, 3))) << i;
      out.col(3).setZero();
      EXPECT_TRUE(out.allFinite()) << *counts.num_clusters;
    }
  }
}

/// More keys to a cluster than a tile holds, more groups than landmarks fill a strip, and more queries to a group.
TYPED_TEST(MultipoleOf, IsItsDefinitionBeyondTilesAndStrips) {
  using T = TypeParam;
  struct Case {
    test::Shape shape;
    Clusters counts;
  };
  for (const auto& [shape, counts] :
       {Case{{30, 3000, 4, 3}, {.num_clusters = 2, .num_groups = 2, .num_near = 1}},
        Case{{230, 100, 4, 3}, {.num_clusters = 6, .num_groups = 110, .num_near = 2}},
        Case{{400, 100, 4, 3}, {.num_clusters = 6, .num_groups = 1, .num_near = 2}},
        Case{{60, 1500, 4, 3}, {.num_clusters = 700, .num_groups = 2, .num_near = 300}}}) {
    const Problem<T> problem(shape, 991);
    const Run run(Multipole<T>(counts), problem.plain());
    const reference::Problem p = test::to_reference(problem.plain());
    EXPECT_LE(test::relative_error(run.out, multipole(reference::softmax_kernel(4), p, run.fields)),
              sizeof(T) == 4 ? 1e-5 : 1e-10)
        << describe(problem.plain());
  }
}

template <class To, class From>
Tokens<To> in_type(const Tokens<From>& x) {
  return {x.q.template cast<To>(), x.k.template cast<To>(), x.v.template cast<To>()};
}

template <class T>
class NarrowMultipole : public ::testing::Test {};
TYPED_TEST_SUITE(NarrowMultipole, test::NarrowScalars);

TYPED_TEST(NarrowMultipole, IsThatOfFloatRoundedOnce) {
  using T = TypeParam;
  const auto x = test::make_tokens<float>(Family::smooth, {130, 210, 16, 12}, 992);
  const Tokens<T> narrow = in_type<T>(x);
  const Tokens<float> wide = in_type<float>(narrow);
  for_each_kernel(16, [&](const auto& kernel, const auto&) {
    using Kernel = std::decay_t<decltype(kernel)>;
    for (const Clusters& counts : kCounts) {
      Matrix<T> out(130, 12);
      Context context;
      Multipole<T, Kernel>(counts, kernel).forward({.q = narrow.q, .k = narrow.k, .v = narrow.v}, out, context);
      const Multipole<float, Kernel> of_float(counts, kernel);
      EXPECT_TRUE(out == forward(of_float, {.q = wide.q, .k = wide.k, .v = wide.v}).template cast<T>());
    }
  });
}

/// A training step.
template <class T, class Kernel>
struct Step : Run<T, Kernel> {
  Step(const Multipole<T, Kernel>& method, const Inputs<T>& in, const Matrix<T>& dout, Context with = {})
      : Run<T, Kernel>(method, in, std::move(with)), gradients{in.q, in.k, in.v} {
    method.backward(in, this->out, dout, this->saved, {gradients.q, gradients.k, gradients.v}, this->context);
  }

  Tokens<T> gradients;
};

template <class T>
Matrix<T> random_dout(const Inputs<T>& in) {
  return test::Random(1001).normal(in.q.rows(), in.v.cols()).template cast<T>();
}

/// The derivative at 0 of a smooth f, by five points.
double derivative(const std::function<double(double)>& f) {
  constexpr double kStep = 1e-3;
  return (8 * (f(kStep) - f(-kStep)) - (f(2 * kStep) - f(-2 * kStep))) / (12 * kStep);
}

/// Along random directions of q, k and v the gradients are those of loss, to a tolerance of what such a direction has
/// in the mean.
template <class T>
void expect_gradients(const std::function<double(const reference::Problem&)>& loss, const reference::Problem& p,
                      const Tokens<T>& gradients, double tolerance) {
  test::Random random(1002);
  const auto expect = [&](const char* name, reference::Matrix reference::Problem::*part, const Matrix<T>& gradient) {
    const reference::Matrix direction = random.normal(gradient.rows(), gradient.cols());
    const reference::Matrix found = gradient.template cast<double>();
    const double expected = derivative([&](double step) {
      reference::Problem moved = p;
      moved.*part += step * direction;
      return loss(moved);
    });
    EXPECT_NEAR(found.cwiseProduct(direction).sum(), expected, tolerance * found.norm()) << "by " << name;
  };
  expect("q", &reference::Problem::q, gradients.q);
  expect("k", &reference::Problem::k, gradients.k);
  expect("v", &reference::Problem::v, gradients.v);
}

/// What was decided being constant: the oracle's differences are for the decisions that the pass saved.
TYPED_TEST(MultipoleOf, GradientsAreTheDerivatives) {
  using T = TypeParam;
  for (const test::Shape& shape : {test::Shape{60, 45, 7, 5}, test::Shape{33, 90, 16, 3}, test::Shape{61, 61, 1, 1}}) {
    const Problem<T> problem(shape, 1003);
    for (const Inputs<T>& in : problem.all()) {
      const reference::Problem p = test::to_reference(in);
      const Matrix<T> dout = random_dout<T>(in);
      for (const Clusters& counts : kCounts) {
        SCOPED_TRACE(describe(in) + ", clusters " + std::to_string(*counts.num_clusters));
        for_each_kernel(shape.d, [&](const auto& kernel, const reference::Kernel& expected) {
          const Step step(Multipole<T, std::decay_t<decltype(kernel)>>(counts, kernel), in, dout);
          const auto loss = [&](const reference::Problem& moved) {
            return multipole(expected, moved, step.fields).cwiseProduct(dout.template cast<double>()).sum();
          };
          expect_gradients<T>(loss, p, step.gradients, sizeof(T) == 4 ? 2e-5 : 1e-8);
        });
      }
    }
  }
}

template <class T>
void expect_near(const Tokens<T>& found, const reference::Gradients& expected, double tolerance) {
  const auto expect = [&](const Matrix<T>& a, const reference::Matrix& b, const char* name) {
    EXPECT_LE((a.template cast<double>() - b).norm(), tolerance * (1 + b.norm())) << name;
  };
  expect(found.q, expected.dq, "dq");
  expect(found.k, expected.dk, "dk");
  expect(found.v, expected.dv, "dv");
}

/// Where every query is a group of its own, the landmark moves with it, and the gradients are exact as the result is.
TYPED_TEST(MultipoleOf, GradientsAreThoseOfExactAttentionWhereTheResultIs) {
  using T = TypeParam;
  for (const test::Shape& shape : {test::Shape{50, 70, 16, 12}, {33, 33, 1, 1}}) {
    const Problem<T> problem(shape, 1004);
    for (const Inputs<T>& in : problem.all()) {
      const reference::Problem p = test::to_reference(in);
      const Matrix<T> dout = random_dout<T>(in);
      for (const Clusters& counts : {Clusters{.num_clusters = 16, .num_groups = 3, .num_near = 16},
                                     Clusters{.num_clusters = 1000, .num_groups = 3, .num_near = 0},
                                     Clusters{.num_clusters = 8, .num_groups = 1000, .num_near = 0},
                                     Clusters{.num_clusters = 8, .num_groups = 1000, .num_near = 3}}) {
        SCOPED_TRACE(describe(in) + ", clusters " + std::to_string(*counts.num_clusters));
        for_each_kernel(shape.d, [&](const auto& kernel, const reference::Kernel& expected) {
          const Step step(Multipole<T, std::decay_t<decltype(kernel)>>(counts, kernel), in, dout);
          expect_near<T>(step.gradients, attend_backward(expected, p, dout.template cast<double>()),
                         sizeof(T) == 4 ? 2e-5 : 1e-11);
        });
      }
    }
  }
}

/// All clusters near but one, which has two keys that lie close together.
TYPED_TEST(MultipoleOf, GradientsComeCloseToExactOnesAsClustersShrink) {
  using T = TypeParam;
  const Problem<T> problem({60, 96, 16, 5}, 1005);
  const Inputs<T> in = problem.plain();
  const Matrix<T> dout = random_dout<T>(in);
  const auto exact =
      attend_backward(reference::softmax_kernel(16), test::to_reference(in), dout.template cast<double>());
  const auto error = [&](const Clusters& counts) {
    const Step step(Multipole<T>(counts), in, dout);
    return std::vector<double>{test::relative_error(step.gradients.q, exact.dq),
                               test::relative_error(step.gradients.k, exact.dk),
                               test::relative_error(step.gradients.v, exact.dv)};
  };
  const auto coarse = error({.num_clusters = 6, .num_groups = 4, .num_near = 1}),
             fine = error({.num_clusters = 48, .num_groups = 4, .num_near = 24}),
             finest = error({.num_clusters = 95, .num_groups = 4, .num_near = 94});
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_LE(fine[i], 0.5 * coarse[i]) << i;
    EXPECT_LE(finest[i], 0.5 * fine[i]) << i;
    EXPECT_LE(finest[i], 0.02) << i;
  }
}

TYPED_TEST(MultipoleOf, BitwiseEqualWhateverTheWorkers) {
  using T = TypeParam;
  for (const auto& [n_q, counts] :
       {std::pair<Index, Clusters>{500, {.num_clusters = 40, .num_groups = 60, .num_near = 5}},
        {300, {.num_clusters = 7, .num_groups = 2, .num_near = 2}}}) {
    const Problem<T> problem({n_q, 450, 12, 9}, 1006);
    const Inputs<T> in = problem.all().back();
    const Matrix<T> dout = random_dout<T>(in);
    for_each_kernel(12, [&, n = counts](const auto& kernel, const auto&) {
      const Multipole<T, std::decay_t<decltype(kernel)>> method(n, kernel);
      const Step expected(method, in, dout);
      EXPECT_TRUE(expected.gradients.k.allFinite());
      for (const int workers : {1, 2, 3, 5}) {
        const Step found(method, in, dout, Context{test::Threads{.count = workers}});
        EXPECT_TRUE(test::bitwise_equal(found.out, expected.out)) << workers;
        EXPECT_TRUE(test::bitwise_equal(found.gradients.q, expected.gradients.q)) << workers;
        EXPECT_TRUE(test::bitwise_equal(found.gradients.k, expected.gradients.k)) << workers;
        EXPECT_TRUE(test::bitwise_equal(found.gradients.v, expected.gradients.v)) << workers;
        EXPECT_TRUE(test::bitwise_equal(forward(method, in), expected.out)) << "without saving";
      }
    });
  }
}

/// Clusters of a key head are built once for all query heads that share it.
TYPED_TEST(MultipoleOf, HeadsThatShareKeysGetWhatEachHeadGetsAlone) {
  using T = TypeParam;
  constexpr Index kHeads = 5, kQueries = 70, kKeys = 120, kDim = 12;
  const Tokens<T> x = test::make_tokens<T>(Family::smooth, {kHeads * kQueries, kKeys, kDim, kDim}, 1010);
  const auto keep_key = test::random_keep(kKeys, 0.8, 1011), keep_query = test::random_keep(kQueries, 0.8, 1012);
  const auto view = [](auto* data, Index heads, Index n) { return attn::head_major(data, 1, heads, n, kDim); };
  for_each_kernel(kDim, [&](const auto& kernel, const auto&) {
    for (const Clusters& counts : {Clusters{}, kCounts[0], kCounts[5]}) {
      for (const Mask& mask : {Mask{}, Mask{.keep_key = keep_key, .keep_query = keep_query},
                               Mask{.causal = attn::Causal::lower_right, .keep_key = keep_key}}) {
        const Multipole<T, std::decay_t<decltype(kernel)>> method(counts, kernel);
        EXPECT_EQ(method.prepares_keys(kQueries, kKeys), !(counts == Clusters{}));
        for (const int workers : {1, 2, 3}) {
          Context context{test::Threads{.count = workers}};
          Matrix<T> out = Matrix<T>::Constant(kHeads * kQueries, kDim, T(-7));
          attn::multi_head(method, view(x.q.data(), kHeads, kQueries), view(x.k.data(), 1, kKeys),
                           view(x.v.data(), 1, kKeys), view(out.data(), kHeads, kQueries), mask, context);
          for (Index h = 0; h < kHeads; ++h) {
            const Matrix<T> q = x.q.middleRows(h * kQueries, kQueries);
            EXPECT_TRUE(test::bitwise_equal<T>(out.middleRows(h * kQueries, kQueries),
                                               forward(method, {.q = q, .k = x.k, .v = x.v, .mask = mask})))
                << h << " of " << workers << " workers";
          }
        }
      }
    }
  });
}

TYPED_TEST(MultipoleOf, GradientsStayFiniteOnHardInputs) {
  using T = TypeParam;
  for (const Tokens<T>& x : adversarial<T>()) {
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
    for (const Clusters& counts : kMany) {
      const auto finite = [](const auto& step) {
        return step.gradients.q.allFinite() && step.gradients.k.allFinite() && step.gradients.v.allFinite();
      };
      EXPECT_TRUE(finite(Step(Multipole<T>(counts), in, random_dout(in)))) << describe(in);
      const Multipole<T, GaussianKernel> gaussian(counts, {.rows = Rows::normalized});
      EXPECT_TRUE(finite(Step(gaussian, in, random_dout(in)))) << describe(in);
    }
  }
}

TYPED_TEST(NarrowMultipole, GradientsFollowThoseOfFloat) {
  using T = TypeParam;
  const auto x = test::make_tokens<float>(Family::smooth, {90, 110, 16, 8}, 1007);
  const Tokens<T> narrow = in_type<T>(x);
  const Tokens<float> wide = in_type<float>(narrow);
  const Multipole<T> method(kCounts[0]);
  const Multipole<float> of_float(kCounts[0]);
  const Inputs<T> in{.q = narrow.q, .k = narrow.k, .v = narrow.v};
  const Inputs<float> wide_in{.q = wide.q, .k = wide.k, .v = wide.v};
  const Matrix<T> dout = random_dout<T>(in);
  const Matrix<float> wide_dout = dout.template cast<float>();
  const Step found(method, in, dout);
  const Step expected(of_float, wide_in, wide_dout);
  const double tolerance = std::is_same_v<T, Eigen::half> ? 2e-2 : 1.6e-1;  // out, which slopes rest on, is rounded too
  const auto error = [](const Matrix<T>& a, const Matrix<float>& b) {
    return test::relative_error<float>(a.template cast<float>(), b.template cast<double>());
  };
  EXPECT_LE(error(found.gradients.q, expected.gradients.q), tolerance);
  EXPECT_LE(error(found.gradients.k, expected.gradients.k), tolerance);
  EXPECT_LE(error(found.gradients.v, expected.gradients.v), tolerance);
}

/// With counts that are not set, few tokens get exact attention, and many an approximation that is close to it.
TYPED_TEST(MultipoleOf, NeedsNoCounts) {
  using T = TypeParam;
  for (const Index n : {1, 7, 60, 300, 2000}) {
    const Tokens<T> x = test::make_tokens<T>(Family::smooth, {n, n, 16, 4}, 1008);
    const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
    const reference::Matrix exact = attend(reference::softmax_kernel(16), test::to_reference(in)).out;
    EXPECT_LE(test::relative_error(forward(Multipole<T>{}, in), exact), n <= 60 ? test::kExactTolerance<T> : 0.05) << n;
  }
}

TEST(Multipole, RefusesWhatItCannotDo) {
  const Matrix<float> x = Matrix<float>::Zero(6, 4);
  const auto error = [&](const Clusters& counts, double scale = 1) {
    return test::error_of([&] { attn::attention(Multipole<float>(counts, {.scale = scale}), x, x, x); });
  };
  EXPECT_EQ(error({}), "no error");
  EXPECT_EQ(error({.num_clusters = 1, .num_groups = 1, .num_near = 0}), "no error");
  EXPECT_EQ(error({.num_clusters = 0}), "multipole: num_clusters is 0, should be at least 1");
  EXPECT_EQ(error({.num_groups = -2}), "multipole: num_groups is -2, should be at least 1");
  EXPECT_EQ(error({.num_near = -1}), "multipole: num_near is -1, should be at least 0");
  EXPECT_EQ(error({}, test::kNaN<double>), "multipole: scale is nan, should be finite");
}

TEST(Multipole, BackwardRefusesWhatWasSavedOfOtherInputsOrOptions) {
  const Problem<float> problem({12, 14, 4, 3}, 1009);
  const Inputs<float> in = problem.plain();
  const auto error = [&](const auto& then, const auto& now, const Inputs<float>& saved_of, const Inputs<float>& given) {
    typename std::decay_t<decltype(now)>::Saved saved;
    Matrix<float> out(saved_of.q.rows(), 3), dq(given.q), dk(given.k), dv(given.v);
    Context context;
    then.forward(saved_of, out, context, saved);
    const Matrix<float> dout = Matrix<float>::Ones(given.q.rows(), 3);
    return test::error_of([&] { now.backward(given, dout, dout, saved, {dq, dk, dv}, context); });
  };
  const Clusters few{.num_clusters = 3, .num_groups = 2, .num_near = 1};
  const Multipole<float> method(few);
  EXPECT_EQ(error(method, method, in, in), "no error");
  const std::string others = "multipole: saved is of a forward pass with other options";
  for (const Clusters& other :
       {Clusters{}, Clusters{.num_clusters = 4, .num_groups = 2, .num_near = 1},
        Clusters{.num_clusters = 3, .num_groups = 3, .num_near = 1},
        Clusters{.num_clusters = 3, .num_groups = 2, .num_near = 2}, Clusters{.num_clusters = 20}}) {
    EXPECT_EQ(error(Multipole<float>(other), method, in, in), others);
    EXPECT_EQ(error(method, Multipole<float>(other), in, in), others);
  }
  Inputs<float> masked = in, shorter = in, biased = in;
  masked.mask.keep_key = problem.keep_key;
  biased.key_bias = problem.bias;
  const Matrix<float> q = in.q.topRows(11);
  new (&shorter.q) attn::ConstMatrixRef<float>(q.data(), q.rows(), q.cols(), q.outerStride());
  EXPECT_EQ(error(method, method, masked, in), "multipole: saved is of a forward pass with another mask");
  EXPECT_EQ(error(method, method, in, masked), "multipole: saved is of a forward pass with another mask");
  EXPECT_NE(error(method, method, biased, in), "no error");
  EXPECT_EQ(error(method, method, shorter, in),
            "multipole: saved holds 11 rows of q, should hold 12: it is not of a forward pass of these inputs");
  EXPECT_EQ(error(Multipole<float>(few, {.scale = 2.0}), method, in, in),
            "multipole: saved is of a forward pass with scale 2, bias 0 and normalized rows, should be of 0.5, 0 and "
            "normalized");
}

}  // namespace
