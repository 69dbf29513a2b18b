/// The two fields of multipole attention, far and near, as blocks of queries meet them.
///
///   for each region of queries:       summaries of all branches for the region's landmark
///     for each group:                 the branches of the largest error terms are open:
///                                     summaries of their clusters for the group's landmark
///       for each block of queries:    of these clusters those of the largest error terms are near
///         score[c] = s q.k_c + e_c    far: branches that are not open, clusters that are not near, by their summary
///         score[j] = s q.k_j + a_j    keys of near clusters, as they are
///
/// An error term is root mean square of the queries' weights x spread of scores about the landmark's x spread of
/// values.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/detail/cluster_summaries.hpp>
#include <attn/detail/field_tokens.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/query_strip.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/strip.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <type_traits>

namespace attn::detail {

/// What a forward pass keeps for a backward pass: open branches of each group, as many side by side as are open to
/// each; near clusters of each block, at most most_near side by side; log-sums of all queries. Numbers are ascending.
/// Null if nothing is wanted.
template <class T, class Count = Index>
struct FieldRecord {
  Count *open, *near, *near_count;
  Index most_near;
  std::conditional_t<std::is_const_v<Count>, const RowLog<T>, RowLog<T>>* lse;
};

/// Branches that are open to each group, and clusters that are near to each block, at most.
struct FieldSizes {
  Index open, near;
};

inline std::span<const Index> numbers(const Index* first, Index count) {
  return {first, static_cast<std::size_t>(count)};
}

/// chosen <- the numbers of the count largest of n terms, none of them negative or NaN, ascending; ties go to the lower
/// number.
template <class T>
void choose_largest(const T* terms, Index n, Index count, Index* chosen) {
  if (count == 0) return;
  BitsOf<T> least{};
  const auto bits = [&](Index i) { return magnitude_bits(terms[i]); };
  Index ties = count - nth_largest(bits, n, count, &least);
  for (Index i = 0; i < n; ++i) {
    const bool tied = bits(i) == least && ties > 0;
    if (bits(i) > least || tied) *chosen++ = i;
    ties -= tied ? 1 : 0;
  }
}

/// A strip of queries and what their fields add up to.
template <class T>
struct FieldStrip {
  QueryStrip<T> queries;
  LaneState<T> state;
  T* squares;  ///< |q - center|^2
  T* silent;   ///< NaN for a query that has no say in what is near to others, else 0
  T* weights;  ///< of branches
  QueryBlock block;

  FieldStrip(Index d, Index d_v, Index branches, Scratch& scratch)
      : queries{}, state(LaneState<T>::make(d_v, scratch)), block{} {
    constexpr Index kWidth = kTileWidth<T>;
    queries.panel = scratch.elements<T>(kWidth * d);
    T* const rows = scratch.elements<T>(3 * kWidth);
    queries.norm = rows;
    squares = rows + kWidth;
    silent = rows + 2 * kWidth;
    weights = scratch.elements<T>(round_up_to_tiles(branches) * kWidth);
  }

  Index lanes() const { return queries.lanes(); }

