/// Multipole attention of some groups of queries at a time, with any numbers of open branches and near clusters: how
/// the cheapest ones that will do are found. Clusters, groups and what regions know of branches are made once.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/detail/cluster_summaries.hpp>
#include <attn/detail/exact_rows.hpp>
#include <attn/detail/field_tokens.hpp>
#include <attn/detail/multipole_fields.hpp>
#include <attn/detail/split_mix64.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/error_estimate.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>
#include <attn/multipole.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

namespace attn::detail {

/// Groups, and what is known whoever looks at them, of inputs that Multipole cuts in branches that are not all open.
template <class T>
class MultipoleTrials {
 public:
  MultipoleTrials(const Product<T>& product, const FieldCounts& counts, const MatrixRef<T>& rows, Context& context,
                  Scratch& scratch)
      : product_(product),
        rows_(rows),
        clusters_(cluster_rows(product.in.k, kept_keys(product.in), counts.clusters, counts.clusters_in_a_branch,
                               context, scratch)),
        groups_(cluster_rows(product.in.q, kept_queries(product.in), counts.groups, counts.groups_in_a_region, context,
                             scratch)),
        blocks_(groups_.parts, kTileWidth<T>, scratch),
        keys_(KeyClusters<T>::make(product.in, product.kernel, clusters_, false, context, scratch)),
        queries_(QueryGroups<T>::make(product.in, product.kernel, groups_, context, scratch)),
        summaries_(Summaries<T>::make(groups_.sets() * clusters_.sets(), keys_.tokens.cols(), scratch)),
        done_(scratch.elements<std::uint8_t>(groups_.parts.count())),
        next_(scratch.elements<Index>(groups_.parts.count())) {
    auto* const summarizers = scratch.make<Summarizer<T>>(context.workers(), keys_, scratch);
    context.for_each(clusters_.sets(), [&](Index b, int worker) {
      for (Index r = 0; r < groups_.sets(); ++r) {
        summarizers[worker].summarize_branch({row_of(queries_.region_means, r), summaries_, r * clusters_.sets() + b},
                                             b);
      }
    });
    if (static_cast<Index>(groups_.parts.rows.size()) < rows.rows()) ResultRows<T>(rows).set_zero();
    std::fill_n(done_, groups_.parts.count(), std::uint8_t{0});
  }

  const ClusteredRows& groups() const { return groups_.parts; }
  const KeyClusters<T>& keys() const { return keys_; }
  const QueryGroups<T>& queries() const { return queries_; }
  const MatrixRef<T>& rows() const { return rows_; }

  /// Turns to numbers of open branches and near clusters: where these are others, no group is done.
  void start(const FieldSizes& sizes) {
    if (sizes.open == sizes_.open && sizes.near == sizes_.near) return;
    sizes_ = sizes;
    std::fill_n(done_, groups_.parts.count(), std::uint8_t{0});
  }

  /// Rows of the queries of some groups; those that are done stay.
  void attend(std::span<const Index> some, Context& context) {
    Index count = 0;
    for (const Index g : some) {
      if (done_[g] != 0) continue;
      done_[g] = 1;
      next_[count++] = g;
    }
    Scratch scratch = context.scratch();
    auto* const runners =
        scratch.make<FieldRunner<T>>(context.workers(), product_, keys_, queries_, blocks_, sizes_, scratch);
    context.for_each(count, [&](Index i, int worker) {
      const Index region = next_[i] / groups_.parts_in_a_set;
      runners[worker].attend_one(region, next_[i], summaries_.part(region * clusters_.sets(), clusters_.sets()), rows_);
    });
  }

  /// The rows of all queries.
  void attend_all(Context& context) {
    Scratch scratch = context.scratch();
    const std::span<Index> all = scratch.array<Index>(groups_.parts.count());
    for (Index g = 0; g < groups_.parts.count(); ++g) all.data()[g] = g;
    attend(all, context);
  }

