/// Multipole attention: against its definition, where it is exact, and what holds whatever it decides.
#include <attn/multipole.hpp>

#include <attn/exact.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numeric>
#include <span>
#include <string>
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
using test::forward;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;
using test::Tokens;

/// A kernel of a user's, whose bias is not half its scale.
struct OwnKernel {
  double scale(Index) const { return 0.3; }
  double bias(Index) const { return 0.1; }
  Rows rows() const { return Rows::raw; }
};

/// body(kernel, the oracle's) for every kernel, for tokens of d features.
template <class Body>
void for_each_kernel(Index d, const Body& body) {
  {
    SCOPED_TRACE("softmax");
    body(SoftmaxKernel{}, reference::softmax_kernel(d));
  }
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    SCOPED_TRACE(rows == Rows::raw ? "Gaussian, raw" : "Gaussian, normalized");
    body(GaussianKernel{.rows = rows}, reference::gaussian_kernel(d, {}, rows == Rows::normalized));
  }
  SCOPED_TRACE("own kernel");
  body(OwnKernel{}, reference::Kernel{.scale = 0.3, .bias = 0.1, .normalized = false});
}

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

/// So many queries of a group share their near clusters, but for a rest that is cut evenly.
template <class T>
constexpr Index kBlock = attn::detail::kTileWidth<T>;

/// What a forward pass decided, as it saved it.
template <class T, class Saved>
reference::Fields fields_of(const Saved& saved) {
  const auto rows = [](const std::vector<Index>& all, Index first, Index last) {
    return std::vector<Index>(all.begin() + first, all.begin() + last);
  };
  reference::Fields fields;
  for (std::size_t c = 0; c + 1 < saved.key_starts.size(); ++c)
    fields.clusters.push_back(rows(saved.keys, saved.key_starts[c], saved.key_starts[c + 1]));
  for (std::size_t g = 0; g + 1 < saved.query_starts.size(); ++g) {
    const Index first = saved.query_starts[g], size = saved.query_starts[g + 1] - first;
    const Index blocks = (size + kBlock<T> - 1) / kBlock<T>;
    for (Index b = 0; b < blocks; ++b) {
      const std::size_t number = fields.blocks.size();
      const Index near = static_cast<Index>(number) * saved.most_near;
      fields.blocks.push_back({rows(saved.queries, first + b * size / blocks, first + (b + 1) * size / blocks),
                               rows(saved.queries, first, first + size),
                               rows(saved.near, near, near + saved.near_count[number])});
    }
  }
  EXPECT_EQ(fields.blocks.size(), saved.near_count.size());
  return fields;
}

/// A forward pass and what it decided.
template <class T, class Kernel>
struct Run {
  Run(const Multipole<T, Kernel>& method, const Inputs<T>& in) : out(in.q.rows(), in.v.cols()) {
    Context context;
    method.forward(in, out, context, saved);
    if (!saved.exact) fields = fields_of<T>(saved);
  }

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

constexpr test::Shape kShapes[] = {{130, 210, 16, 12}, {61, 61, 1, 1}, {40, 300, 33, 17}, {300, 40, 3, 5},
                                   {20, 90, 300, 4}};
constexpr Clusters kCounts[] = {{.num_clusters = 8, .num_groups = 3, .num_near = 2},
                                {.num_clusters = 5, .num_groups = 4, .num_near = 0},
                                {.num_clusters = 13, .num_groups = 7, .num_near = 5},
                                {.num_clusters = 1, .num_groups = 1, .num_near = 0},
                                {.num_clusters = 2, .num_groups = 1000, .num_near = 1}};

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

}  // namespace