  /// Nothing has been added yet.
  void clear(Index d_v) const {
    std::fill_n(state.maximum, lanes(), kNoMaximum<T>);
    std::fill_n(state.sum, lanes(), T(0));
    std::fill_n(state.base, lanes(), T(0));
    std::fill_n(state.weighted, lanes() * round_up_to_tiles(d_v), T(0));
  }
};

/// Computes regions of queries. One for each worker.
template <class T>
class FieldRunner {
 public:
  FieldRunner(const Product<T>& product, const KeyClusters<T>& keys, const QueryGroups<T>& groups,
              const QueryBlocks& blocks, const FieldSizes& sizes, Scratch& scratch)
      : product_(product),
        keys_(keys),
        groups_(groups),
        blocks_(blocks),
        sizes_(sizes),
        branch_count_(sizes.open == keys.tree.sets() ? 0 : keys.tree.sets()),
        cluster_count_(sizes.open * keys.tree.parts_in_a_set),
        summarizer_(keys, scratch),
        kernel_(product.in, Maximum::running, nullptr, scratch),
        branches_{{nullptr, 0, 0, 0}, nullptr},
        clusters_(Summaries<T>::make(cluster_count_, keys.tokens.cols(), scratch)),
        near_keys_(keys, scratch),
        values_(scratch.matrix<T>(std::max(branch_count_, cluster_count_), keys.d_v)),
        weights_(scratch.elements<T>(round_up_to_tiles(cluster_count_) * kTileWidth<T>)),
        lanes_(scratch.elements<T>(5 * kTileWidth<T>)),
        displacement_(scratch.elements<T>(keys.value_offset())),
        terms_(scratch.elements<T>(std::max(branch_count_, cluster_count_))),
        open_(scratch.elements<Index>(keys.tree.sets())),
        near_(scratch.elements<Index>(cluster_count_)),
        rows_(scratch.elements<T>(kLanes<T> * std::max(keys.d, keys.d_v))) {
    strips_ =
        scratch.make<FieldStrip<T>>(branch_count_ == 0 ? 1 : blocks.most(), keys.d, keys.d_v, branch_count_, scratch);
  }

  /// Branch b as the landmarks of some regions see it, one region's summaries of all branches after another's.
  void summarize(Index b, Range regions, const Summaries<T>& to) {
    for (Index r = regions.first; r < regions.last; ++r) {
      summarizer_.summarize_branch(row_of(groups_.region_means, r), b, to, (r - regions.first) * branch_count_ + b);
    }
  }

  /// Rows of out of the region's queries. branches: what its landmark knows of all branches; not used if all are open.
  void attend(Index region, const Summaries<T>& branches, const ResultRows<T>& out, const FieldRecord<T>& record) {
    std::construct_at(&branches_, branches);
    const Range groups = groups_.tree.parts_of(region);
    for (Index group = groups.first; group < groups.last; ++group) attend_group(region, group, out, record);
  }

 private:
  void attend_group(Index region, Index group, const ResultRows<T>& out, const FieldRecord<T>& record) {
    choose_open(region, group);
    if (record.open != nullptr) std::copy_n(open_, sizes_.open, record.open + group * sizes_.open);
    summarizer_.summarize_clusters(row_of(groups_.means, group), numbers(open_, sizes_.open), clusters_);
    for (Index b = 0; b < blocks_.count(group); ++b) {
      FieldStrip<T>& strip = strips_[branch_count_ == 0 ? 0 : b];
      if (branch_count_ == 0) load_queries(strip, blocks_.block(group, b));
      attend_strip(strip, group, out, record);
    }
  }

  void load_queries(FieldStrip<T>& strip, const QueryBlock& block) const {
    const Index d = keys_.d;
    QueryStrip<T>& queries = strip.queries;
    strip.block = block;
    queries.count = block.queries.last - block.queries.first;
    queries.packets = static_cast<int>(packet_count<T>(queries.count));
    for (Index lane = 0; lane < strip.lanes(); lane += kLanes<T>) {
      const T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        rows[i] = lane + i < queries.count ? product_.in.q.row(query(strip, lane + i), rows_ + i * d) : nullptr;
      }
      const auto squares =
          pack_rows<T>(rows, d, product_.kernel.center, product_.kernel.scale, queries.panel + lane, strip.lanes());
      store(strip.squares + lane, squares);
      store(queries.norm + lane, broadcast(product_.kernel.bias) * squares);
    }
    std::fill_n(strip.silent, strip.lanes(), T(0));
  }

  Index query(const FieldStrip<T>& strip, Index i) const {
    return groups_.tree.parts.rows.data()[strip.block.queries.first + i];
  }

