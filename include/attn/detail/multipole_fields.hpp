/// The two fields of multipole attention: clusters of keys as landmarks see them, and blocks of queries that meet them.
///
///   for each landmark l, cluster c:   r_j  = softmax_{j in c}(s l.k_j + a_j)
///                                     k_c  = sum r_j k_j,  v_c = sum r_j v_j
///                                     e_c  = log sum_{j in c} exp(s l.k_j + a_j) - s l.k_c
///   for each block of queries:        the clusters of largest weight x spread of scores x spread of values are near
///     score[c] = s q.k_c + e_c        far clusters, by their summary
///     score[j] = s q.k_j + a_j        keys of near clusters, as they are
#pragma once

#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/query_strip.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/strip.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <numbers>
#include <span>
#include <type_traits>

namespace attn::detail {

/// Keys and values in the order of their clusters, side by side in rows of d + d_v elements, and what is known of each
/// cluster whoever looks at it.
template <class T>
struct KeyClusters {
  ClusteredRows clusters;
  MatrixRef<T> tokens;        ///< [k | v] (n, d + d_v), keys relative to the center
  T* bias;                    ///< a_j of each, in units of log2; null where all are 0
  MatrixRef<T> key_variance;  ///< of each cluster's keys, per coordinate (m, d)
  T* value_spread;            ///< root of the summed variances of each cluster's values (m)
  Index d;

  Index d_v() const { return tokens.cols() - d; }

  /// Keys [first, last) in the order of clusters, for products with their values.
  KeyTile<T> tile(Range keys) const {
    const T* const first = tokens.data() + keys.first * tokens.cols();
    return {.k = first,
            .v = first + d,
            .bias = bias == nullptr ? nullptr : bias + keys.first,
            .k_stride = tokens.cols(),
            .v_stride = tokens.cols(),
            .rows = nullptr,
            .first = keys.first,
            .count = keys.last - keys.first};
  }

  static KeyClusters make(const Sources<T>& in, const LogKernel<T>& kernel, const ClusteredRows& clusters,
                          Context& context, Scratch& scratch) {
    const Index d = in.k.cols(), d_v = in.v.cols();
    const Index n = static_cast<Index>(clusters.rows.size()), m = clusters.count();
    const bool has_bias = kernel.bias != 0 || !in.key_bias.empty();
    const KeyClusters keys{clusters,
                           scratch.matrix<T>(n, d + d_v),
                           has_bias ? scratch.elements<T>(n) : nullptr,
                           scratch.matrix<T>(m, d),
                           scratch.elements<T>(m),
                           d};
    const auto means = scratch.matrix<T>(context.workers(), d + 2 * d_v);
    context.for_each(m, [&](Index c, int worker) { keys.set(in, kernel, c, means.data() + worker * means.cols()); });
    return keys;
  }

 private:
  void set(const Sources<T>& in, const LogKernel<T>& kernel, Index c, T* mean) const {
    const Range range = clusters.range(c);
    const Index width = tokens.cols();
    T *const value_variance = mean + width, share = 1 / static_cast<T>(range.last - range.first);
    std::fill_n(mean, width + d_v(), T(0));
    for (Index j = range.first; j < range.last; ++j) {
      const Index row = clusters.rows.data()[j];
      T* const to = tokens.data() + j * width;
      in.k.copy_row(row, to);
      in.v.copy_row(row, to + d);
      if (kernel.center != nullptr) add_row(T(-1), kernel.center, to, d);
      if (bias != nullptr) set_bias(in, kernel, row, to, bias + j);
      add_row(share, to, mean, width);
    }
    T* const variance = key_variance.data() + c * d;
    std::fill_n(variance, d, T(0));
    for (Index j = range.first; j < range.last; ++j) {
      const T* const row = tokens.data() + j * width;
      add_squared_difference(row, mean, variance, d);
      add_squared_difference(row + d, mean + d, value_variance, d_v());
    }
    scale_row(share, variance, variance, d);
    value_spread[c] = std::sqrt(share * row_sum(value_variance, d_v()));
  }

  void set_bias(const Sources<T>& in, const LogKernel<T>& kernel, Index row, const T* key, T* to) const {
    *to = kernel.bias == 0 ? T(0) : -kernel.bias * squared_norm(key, d);
    if (!in.key_bias.empty()) *to += std::numbers::log2e_v<T> * (in.key_bias.data()[row] - kernel.bias_origins.common);
  }
};

/// Groups of queries, and the mean of each: its landmark.
template <class T>
struct QueryGroups {
  ClusteredRows groups;
  MatrixRef<T> means;  ///< relative to the center (groups, d)

