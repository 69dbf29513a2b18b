/// Which branches of clusters are open, and which clusters are near, to some queries.
///
///   weight_c = exp(s q.k_c + e_c), as a share of all           term_c = root mean square over the queries
///   error_c  = term_c x spread of scores about the landmark's x spread of values       the largest are open, or near
#pragma once

#include <attn/context.hpp>
#include <attn/detail/cluster_summaries.hpp>
#include <attn/detail/field_tokens.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/query_strip.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/strip.hpp>
#include <attn/engine/tile.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

namespace attn::detail {

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

  /// Turns to count queries of a product, of the given rows. buffer: room for kLanes of them.
  void load(const Product<T>& product, const Index* rows, Index count, T* buffer) {
    const Index d = product.in.q.cols();
    queries.count = count;
    queries.packets = static_cast<int>(packet_count<T>(count));
    for (Index lane = 0; lane < lanes(); lane += kLanes<T>) {
      const T* some[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        some[i] = lane + i < count ? product.in.q.row(rows[lane + i], buffer + i * d) : nullptr;
      }
      const auto of_lanes =
          pack_rows<T>(some, d, product.kernel.center, product.kernel.scale, queries.panel + lane, lanes());
      store(squares + lane, of_lanes);
      store(queries.norm + lane, broadcast(product.kernel.bias) * of_lanes);
    }
    std::fill_n(silent, lanes(), T(0));
  }

  /// Nothing has been added yet.
  void clear(Index d_v) const {
    std::fill_n(state.maximum, lanes(), kNoMaximum<T>);
    std::fill_n(state.sum, lanes(), T(0));
    std::fill_n(state.base, lanes(), T(0));
    std::fill_n(state.weighted, lanes() * round_up_to_tiles(d_v), T(0));
  }
};

/// What choosing takes. One for each worker, as a part of what attends.
template <class T>
class FieldChoice {
 protected:
  FieldChoice(const KeyClusters<T>& keys, const FieldSizes& sizes, Scratch& scratch)
      : keys_(keys),
        sizes_(sizes),
        branch_count_(sizes.open == keys.tree.sets() ? 0 : keys.tree.sets()),
        cluster_count_(sizes.open * keys.tree.parts_in_a_set),
        summarizer_(keys, scratch),
        branches_(Summaries<T>::none()),
        clusters_(Summaries<T>::make(cluster_count_, keys.tokens.cols(), scratch)),
        weights_(scratch.elements<T>(round_up_to_tiles(cluster_count_) * kTileWidth<T>)),
        lanes_(scratch.elements<T>(5 * kTileWidth<T>)),
        displacement_(scratch.elements<T>(keys.value_offset())),
        terms_(scratch.elements<T>(std::max(branch_count_, cluster_count_))),
        open_(scratch.elements<Index>(keys.tree.sets())),
        near_(scratch.elements<Index>(cluster_count_)) {}

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

  void begin_terms(Index count) const {
    std::fill_n(terms_, count, T(0));
    std::fill_n(displacement_, keys_.value_offset(), T(0));
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

  /// A strip's weights <- those of all branches, whose squared shares join terms_. landmark: s l of the region.
  void weigh_branches(FieldStrip<T>& strip, const T* landmark) {
    score(strip, branches_, branch_count_, strip.weights, strip.state.maximum);
    weigh_all(strip, branch_count_, strip.weights, strip.state.sum);
    add_terms(strip, landmark, strip.state.sum, branch_count_, strip.weights);
  }

  /// open_ <- the branches of largest error terms, of whose weights terms_ has the shares.
  void choose_branches() {
    set_errors(keys_.of_branches, branch_count_, [](Index b) { return b; });
    choose_largest(terms_, branch_count_, sizes_.open, open_);
  }

  void open_all() {
    for (Index b = 0; b < sizes_.open; ++b) open_[b] = b;
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
    begin_terms(cluster_count_);
    add_terms(strip, landmark, total, cluster_count_, weights_);
    set_errors(keys_.of_clusters, cluster_count_, [&](Index i) { return cluster(i); });
    choose_largest(terms_, cluster_count_, count, near_);
    return count;
  }

  const KeyClusters<T>& keys_;
  FieldSizes sizes_;
  Index branch_count_;   ///< 0 where all are open
  Index cluster_count_;  ///< in open branches
  Summarizer<T> summarizer_;
  Summaries<T> branches_, clusters_;
  T *weights_, *lanes_, *displacement_, *terms_;
  Index *open_, *near_;
};

}  // namespace attn::detail