  /// open_ <- the branches that are open to a group, whose strips get what weights all branches have for them.
  void choose_open(Index region, Index group) {
    if (branch_count_ == 0) {
      for (Index b = 0; b < sizes_.open; ++b) open_[b] = b;
      return;
    }
    std::fill_n(terms_, branch_count_, T(0));
    std::fill_n(displacement_, keys_.value_offset(), T(0));
    for (Index b = 0; b < blocks_.count(group); ++b) {
      FieldStrip<T>& strip = strips_[b];
      load_queries(strip, blocks_.block(group, b));
      strip.clear(keys_.d_v);
      score(strip, branches_, branch_count_, strip.weights, strip.state.maximum);
      weigh_all(strip, branch_count_, strip.weights, strip.state.sum);
      add_terms(strip, row_of(groups_.region_means, region), strip.state.sum, branch_count_, strip.weights);
    }
    set_errors(keys_.of_branches, branch_count_, [](Index b) { return b; });
    choose_largest(terms_, branch_count_, sizes_.open, open_);
  }

  void attend_strip(FieldStrip<T>& strip, Index group, const ResultRows<T>& out, const FieldRecord<T>& record) {
    if (branch_count_ == 0) {
      strip.clear(keys_.d_v);
    } else {
      add_branches(strip);
    }
    T *const total = lanes_ + kTileWidth<T>, *const correction = total + kTileWidth<T>;
    weigh_clusters(strip, correction, total);
    const Index count = choose_near(strip, row_of(groups_.means, group), total);
    add_clusters(strip, count, correction);
    add_near(strip, count);
    write(strip, out);
    if (record.lse == nullptr) return;
    record.near_count[strip.block.number] = count;
    std::copy_n(near_, count, record.near + strip.block.number * record.most_near);
    for (Index i = 0; i < strip.queries.count; ++i) {
      record.lse[query(strip, i)] = {row_log_sum(strip.state.maximum[i], strip.state.sum[i]), T(0)};
    }
  }

  /// The cluster that is the i-th of all in open branches.
  Index cluster(Index i) const {
    const Index size = keys_.tree.parts_in_a_set;
    return open_[i / size] * size + i % size;
  }

  /// scores <- those of count summaries, and their largest into maximum.
  void score(const FieldStrip<T>& strip, const Summaries<T>& summaries, Index count, T* scores, T* maximum) const {
    T* const of_tile = lanes_;
    std::fill_n(maximum, strip.lanes(), kNoMaximum<T>);
    for (Index c = 0; c < count; c += kTileKeys<T>) {
      const KeyTile<T> tile = summaries.tile({c, std::min(count, c + kTileKeys<T>)}, keys_.value_offset());
      with_packets<kTilePackets>(strip.queries.packets, [&](auto packets) {
        score_keys<packets>(tile, tile.count, strip.queries.panel, keys_.d, scores + c * strip.lanes(), of_tile, {});
      });
      for (Index p = 0; p < strip.lanes(); p += kLanes<T>)
        store(maximum + p, max(load(maximum + p), load(of_tile + p)));
    }
  }

  /// Scores become weights relative to the strip's maximum; their sum is added to sum.
  void weigh_all(const FieldStrip<T>& strip, Index count, T* scores, T* sum) const {
    weigh(scores, count, strip.lanes(), strip.state.maximum, std::numeric_limits<T>::infinity(), sum);
  }