 private:
  const Product<T>& product_;
  MatrixRef<T> rows_;
  NestedRows clusters_, groups_;
  QueryBlocks blocks_;
  KeyClusters<T> keys_;
  QueryGroups<T> queries_;
  Summaries<T> summaries_;  ///< of all branches, region after region
  FieldSizes sizes_{};
  std::uint8_t* done_;
  Index* next_;
};

/// Some queries of some groups, whose rows are computed exactly: the error of a trial is estimated from them. Groups
/// and queries in them are drawn with probabilities of 0.2 + 0.4 x + 0.4 x^2, x about the square by which a query's
/// scores are off its group's mean, relative to the mean of that; x^2 likewise. Where a far field is wrong it is so for
/// the queries that are far off.
template <class T>
class TrialSample {
 public:
  static constexpr Index kOfGroup = 4;  ///< queries of each group

  /// count: groups, not all of them different.
  TrialSample(const MultipoleTrials<T>& trials, const Product<T>& product, Index count, std::uint64_t seed,
              Scratch& scratch)
      : groups_(scratch.array<Index>(count)),
        rows_(scratch.array<SampledRow>(count * kOfGroup)),
        exact_(scratch.matrix<T>(count * kOfGroup, product.in.v.cols())) {
    Scratch temporary = scratch.nested();
    const std::span<double> masses = temporary.array<double>(static_cast<Index>(trials.groups().rows.size()) + 1);
    set_masses(trials, product, masses, temporary);
    draw(trials.groups(), masses, seed);
  }

  /// Exact rows of the groups up to the given one.
  template <ScoreKernel Kernel>
  void attend(const Kernel& kernel, const Sources<T>& in, Index count, Context& context) {
    if (count <= count_) return;
    Scratch scratch = context.scratch();
    const Range rows{count_ * kOfGroup, count * kOfGroup};
    const std::span<Index> numbers = scratch.array<Index>(rows.last - rows.first);
    for (Index i = rows.first; i < rows.last; ++i) numbers.data()[i - rows.first] = rows_.data()[i].row;
    exact_rows(kernel, in, numbers, rows_of(exact_, rows), context);
    count_ = count;
  }

  Index count() const { return static_cast<Index>(groups_.size()); }
  std::span<const Index> groups(Index count) const { return part_of(groups_, 0, count); }

  /// The error of the results so far, by as many groups; groups are what is independent, so their sums say how much it
  /// may vary.
  ErrorEstimate estimate(Index count, const MatrixRef<T>& results) {
    set_squares<T>(part_of(rows_, 0, count * kOfGroup), rows_of(exact_, {0, count * kOfGroup}),
                   [&](Index i) { return row_of(results, i); });
    const auto sum = [&](Index group, const auto& get) {
      double total = 0;
      for (Index i = group * kOfGroup; i < (group + 1) * kOfGroup; ++i)
        total += rows_.data()[i].weight * get(rows_.data()[i]);
      return total;
    };
    const auto difference = [&](Index g) { return sum(g, [](const SampledRow& row) { return row.difference; }); };
    const auto exact = [&](Index g) { return sum(g, [](const SampledRow& row) { return row.exact; }); };
    double differences = 0, sizes = 0, variance = 0;
    for (Index g = 0; g < count; ++g) differences += difference(g), sizes += exact(g);
    if (differences == 0) return {0, 0, 0, count * kOfGroup};
    const double square = differences / sizes;
    for (Index g = 0; g < count; ++g) variance += std::pow(difference(g) - square * exact(g), 2);
    const auto n = static_cast<double>(count);
    return interval(std::sqrt(square), std::sqrt(variance * n / (n - 1)) / differences, count * kOfGroup);
  }