  static QueryGroups make(const Sources<T>& in, const LogKernel<T>& kernel, const ClusteredRows& groups,
                          Context& context, Scratch& scratch) {
    const Index d = in.q.cols();
    const QueryGroups made{groups, scratch.matrix<T>(groups.count(), d)};
    const auto buffers = scratch.matrix<T>(context.workers(), d);
    context.for_each(groups.count(),
                     [&](Index g, int worker) { made.set_mean(in.q, kernel.center, g, buffers.data() + worker * d); });
    return made;
  }

 private:
  /// Rows that are not finite do not count: they reach no other row.
  void set_mean(const TokenRows<T>& q, const T* center, Index g, T* buffer) const {
    const Range range = groups.range(g);
    const Index d = means.cols();
    T* const mean = means.data() + g * d;
    const auto add = [&](bool finite_only) {
      Index count = 0;
      std::fill_n(mean, d, T(0));
      for (Index i = range.first; i < range.last; ++i) {
        const T* const row = q.row(groups.rows.data()[i], buffer);
        if (finite_only && !is_finite(squared_norm(row, d))) continue;
        add_row(T(1), row, mean, d);
        ++count;
      }
      return count;
    };
    Index count = add(false);
    if (!is_finite(squared_norm(mean, d))) count = add(true);
    scale_row(1 / static_cast<T>(std::max<Index>(count, 1)), mean, mean, d);
    if (center != nullptr && count > 0) add_row(T(-1), center, mean, d);
  }
};

/// What the landmarks of some groups, along the lanes of one strip, know of all clusters.
template <class T>
struct Summaries {
  QueryStrip<T> landmarks;
  Index first;          ///< group of the first lane
  MatrixRef<T> scaled;  ///< the landmarks as rows, times the kernel's scale (lanes, d)
  MatrixRef<T> tokens;  ///< [k_c | v_c], cluster after cluster for each landmark (lanes m, d + d_v)
  MatrixRef<T> bias;    ///< e_c of each landmark and cluster (lanes, m), in units of log2

  static Summaries make(Index most, const KeyClusters<T>& keys, Scratch& scratch) {
    const Index m = keys.clusters.count();
    QueryStrip<T> strip{};
    strip.panel = scratch.elements<T>(kTileWidth<T> * keys.d);
    return {strip, 0, scratch.matrix<T>(most, keys.d), scratch.matrix<T>(most * m, keys.tokens.cols()),
            scratch.matrix<T>(most, m)};
  }

  /// Turns to the landmarks of groups [groups.first, groups.last), at most kTileWidth.
  void look_from(const QueryGroups<T>& queries, Range groups, T scale) {
    const Index d = scaled.cols();
    first = groups.first;
    landmarks.count = groups.last - groups.first;
    landmarks.packets = static_cast<int>(packet_count<T>(landmarks.count));
    for (Index lane = 0; lane < landmarks.lanes(); lane += kLanes<T>) {
      const T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        const bool real = lane + i < landmarks.count;
        rows[i] = real ? queries.means.data() + (groups.first + lane + i) * d : nullptr;
        if (real) scale_row(scale, rows[i], scaled.data() + (lane + i) * d, d);
      }
      pack_rows<T>(rows, d, nullptr, scale, landmarks.panel + lane, landmarks.lanes());
    }
  }
};

/// Empties the first lanes of a state whose weighted has columns rows.
template <class T>
void clear(const LaneState<T>& state, Index lanes, Index columns) {
  std::fill_n(state.maximum, lanes, kNoMaximum<T>);
  std::fill_n(state.sum, lanes, T(0));
  std::fill_n(state.base, lanes, T(0));
  std::fill_n(state.weighted, lanes * round_up_to_tiles(columns), T(0));
}

/// Sums up clusters for landmarks. One for each worker.
template <class T>
class ClusterRunner {
 public:
  ClusterRunner(const Sources<T>& in, const KeyClusters<T>& keys, Scratch& scratch)
      : keys_(keys),
        kernel_({in.q, in.k, TokenRows<T>(ConstMatrixRef<T>(keys.tokens))}, Maximum::running, nullptr, scratch),
        state_(LaneState<T>::make(keys.tokens.cols(), scratch)) {}