  /// terms_ <- terms_ + the squared shares of count weights in their sums, over the queries; displacement_ <-
  /// displacement_ + the summed squares of s (q - l), per coordinate. landmark: s l. Queries that are not finite, or
  /// whose sum is not, do not count, and fall silent.
  void add_terms(FieldStrip<T>& strip, const T* landmark, const T* sum, Index count, T* weights) {
    alignas(64) T share[array_size(kTileWidth<T>)], counts[array_size(kTileWidth<T>)];
    for (Index i = 0; i < strip.lanes(); ++i) {
      const bool silent = is_nan(strip.silent[i]) || !is_finite(strip.squares[i]) || !is_finite(sum[i]);
      if (silent) silence(strip, i, count, weights);
      counts[i] = silent || i >= strip.queries.count ? T(0) : T(1);
      share[i] = counts[i] == 0 ? T(0) : 1 / sum[i];
    }
    for (Index c = 0; c < count; ++c) {
      auto total = broadcast(T(0));
      for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
        const auto of_query = load(weights + c * strip.lanes() + p) * load(share + p);
        total = multiply_add(of_query, of_query, total);
      }
      terms_[c] += detail::sum(total);
    }
    for (Index x = 0; x < keys_.d; ++x) {
      auto total = broadcast(T(0));
      for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
        const auto difference = load(strip.queries.panel + x * strip.lanes() + p) - broadcast(landmark[x]);
        total = multiply_add(difference * difference, load(counts + p), total);
      }
      displacement_[x] += detail::sum(total);
    }
  }

  /// A query that is not finite becomes 0, and its sum will be NaN.
  [[gnu::cold, gnu::noinline]] void silence(FieldStrip<T>& strip, Index i, Index count, T* weights) const {
    strip.silent[i] = std::numeric_limits<T>::quiet_NaN();
    strip.state.maximum[i] = kNoMaximum<T>;
    strip.state.sum[i] = 0;
    for (Index x = 0; x < keys_.d; ++x) strip.queries.panel[x * strip.lanes() + i] = 0;
    for (Index c = 0; c < count; ++c) weights[c * strip.lanes() + i] = 0;
  }

  /// terms_ <- root of terms_ x spread of scores x spread of values, of count clusters; id: their numbers.
  template <class Id>
  void set_errors(const KeySpreads<T>& of, Index count, const Id& id) {
    for (Index first = 0; first < count; first += kLanes<T>) {
      const Index some = std::min<Index>(kLanes<T>, count - first);
      const T* variances[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        variances[i] = row_of(of.key_variance, id(first + std::min(i, some - 1)));
      }
      alignas(64) T spread[array_size(kLanes<T>)];
      store(spread, dot_products<T>(variances, nullptr, displacement_, keys_.value_offset()));
      for (Index i = 0; i < some; ++i) {
        const T term = std::sqrt(terms_[first + i] * spread[i]) * of.value_spread[id(first + i)];
        terms_[first + i] = is_nan(term) ? std::numeric_limits<T>::infinity() : term;
      }
    }
  }

  /// The state <- the branches that are not open, by their weights.
  void add_branches(const FieldStrip<T>& strip) const {
    const LaneState<T>& state = strip.state;
    std::fill_n(state.sum, strip.lanes(), T(0));
    std::fill_n(lanes_, strip.lanes(), T(1));
    add_others(strip, branches_, branch_count_, numbers(open_, sizes_.open), strip.weights, lanes_);
    for (Index i = 0; i < strip.lanes(); ++i) {
      if (state.sum[i] == 0) state.maximum[i] = kNoMaximum<T>;
    }
  }

  /// The state's weighted <- correction weighted + the values of count summaries but for some, by their weights, which
  /// are moved up; its sum follows.
  void add_others(const FieldStrip<T>& strip, const Summaries<T>& summaries, Index count, std::span<const Index> some,
                  T* weights, T* correction) const {
    const Index lanes = strip.lanes(), d_v = keys_.d_v;
    Index others = 0;
    for (Index c = 0; c < count; ++c) {
      if (!some.empty() && some.front() == c) {
        some = some.subspan(1);
        continue;
      }
      std::copy_n(row_of(summaries.tokens, c) + keys_.value_offset(), d_v, row_of(values_, others));
      if (others < c) std::copy_n(weights + c * lanes, lanes, weights + others * lanes);
      ++others;
    }
    add_sums(strip, others, weights);
    Index first = 0;
    do {  // once even where there are none: for the correction
      with_packets<kTilePackets>(strip.queries.packets, [&](auto packets) {
        add_values<packets>(row_of(values_, first), d_v, d_v, weights + first * lanes,
                            std::min(others - first, kTileKeys<T>), correction, strip.state.weighted, {});
      });
      std::fill_n(correction, lanes, T(1));
      first += kTileKeys<T>;
    } while (first < others);
  }

  void add_sums(const FieldStrip<T>& strip, Index count, const T* weights) const {
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      auto total = broadcast(T(0));
      for (Index c = 0; c < count; ++c) total = total + load(weights + c * strip.lanes() + p);
      store(strip.state.sum + p, load(strip.state.sum + p) + total);
    }
  }

  /// weights_ <- those of all clusters in open branches, relative to the maximum of the state, whose sum follows;
  /// correction: what its weighted still is to be multiplied by; total: the sum of all weights.
  void weigh_clusters(const FieldStrip<T>& strip, T* correction, T* total) const {
    const LaneState<T>& state = strip.state;
    T* const maximum = lanes_ + 3 * kTileWidth<T>;
    score(strip, clusters_, cluster_count_, weights_, maximum);
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      const auto before = load(state.maximum + p), after = max(before, load(maximum + p));
      store(correction + p, exp2_bounded(before - after));
      store(state.maximum + p, after);
      store(state.sum + p, load(state.sum + p) * load(correction + p));
      store(total + p, load(state.sum + p));
    }
    weigh_all(strip, cluster_count_, weights_, total);
  }

  /// near_ <- which clusters in open branches have the largest error terms, ascending. Returns how many.
  Index choose_near(FieldStrip<T>& strip, const T* landmark, const T* total) {
    const Index count = std::min(sizes_.near, cluster_count_);
    if (count == 0) return 0;
    std::fill_n(terms_, cluster_count_, T(0));
    std::fill_n(displacement_, keys_.value_offset(), T(0));
    add_terms(strip, landmark, total, cluster_count_, weights_);
    set_errors(keys_.of_clusters, cluster_count_, [&](Index i) { return cluster(i); });
    choose_largest(terms_, cluster_count_, count, near_);
    return count;
  }

  /// The clusters in open branches that are far.
  void add_clusters(const FieldStrip<T>& strip, Index near_count, T* correction) const {
    add_others(strip, clusters_, cluster_count_, numbers(near_, near_count), weights_, correction);
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      store(strip.state.sum + p, load(strip.state.sum + p) + load(strip.silent + p));
    }
  }

  void add_near(const FieldStrip<T>& strip, Index count) const {
    for (Index i = 0; i < count; ++i) near_[i] = cluster(near_[i]);
    near_keys_.for_each_tile(numbers(near_, count), [&](const KeyTile<T>& tile) {
      kernel_.add(strip.queries, strip.state, tile, CausalLimits::kNone, {});
    });
  }

  void write(const FieldStrip<T>& strip, const ResultRows<T>& out) const {
    RowScales<T> scales;
    product_.set_scales(0, strip.state, strip.queries.norm, strip.lanes(), &scales);
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < strip.queries.count ? out.row(query(strip, p + i), rows_ + i * keys_.d_v) : nullptr;
      }
      unpack_rows(strip.state.weighted + p, strip.lanes(), keys_.d_v, load(scales.first + p), rows);
      for (Index i = 0; i < kLanes<T>; ++i) {
        if (rows[i] == nullptr) continue;
        if (scales.twice) scale_row(scales.second[p + i], rows[i], rows[i], keys_.d_v);
        out.finish_row(query(strip, p + i), rows[i]);
      }
    }
  }

  const Product<T>& product_;
  const KeyClusters<T>& keys_;
  const QueryGroups<T>& groups_;
  const QueryBlocks& blocks_;
  FieldSizes sizes_;
  Index branch_count_;   ///< 0 where all are open
  Index cluster_count_;  ///< in open branches
  Summarizer<T> summarizer_;
  StripKernel<T> kernel_;
  Summaries<T> branches_, clusters_;
  NearKeys<T> near_keys_;
  MatrixRef<T> values_;  ///< of far summaries
  T *weights_, *lanes_, *displacement_, *terms_;
  Index *open_, *near_;
  T* rows_;
  FieldStrip<T>* strips_;
};

}  // namespace attn::detail