 private:
  /// masses <- the summed probabilities of all queries in front of each, in the order of groups, but for a factor.
  static void set_masses(const MultipoleTrials<T>& trials, const Product<T>& product, std::span<double> masses,
                         Scratch& scratch) {
    const ClusteredRows& groups = trials.groups();
    const Index n = static_cast<Index>(groups.rows.size()), width = trials.queries().means.cols();
    T *const variance = scratch.elements<T>(width), *const mean = scratch.elements<T>(width);
    T* const buffer = scratch.elements<T>(product.in.q.cols());
    const MatrixRef<T>& variances = trials.keys().of_clusters.key_variance;
    std::fill_n(variance, width, T(0));
    for (Index c = 0; c < variances.rows(); ++c) {
      add_row(1 / static_cast<T>(variances.rows()), row_of(variances, c), variance, width);
    }
    double squares = 0, fourths = 0;
    for (Index g = 0; g < groups.count(); ++g) {
      std::copy_n(row_of(trials.queries().means, g), width, mean);
      if (product.kernel.center != nullptr)
        add_row(product.kernel.scale, product.kernel.center, mean, product.in.q.cols());
      for (Index i = groups.range(g).first; i < groups.range(g).last; ++i) {
        const T* const row = product.in.q.row(groups.rows.data()[i], buffer);
        const double x = distance(row, product.kernel.scale, mean, variance, product.in.q.cols());
        masses.data()[i + 1] = is_finite(x * x) ? x : 0;
        squares += masses.data()[i + 1];
        fourths += std::pow(masses.data()[i + 1], 2);
      }
    }
    const double first = squares > 0 ? 0.4 * static_cast<double>(n) / squares : 0,
                 second = fourths > 0 ? 0.4 * static_cast<double>(n) / fourths : 0;
    masses.front() = 0;
    for (Index i = 0; i < n; ++i) {
      const double x = masses.data()[i + 1];
      masses.data()[i + 1] = masses.data()[i] + 0.2 + x * (first + second * x);
    }
  }

  /// The sum of variance_x (scale row_x - mean_x)^2.
  static double distance(const T* row, T scale, const T* mean, const T* variance, Index d) {
    auto total = broadcast(T(0));
    for (Index x = 0; x < d; x += kLanes<T>) {
      const auto apart = broadcast(scale) * load_row(row, x, d) - load(mean + x);
      total = multiply_add(apart * apart, load(variance + x), total);
    }
    return static_cast<double>(sum(total));
  }

  /// A group from each of as many strata of equal mass, the first third of them from strata all over.
  void draw(const ClusteredRows& groups, std::span<const double> masses, std::uint64_t seed) {
    SplitMix64 random(seed);
    const auto place = [&](double first, double last) {
      const double mass = first + (last - first) * uniform(random);
      return std::upper_bound(masses.begin(), masses.end(), mass) - masses.begin() - 1;
    };
    const auto part = [&](double first, double last, Index i, Index n) {
      return first + (last - first) * static_cast<double>(i) / static_cast<double>(n);
    };
    const Index n = static_cast<Index>(groups.rows.size());
    for (Index i = 0; i < count(); ++i) {
      const Index stratum = nth_stratum(i);
      const Index at = std::min(
          n - 1, place(part(0, masses.back(), stratum, count()), part(0, masses.back(), stratum + 1, count())));
      const Index group = std::upper_bound(groups.starts.begin(), groups.starts.end(), at) - groups.starts.begin() - 1;
      groups_.data()[i] = group;
      const Range range = groups.range(group);
      const double first = masses.data()[range.first], last = masses.data()[range.last];
      for (Index j = 0; j < kOfGroup; ++j) {
        const Index query = std::clamp<Index>(place(part(first, last, j, kOfGroup), part(first, last, j + 1, kOfGroup)),
                                              range.first, range.last - 1);
        rows_.data()[i * kOfGroup + j] = {groups.rows.data()[query],
                                          1 / (masses.data()[query + 1] - masses.data()[query])};
      }
    }
  }

  /// 1, 4, 7, ..., then 0, 3, ..., then 2, 5, ...
  Index nth_stratum(Index i) const {
    const Index n = count();
    for (const Index first : {1, 0, 2}) {
      const Index some = (n - first + 2) / 3;
      if (i < some) return first + 3 * i;
      i -= some;
    }
    return 0;
  }

  std::span<Index> groups_;
  std::span<SampledRow> rows_;
  MatrixRef<T> exact_;
  Index count_ = 0;  ///< groups whose rows are there
};

}  // namespace attn::detail