  /// The summaries of cluster c.
  void summarize(Index c, const Summaries<T>& to) const {
    const Index width = keys_.tokens.cols(), lanes = to.landmarks.lanes(), m = keys_.clusters.count();
    clear(state_, lanes, width);
    for (Range some = keys_.clusters.range(c), all = some; some.first < all.last; some.first = some.last) {
      some.last = std::min(all.last, some.first + kTileKeys<T>);
      KeyTile<T> tile = keys_.tile(some);
      tile.v = tile.k;
      kernel_.add(to.landmarks, state_, tile, CausalLimits::kNone, {});
    }
    for (Index p = 0; p < lanes; p += kLanes<T>) {
      T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < to.landmarks.count ? to.tokens.data() + ((p + i) * m + c) * width : nullptr;
      }
      unpack_rows(state_.weighted + p, lanes, width, broadcast(T(1)) / load(state_.sum + p), rows);
    }
    alignas(64) T scores[array_size(kTileWidth<T>)];  // s l.k_c
    for (Index p = 0; p < lanes; p += kLanes<T>) {
      auto total = broadcast(T(0));
      for (Index x = 0; x < keys_.d; ++x) {
        total = multiply_add(load(to.landmarks.panel + x * lanes + p), load(state_.weighted + x * lanes + p), total);
      }
      store(scores + p, total / load(state_.sum + p));
    }
    for (Index i = 0; i < to.landmarks.count; ++i) {
      to.bias.data()[i * m + c] = state_.maximum[i] + std::log2(state_.sum[i]) - scores[i];
    }
  }

 private:
  const KeyClusters<T>& keys_;
  StripKernel<T> kernel_;
  LaneState<T> state_;
};

/// Some queries of a group, which share their near clusters; the number-th block of all. lane: the group's, in the
/// summaries.
struct QueryBlock {
  Range queries;
  Index number, lane;
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
  Index count(Index group) const { return first_[group + 1] - first_[group]; }

  QueryBlock block(Index group, Index i, Index lane) const {
    const Range range = groups_.range(group), part = nth_part(range.last - range.first, count(group), i);
    return {{range.first + part.first, range.first + part.last}, first_[group] + i, lane};
  }

 private:
  ClusteredRows groups_;
  Index width_;
  Index* first_;  ///< block of each group
};

/// What a forward pass keeps for a backward pass: near clusters of each block, ascending, at most so many side by side;
/// log-sums of all queries. Each null if it is not wanted.
template <class T, class Count = Index>
struct FieldRecord {
  Count *near, *near_count;
  Index most_near;
  std::conditional_t<std::is_const_v<Count>, const RowLog<T>, RowLog<T>>* lse;
};

/// Computes blocks of queries. One for each worker.
template <class T>
class FieldRunner {
 public:
  FieldRunner(const Product<T>& product, const KeyClusters<T>& keys, const QueryGroups<T>& groups, Index num_near,
              Scratch& scratch)
      : product_(product),
        keys_(keys),
        groups_(groups),
        num_near_(num_near),
        kernel_(product.in, Maximum::running, nullptr, scratch),
        state_(LaneState<T>::make(keys.d_v(), scratch)),
        strip_{},
        scores_(scratch.elements<T>(keys.clusters.count() * kTileWidth<T> + kTileRows * kTileWidth<T>)),
        statistics_(scratch.elements<T>(3 * kTileWidth<T>)),
        sum_of_hidden_(scratch.elements<T>(kTileWidth<T>)),
        squares_(scratch.elements<T>(kTileWidth<T>)),
        displacement_(scratch.elements<T>(keys.d)),
        terms_(scratch.elements<T>(keys.clusters.count())),
        near_(scratch.elements<Index>(keys.clusters.count())),
        rows_(scratch.elements<T>(kLanes<T> * std::max(keys.d, keys.d_v()))) {
    strip_.panel = scratch.elements<T>(kTileWidth<T> * keys.d);
    strip_.norm = scratch.elements<T>(kTileWidth<T>);
  }

