/// Tokens of multipole attention in the order of their clusters and groups, and what is known of these whoever looks.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <span>

namespace attn::detail {

/// n elements with as many zeros behind them as fill up their packets: rows of them have no ends that need care.
template <class T>
constexpr Index padded(Index n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

/// Fetches a row that will soon be read or written: rows in the order of clusters lie anywhere.
inline void fetch_row(const MemoryRows& rows, Index i) {
  constexpr Index kLine = 64;
  for (Index byte = 0; byte < rows.row_bytes; byte += kLine) __builtin_prefetch(rows.row(i) + byte, 0, 2);
}

/// What is known of clusters of keys whoever looks at them.
template <class T>
struct KeySpreads {
  MatrixRef<T> key_variance;  ///< of each cluster's keys, per coordinate (m, padded d)
  T* value_spread;            ///< root of the summed variances of each cluster's values (m)

  static KeySpreads make(Index m, Index d, Scratch& scratch) {
    return {scratch.matrix<T>(m, padded<T>(d)), scratch.elements<T>(m)};
  }

  /// Those of clusters from the given one on.
  KeySpreads from(Index c) const {
    return {{row_of(key_variance, c), key_variance.rows() - c, key_variance.cols(), key_variance.outerStride()},
            value_spread + c};
  }
};

/// Keys and values in the order of their clusters, side by side, each padded. Branches, of neighbouring
/// clusters, have spreads only where some of them are not open to some group.
template <class T>
struct KeyClusters {
  NestedRows tree;      ///< clusters in branches
  MatrixRef<T> tokens;  ///< [k | v] (n, padded d + padded d_v), keys relative to the center
  T* bias;              ///< a_j of each, in units of log2; null where all are 0
  KeySpreads<T> of_clusters, of_branches;
  Index d, d_v;

  Index value_offset() const { return padded<T>(d); }  ///< of a value in its row
  const T* row(Index j) const { return tokens.data() + j * tokens.cols(); }

  /// Keys [first, last) in the order of clusters, for products with their values.
  KeyTile<T> tile(Range keys) const {
    return {.k = row(keys.first),
            .v = row(keys.first) + value_offset(),
            .bias = bias == nullptr ? nullptr : bias + keys.first,
            .k_stride = tokens.cols(),
            .v_stride = tokens.cols(),
            .rows = nullptr,
            .first = keys.first,
            .count = keys.last - keys.first};
  }

  static KeyClusters make(const Sources<T>& in, const LogKernel<T>& kernel, const NestedRows& tree, bool all_open,
                          Context& context, Scratch& scratch) {
    const KeyClusters keys = make_tokens(in, kernel, tree, context, scratch);
    return keys.in_clusters(tree, all_open, context, scratch);
  }

  /// All but spreads.
  static KeyClusters make_tokens(const Sources<T>& in, const LogKernel<T>& kernel, const NestedRows& tree,
                                 Context& context, Scratch& scratch) {
    constexpr Index kAhead = 8;  // rows
    const Index d = in.k.cols(), d_v = in.v.cols(), n = static_cast<Index>(tree.parts.rows.size());
    const bool has_bias = kernel.bias != 0 || !in.key_bias.empty();
    const KeySpreads<T> none{{nullptr, 0, 0, 0}, nullptr};
    const KeyClusters keys{tree,
                           scratch.matrix<T>(n, padded<T>(d) + padded<T>(d_v)),
                           has_bias ? scratch.elements<T>(n) : nullptr,
                           none,
                           none,
                           d,
                           d_v};
    constexpr Index kBlock = 64;
    context.for_each((n + kBlock - 1) / kBlock, [&](Index block, int) {
      for (Index j = block * kBlock; j < std::min(n, (block + 1) * kBlock); ++j) {
        const Index soon = tree.parts.rows.data()[std::min(j + kAhead, n - 1)];
        fetch_row(in.k.memory(), soon);
        fetch_row(in.v.memory(), soon);
        keys.set_key(in, kernel, j);
      }
    });
    return keys;
  }

  /// The same tokens in other clusters, neighbours of each other still, and what is known of these.
  KeyClusters in_clusters(const NestedRows& clusters, bool all_open, Context& context, Scratch& scratch) const {
    const KeyClusters keys{clusters,
                           tokens,
                           bias,
                           KeySpreads<T>::make(clusters.parts.count(), d, scratch),
                           KeySpreads<T>::make(all_open ? 0 : clusters.sets(), d, scratch),
                           d,
                           d_v};
    T* const buffers = scratch.elements<T>(context.workers() * 2 * tokens.cols());
    context.for_each(clusters.sets(), [&](Index b, int worker) {
      T* const buffer = buffers + worker * 2 * tokens.cols();
      for (Index c = clusters.parts_of(b).first; c < clusters.parts_of(b).last; ++c) {
        keys.set_spreads(clusters.parts.range(c), c, keys.of_clusters, buffer);
      }
      if (!all_open) keys.set_spreads(clusters.range(b), b, keys.of_branches, buffer);
    });
    return keys;
  }

  /// Some branches, in the place of all.
  KeyClusters some_branches(Range branches) const {
    const Index clusters = branches.first * tree.parts_in_a_set;
    const ClusteredRows parts{tree.parts.rows, part_of(tree.parts.starts, clusters,
                                                       (branches.last - branches.first) * tree.parts_in_a_set + 1)};
    return {{parts, tree.parts_in_a_set},
            tokens,
            bias,
            of_clusters.from(clusters),
            of_branches.key_variance.rows() == 0 ? of_branches : of_branches.from(branches.first),
            d,
            d_v};
  }

 private:
  void set_key(const Sources<T>& in, const LogKernel<T>& kernel, Index j) const {
    const Index from = tree.parts.rows.data()[j];
    T* const to = tokens.data() + j * tokens.cols();
    if (tokens.cols() > d + d_v) std::fill_n(to, tokens.cols(), T(0));
    in.k.copy_row(from, to);
    in.v.copy_row(from, to + value_offset());
    if (kernel.center != nullptr) add_row(T(-1), kernel.center, to, d);
    if (bias == nullptr) return;
    bias[j] = kernel.bias == 0 ? T(0) : -kernel.bias * squared_norm(to, d);
    if (in.key_bias.empty()) return;
    bias[j] += std::numbers::log2e_v<T> * (in.key_bias.data()[from] - kernel.bias_origins.common);
  }

  /// Spreads of the c-th of some sets. buffer: two rows of d + d_v.
  void set_spreads(Range keys, Index c, const KeySpreads<T>& to, T* buffer) const {
    const Index width = tokens.cols();
    T *const mean = buffer, *const variance = buffer + width;
    const T share = 1 / static_cast<T>(keys.last - keys.first);
    std::fill_n(mean, 2 * width, T(0));
    for (Index j = keys.first; j < keys.last; ++j) add_row(share, row(j), mean, width);
    for (Index j = keys.first; j < keys.last; ++j) add_squared_difference(row(j), mean, variance, width);
    scale_row(share, variance, row_of(to.key_variance, c), value_offset());
    to.value_spread[c] = std::sqrt(share * row_sum(variance + value_offset(), width - value_offset()));
  }
};

/// Groups of queries in regions, and the mean of each: its landmark.
template <class T>
struct QueryGroups {
  NestedRows tree;            ///< groups in regions
  MatrixRef<T> means;         ///< of groups, relative to the center, times the kernel's scale (groups, padded d)
  MatrixRef<T> region_means;  ///< of regions

  static QueryGroups make(const Sources<T>& in, const LogKernel<T>& kernel, const NestedRows& tree, Context& context,
                          Scratch& scratch) {
    const Index d = in.q.cols();
    const QueryGroups made{tree, scratch.matrix<T>(tree.parts.count(), padded<T>(d)),
                           scratch.matrix<T>(tree.sets(), padded<T>(d))};
    T* const buffers = scratch.elements<T>(context.workers() * d);
    context.for_each(tree.sets(), [&](Index r, int worker) {
      T* const buffer = buffers + worker * d;
      for (Index g = tree.parts_of(r).first; g < tree.parts_of(r).last; ++g) {
        made.set_mean(in.q, kernel, tree.parts.range(g), buffer, row_of(made.means, g));
      }
      made.set_mean(in.q, kernel, tree.range(r), buffer, row_of(made.region_means, r));
    });
    return made;
  }

 private:
  /// Rows that are not finite do not count: they reach no other row.
  void set_mean(const TokenRows<T>& q, const LogKernel<T>& kernel, Range queries, T* buffer, T* mean) const {
    const Index d = q.cols();
    const auto add = [&](bool finite_only) {
      Index count = 0;
      std::fill_n(mean, means.cols(), T(0));
      for (Index i = queries.first; i < queries.last; ++i) {
        const T* const row = q.row(tree.parts.rows.data()[i], buffer);
        if (finite_only && !is_finite(squared_norm(row, d))) continue;
        add_row(T(1), row, mean, d);
        ++count;
      }
      return count;
    };
    Index count = add(false);
    if (!is_finite(squared_norm(mean, d))) count = add(true);
    scale_row(1 / static_cast<T>(std::max<Index>(count, 1)), mean, mean, d);
    if (kernel.center != nullptr && count > 0) add_row(T(-1), kernel.center, mean, d);
    scale_row(kernel.scale, mean, mean, d);
  }
};

/// The keys of some clusters as tiles: many that lie side by side in place, others gathered to whole tiles. One for
/// each worker.
template <class T>
class NearKeys {
 public:
  NearKeys(const KeyClusters<T>& keys, Scratch& scratch)
      : keys_(keys),
        tokens_(scratch.matrix<T>(kTileKeys<T>, keys.tokens.cols())),
        bias_(scratch.elements<T>(kTileKeys<T>)),
        rows_(scratch.elements<Index>(kTileKeys<T>)) {}

  template <class Take>
  void for_each_tile(std::span<const Index> clusters, const Take& take) const {
    for_each_tile({0, 0}, clusters, take);
  }

  /// take(tile) for tiles of some other keys, few of them, and all keys of some clusters, which are ascending.
  template <class Take>
  void for_each_tile(Range others, std::span<const Index> clusters, const Take& take) const {
    Index gathered = others.last - others.first;
    if (gathered > 0) gather(others, 0);
    const auto flush = [&] {
      if (gathered > 0) take(gathered_tile(gathered));
      gathered = 0;
    };
    const ClusteredRows& of = keys_.tree.parts;
    for (std::size_t i = 0; i < clusters.size(); ++i) {
      Range keys = of.range(clusters[i]);
      while (i + 1 < clusters.size() && clusters[i + 1] == clusters[i] + 1) keys.last = of.range(clusters[++i]).last;
      for (Range some = keys; some.first < keys.last; some.first = some.last) {
        some.last = std::min(keys.last, some.first + kTileKeys<T>);
        const Index count = some.last - some.first;
        if (2 * count > kTileKeys<T>) {
          take(keys_.tile(some));
          continue;
        }
        if (gathered + count > kTileKeys<T>) flush();
        gather(some, gathered);
        gathered += count;
      }
    }
    flush();
  }

 private:
  void gather(Range keys, Index to) const {
    const Index count = keys.last - keys.first;
    std::copy_n(keys_.row(keys.first), count * tokens_.cols(), row_of(tokens_, to));
    for (Index i = 0; i < count; ++i) rows_[to + i] = keys.first + i;
    if (keys_.bias != nullptr) std::copy_n(keys_.bias + keys.first, count, bias_ + to);
  }

  KeyTile<T> gathered_tile(Index count) const {
    return {.k = tokens_.data(),
            .v = tokens_.data() + keys_.value_offset(),
            .bias = keys_.bias == nullptr ? nullptr : bias_,
            .k_stride = tokens_.cols(),
            .v_stride = tokens_.cols(),
            .rows = rows_,
            .first = 0,
            .count = count};
  }

  const KeyClusters<T>& keys_;
  MatrixRef<T> tokens_;
  T* bias_;
  Index* rows_;
};

/// Some queries of a group, which share their near clusters; the number-th block of all.
struct QueryBlock {
  Range queries;
  Index number;
};

/// Groups cut into blocks of nearly equal size, of at most a strip each.
class QueryBlocks {
 public:
  QueryBlocks(const ClusteredRows& groups, Index width, Scratch& scratch)
      : groups_(groups), width_(width), first_(scratch.elements<Index>(groups.count() + 1)) {
    first_[0] = 0;
    for (Index g = 0; g < groups.count(); ++g) {
      const Range range = groups.range(g);
      first_[g + 1] = first_[g] + (range.last - range.first + width - 1) / width;
    }
  }

  Index count() const { return first_[groups_.count()]; }

  /// Of the group that has most.
  Index most() const {
    Index most = 0;
    for (Index g = 0; g < groups_.count(); ++g) most = std::max(most, count(g));
    return most;
  }

  Index count(Index group) const { return first_[group + 1] - first_[group]; }

  QueryBlock block(Index group, Index i) const {
    const Range range = groups_.range(group), part = nth_part(range.last - range.first, count(group), i);
    return {{range.first + part.first, range.first + part.last}, first_[group] + i};
  }

 private:
  ClusteredRows groups_;
  Index width_;
  Index* first_;  ///< block of each group
};

}  // namespace attn::detail