  /// Rows of out of the block's queries.
  void attend(const QueryBlock& block, const Summaries<T>& summaries, const ResultRows<T>& out,
              const FieldRecord<T>& record) {
    load_queries(block);
    clear(state_, strip_.lanes(), keys_.d_v());
    score_clusters(block, summaries);
    const Index count = choose_near(block, summaries);
    add_far(block, summaries, count);
    for (Index i = 0; i < count;) {
      Index last = i + 1;
      while (last < count && near_[last] == near_[last - 1] + 1) ++last;
      add_near({keys_.clusters.range(near_[i]).first, keys_.clusters.range(near_[last - 1]).last});
      i = last;
    }
    write(block, out);
    if (record.lse == nullptr) return;
    record.near_count[block.number] = count;
    std::copy_n(near_, count, record.near + block.number * record.most_near);
    for (Index i = 0; i < strip_.count; ++i) {
      record.lse[groups_.groups.rows.data()[block.queries.first + i]] = {row_log_sum(state_.maximum[i], state_.sum[i]),
                                                                         T(0)};
    }
  }

 private:
  void load_queries(const QueryBlock& block) {
    const Index d = keys_.d;
    strip_.count = block.queries.last - block.queries.first;
    strip_.packets = static_cast<int>(packet_count<T>(strip_.count));
    for (Index lane = 0; lane < strip_.lanes(); lane += kLanes<T>) {
      const T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        rows[i] = lane + i < strip_.count
                      ? product_.in.q.row(groups_.groups.rows.data()[block.queries.first + lane + i], rows_ + i * d)
                      : nullptr;
      }
      const auto squares =
          pack_rows<T>(rows, d, product_.kernel.center, product_.kernel.scale, strip_.panel + lane, strip_.lanes());
      store(squares_ + lane, squares);
      store(strip_.norm + lane, broadcast(product_.kernel.bias) * squares);
    }
  }

  /// scores_ <- weights of the clusters, relative to the maximum of each query, which and whose sum the state gets.
  void score_clusters(const QueryBlock& block, const Summaries<T>& summaries) {
    const Index m = keys_.clusters.count(), lanes = strip_.lanes(), width = keys_.tokens.cols();
    T* const maximum = statistics_;
    std::fill_n(sum_of_hidden_, lanes, T(0));
    for (Index c = 0; c < m; c += kTileKeys<T>) {
      const T* const tokens = summaries.tokens.data() + (block.lane * m + c) * width;
      const Index count = std::min(m - c, kTileKeys<T>);
      const KeyTile<T> tile{.k = tokens,
                            .v = nullptr,
                            .bias = summaries.bias.data() + block.lane * m + c,
                            .k_stride = width,
                            .v_stride = 0,
                            .rows = nullptr,
                            .first = 0,
                            .count = count};
      with_packets<kTilePackets>(strip_.packets, [&](auto packets) {
        score_keys<packets>(tile, count, strip_.panel, keys_.d, scores_ + c * lanes, maximum, {});
      });
      for (Index p = 0; p < lanes; p += kLanes<T>) {
        store(state_.maximum + p, max(load(state_.maximum + p), load(maximum + p)));
      }
    }
    weigh(scores_, m, lanes, state_.maximum, std::numeric_limits<T>::infinity(), state_.sum);
  }

  /// near_ <- the clusters of the largest error terms, ascending. Returns how many.
  Index choose_near(const QueryBlock& block, const Summaries<T>& summaries) {
    const Index m = keys_.clusters.count(), count = std::min(num_near_, m);
    if (count == 0) return 0;
    T* const share = statistics_ + kTileWidth<T>;  // 1 / sum, 0 for lanes that do not count
    for (Index i = 0; i < strip_.lanes(); ++i) {
      const bool counts = is_finite(squares_[i]) && is_finite(state_.sum[i]);
      share[i] = counts && i < strip_.count ? 1 / state_.sum[i] : T(0);
      if (!counts) hide_query(i);
    }
    set_displacement(block, summaries, share);
    for (Index first = 0; first < m; first += kLanes<T>) {
      const T* variances[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        variances[i] = first + i < m ? keys_.key_variance.data() + (first + i) * keys_.d : nullptr;
      }
      alignas(64) T spread[array_size(kLanes<T>)];
      store(spread, dot_products<T>(variances, nullptr, displacement_, keys_.d));
      for (Index c = first; c < std::min(first + kLanes<T>, m); ++c) {
        auto total = broadcast(T(0));
        for (Index p = 0; p < strip_.lanes(); p += kLanes<T>) {
          total = multiply_add(load(scores_ + c * strip_.lanes() + p), load(share + p), total);
        }
        const T term = sum(total) * std::sqrt(spread[c - first]) * keys_.value_spread[c];
        terms_[c] = is_nan(term) ? std::numeric_limits<T>::infinity() : term;
        near_[c] = c;
      }
    }
    const auto errs_more = [&](Index a, Index b) { return terms_[a] > terms_[b] || (terms_[a] == terms_[b] && a < b); };
    std::nth_element(near_, near_ + count - 1, near_ + m, errs_more);
    sort_elements(near_, count);
    return count;
  }

  /// A query that is not finite must not have a say in what is near to others: it becomes 0, and its sum will be NaN.
  [[gnu::cold, gnu::noinline]] void hide_query(Index i) {
    sum_of_hidden_[i] = std::numeric_limits<T>::quiet_NaN();
    for (Index x = 0; x < keys_.d; ++x) strip_.panel[x * strip_.lanes() + i] = 0;
    for (Index c = 0; c < keys_.clusters.count(); ++c) scores_[c * strip_.lanes() + i] = 0;
  }

  /// displacement_ <- the summed squares of s (q - l), per coordinate.
  void set_displacement(const QueryBlock& block, const Summaries<T>& summaries, const T* share) {
    const T* const landmark = summaries.scaled.data() + block.lane * keys_.d;
    for (Index x = 0; x < keys_.d; ++x) {
      auto total = broadcast(T(0));
      for (Index p = 0; p < strip_.lanes(); p += kLanes<T>) {
        const auto difference = load(strip_.panel + x * strip_.lanes() + p) - broadcast(landmark[x]);
        const auto counts = min(load(share + p) * broadcast(std::numeric_limits<T>::max()), broadcast(T(1)));
        total = multiply_add(difference * difference, counts, total);
      }
      displacement_[x] = sum(total);
    }
  }

  /// The far clusters' values, by the weights in scores_, where those of near clusters become 0.
  void add_far(const QueryBlock& block, const Summaries<T>& summaries, Index count) {
    const Index m = keys_.clusters.count(), lanes = strip_.lanes(), width = keys_.tokens.cols();
    for (Index i = 0; i < count; ++i) std::fill_n(scores_ + near_[i] * lanes, lanes, T(0));
    T* const ones = statistics_ + 2 * kTileWidth<T>;
    std::fill_n(ones, lanes, T(1));
    std::copy_n(sum_of_hidden_, lanes, state_.sum);
    for (Index c = 0; c < m; ++c) {
      for (Index p = 0; p < lanes; p += kLanes<T>) {
        store(state_.sum + p, load(state_.sum + p) + load(scores_ + c * lanes + p));
      }
    }
    for (Index c = 0; c < m; c += kTileKeys<T>) {
      const T* const values = summaries.tokens.data() + (block.lane * m + c) * width + keys_.d;
      with_packets<kTilePackets>(strip_.packets, [&](auto packets) {
        add_values<packets>(values, width, keys_.d_v(), scores_ + c * lanes, std::min(m - c, kTileKeys<T>), ones,
                            state_.weighted, {});
      });
    }
  }

  void add_near(Range keys) const {
    for (Range some{keys.first, 0}; some.first < keys.last; some.first = some.last) {
      some.last = std::min(keys.last, some.first + kTileKeys<T>);
      kernel_.add(strip_, state_, keys_.tile(some), CausalLimits::kNone, {});
    }
  }

  void write(const QueryBlock& block, const ResultRows<T>& out) const {
    RowScales<T> scales;
    product_.set_scales(0, state_, strip_.norm, strip_.lanes(), &scales);
    for (Index p = 0; p < strip_.lanes(); p += kLanes<T>) {
      T* rows[kLanes<T>];
      const auto query = [&](Index i) { return groups_.groups.rows.data()[block.queries.first + p + i]; };
      for (Index i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < strip_.count ? out.row(query(i), rows_ + i * keys_.d_v()) : nullptr;
      }
      unpack_rows(state_.weighted + p, strip_.lanes(), keys_.d_v(), load(scales.first + p), rows);
      for (Index i = 0; i < kLanes<T>; ++i) {
        if (rows[i] == nullptr) continue;
        if (scales.twice) scale_row(scales.second[p + i], rows[i], rows[i], keys_.d_v());
        out.finish_row(query(i), rows[i]);
      }
    }
  }

  const Product<T>& product_;
  const KeyClusters<T>& keys_;
  const QueryGroups<T>& groups_;
  Index num_near_;
  StripKernel<T> kernel_;
  LaneState<T> state_;
  QueryStrip<T> strip_;
  T *scores_, *statistics_, *sum_of_hidden_, *squares_, *displacement_, *terms_;
  Index* near_;
  T* rows_;
};

}  // namespace attn::detail
