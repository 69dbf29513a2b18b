/// States of causal queries, and what adds to them: recent keys as they are, and nodes of the past as landmarks see
/// them.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/causal_layout.hpp>
#include <attn/detail/causal_nodes.hpp>
#include <attn/detail/field_choice.hpp>
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
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <array>
#include <limits>
#include <numbers>
#include <span>

namespace attn::detail {

/// row_i[c] <- factor_i row_i[c] + of_lanes panel[c] of lane i. Null rows are skipped.
template <class T>
void merge_rows(const T* panel, Index stride, Index d, Packet<T> of_lanes, const T* factor,
                T* const (&rows)[kLanes<T>]) {
  for (Index first = 0; first < d; first += kLanes<T>) {
    Packet<T> block[kLanes<T>];
    for (Index c = 0; c < kLanes<T>; ++c) {
      block[c] = first + c < d ? load(panel + (first + c) * stride) * of_lanes : broadcast(T(0));
    }
    transpose(block);
    for (Index i = 0; i < kLanes<T>; ++i) {
      if (rows[i] == nullptr) continue;
      store_row(rows[i], first, d, multiply_add(load_row(rows[i], first, d), broadcast(factor[i]), block[i]));
    }
  }
}

/// What all queries have added up so far, by row number: weights are relative to 2^maximum, and to the origin of key
/// biases that each query has.
template <class T>
struct CausalRows {
  T *maximum, *sum;
  MatrixRef<T> weighted;  ///< (n_q, d_v), not set where a sum is 0

  static CausalRows make(Index n_q, Index d_v, Scratch& scratch) {
    const CausalRows made{scratch.elements<T>(n_q), scratch.elements<T>(n_q), scratch.matrix<T>(n_q, d_v)};
    std::fill_n(made.maximum, n_q, kNoMaximum<T>);
    std::fill_n(made.sum, n_q, T(0));
    return made;
  }

  /// The state of a strip, the first one of its rows. row(i): the row number of lane i, or negative where there is
  /// none.
  template <class Row>
  void set(const LaneState<T>& state, Index lanes, const Row& row) const {
    for (Index p = 0; p < lanes; p += kLanes<T>) {
      T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        const Index at = row(p + i);
        rows[i] = at < 0 ? nullptr : row_of(weighted, at);
        if (at < 0) continue;
        maximum[at] = state.maximum[p + i];
        sum[at] = state.sum[p + i];
      }
      unpack_rows(state.weighted + p, lanes, weighted.cols(), broadcast(T(1)), rows);
    }
  }

  /// Adds the state of a strip with the given rows, count of them; shift(row): what its maxima lack to those of a row.
  template <class Shift>
  void add(const LaneState<T>& state, Index lanes, const Index* numbers, Index count, const Shift& shift) const {
    for (Index p = 0; p < count; p += kLanes<T>) {
      alignas(64) T before[array_size(kLanes<T>)], more[array_size(kLanes<T>)], sums[array_size(kLanes<T>)];
      T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        const Index at = numbers[std::min(p + i, count - 1)];
        rows[i] = p + i < count ? row_of(weighted, at) : nullptr;
        before[i] = maximum[at];
        sums[i] = sum[at];
        more[i] = state.maximum[p + i] + shift(at);
      }
      const auto top = max(load(before), load(more));
      const auto of_row = exp2_bounded(load(before) - top), of_strip = exp2_bounded(load(more) - top);
      store(sums, multiply_add(load(state.sum + p), of_strip, load(sums) * of_row));
      store(before, of_row);
      store(more, top);
      merge_rows(state.weighted + p, lanes, weighted.cols(), of_strip, before, rows);
      for (Index i = 0; i < kLanes<T> && p + i < count; ++i) {
        maximum[numbers[p + i]] = more[i];
        sum[numbers[p + i]] = sums[i];
      }
    }
  }
};

/// Queries in a row of which the first sees recent keys from the given one on.
struct RecentBlock {
  Range rows;  ///< row numbers, some of which masks may drop
  Range keys;  ///< from the first recent one up to the last that any query sees, among those that masks keep
};

/// Adds recent keys to rows. One for each worker.
template <class T>
class RecentRunner {
 public:
  static constexpr Index kStrips = 4, kRows = kStrips * kTileWidth<T>;

  RecentRunner(const Product<T>& product, Scratch& scratch)
      : product_(product),
        reader_(product.in, product.kernel, scratch),
        kernel_(product.in.mask.make_kernel(product, scratch)),
        rows_(scratch.elements<T>(kLanes<T> * std::max(product.in.q.cols(), product.in.v.cols()))) {
    for (Lanes& strip : strips_) {
      strip.queries = QueryStrip<T>::make(product, scratch);
      strip.state = LaneState<T>::make(product.in.v.cols(), scratch);
    }
  }

  void attend(const CausalTokens& tokens, const RecentBlock& block, const CausalRows<T>& to) {
    count_ = 0;
    for (Index row = block.rows.first; row < block.rows.last; row += kTileWidth<T>) {
      open(strips_[count_++], {row, std::min(block.rows.last, row + kTileWidth<T>)});
    }
    const auto tile = [&](Index first) {  // a whole one
      return Range{first, std::min(static_cast<Index>(tokens.keys.size()), first + kTileKeys<T>)};
    };
    for (Index first = block.keys.first; first < block.keys.last; first += kTileKeys<T>) {
      const Index next = std::min(first + kTileKeys<T>, block.keys.last);
      add(tokens, tile(first), next < block.keys.last ? tile(next) : Range{0, 0});
    }
    for (Index s = 0; s < count_; ++s) {
      const QueryStrip<T>& queries = strips_[s].queries;
      to.set(strips_[s].state, queries.lanes(),
             [&](Index i) { return queries.holds(product_, i) ? queries.first + i : -1; });
    }
  }

 private:
  struct Lanes {
    QueryStrip<T> queries;
    LaneState<T> state;
  };

  void open(Lanes& strip, Range rows) {
    QueryStrip<T>& queries = strip.queries;
    queries.first = rows.first;
    queries.count = rows.last - rows.first;
    queries.packets = static_cast<int>(packet_count<T>(queries.count));
    queries.load(product_, rows_);
    queries.far = false;
    const Index lanes = queries.lanes();
    std::fill_n(strip.state.maximum, lanes, kNoMaximum<T>);
    std::fill_n(strip.state.sum, lanes, T(0));
    std::fill_n(strip.state.base, lanes, T(0));
    std::fill_n(strip.state.weighted, lanes * round_up_to_tiles(product_.in.v.cols()), T(0));
  }

  /// The first strip has fetched values, and the next keys, for all.
  void add(const CausalTokens& tokens, Range some, Range next) {
    const Range rows = tokens.rows(some);
    KeyTile<T> tile = reader_.read(rows.first, rows.last);
    tile.whole = some.last - some.first == kTileKeys<T>;  // the last one grows with the tokens
    std::array<Prefetch, 2> prefetch{Prefetch::of(product_.in.v.memory(), rows),
                                     Prefetch::of(product_.in.k.memory(), tokens.rows(next))};
    for (Index s = 0; s < count_; ++s) {
      const QueryStrip<T>& queries = strips_[s].queries;
      kernel_.add(queries, strips_[s].state, tile, product_.limits.of(queries.first), prefetch);
      prefetch = {};
    }
  }

  const Product<T>& product_;
  KeyReader<T> reader_;
  const StripKernel<T>& kernel_;
  T* rows_;
  Lanes strips_[kStrips];
  Index count_ = 0;
};

/// Adds nodes of one size to rows. One for each worker.
template <class T>
class NodeRunner {
 public:
  NodeRunner(const Product<T>& product, const KeyClusters<T>& node, Scratch& scratch)
      : product_(product),
        keys_(node),
        near_keys_(node, scratch),
        kernel_(product.in, Maximum::running, nullptr, scratch),
        rows_(scratch.elements<T>(kLanes<T> * std::max(node.d, node.d_v))),
        strips_(scratch.make<FieldStrip<T>>(kStrips, node.d, node.d_v, kNoBranches, scratch)) {}

  /// Rows of those numbers, which all have the same landmark. shift(row): as in CausalRows::add.
  template <class Shift>
  void attend(const NodeView<T>& view, std::span<const Index> rows, const Shift& shift, const CausalRows<T>& to) {
    constexpr auto kRows = static_cast<std::size_t>(kStrips * kTileWidth<T>);
    for (; !rows.empty(); rows = rows.subspan(std::min(rows.size(), kRows))) {
      load(rows.first(std::min(rows.size(), kRows)));
      if (count_ == 1) fetch_near(view);
      const MemoryRows far = MemoryRows::of(view.far.tokens);
      for (Index c = 0; c < far.rows; c += kTileKeys<T>) {
        const Index next = std::min(far.rows, c + kTileKeys<T>), half = next + kTileKeys<T> / 2;
        add(view.far.tile({c, next}, keys_.value_offset()),
            {Prefetch::of(far, {next, half}), Prefetch::of(far, {half, next + kTileKeys<T>})});
      }
      near_keys_.for_each_tile(view.others, view.near, [&](const KeyTile<T>& tile) { add(tile, {}); });
      for (Index s = 0; s < count_; ++s) {
        const FieldStrip<T>& strip = strips_[s];
        to.add(strip.state, strip.lanes(), rows.data() + s * kTileWidth<T>, strip.queries.count, shift);
      }
    }
  }

 private:
  static constexpr Index kStrips = 8, kNoBranches = 0;

  void load(std::span<const Index> rows) {
    count_ = 0;
    for (Index first = 0, n = static_cast<Index>(rows.size()); first < n; first += kTileWidth<T>) {
      FieldStrip<T>& strip = strips_[count_++];
      strip.load(product_, rows.data() + first, std::min(n - first, kTileWidth<T>), rows_);
      strip.clear(keys_.d_v);
    }
  }

  /// Near keys come late, and from many places.
  void fetch_near(const NodeView<T>& view) const {
    const MemoryRows rows = MemoryRows::of(keys_.tokens);
    for (const Index c : view.near) Prefetch::of(rows, keys_.tree.parts.range(c)).fetch();
  }

  /// prefetch: what is used next, which a single strip has not at hand.
  void add(const KeyTile<T>& tile, const std::array<Prefetch, 2>& prefetch) const {
    for (Index s = 0; s < count_; ++s) {
      kernel_.add(strips_[s].queries, strips_[s].state, tile, CausalLimits::kNone,
                  count_ == 1 ? prefetch : std::array<Prefetch, 2>{});
    }
  }

  const Product<T>& product_;
  const KeyClusters<T>& keys_;
  NearKeys<T> near_keys_;
  StripKernel<T> kernel_;
  T* rows_;
  FieldStrip<T>* strips_;
  Index count_ = 0;
};

/// Which landmark of a node is nearest to each query. One for each worker.
template <class T>
class NearestLandmarks {
 public:
  NearestLandmarks(const Product<T>& product, Index most, Scratch& scratch)
      : product_(product),
        strip_(product.in.q.cols(), product.in.v.cols(), most, scratch),
        maximum_(scratch.elements<T>(kTileWidth<T>)),
        rows_(scratch.elements<T>(kLanes<T> * product.in.q.cols())) {}

  /// nearest (count, at most a strip) <- which of some landmarks it is for rows of the given numbers; ties go to the
  /// lower number.
  void find(const NodeLandmarks<T>& landmarks, Range some, const Index* rows, Index count, Index* nearest) {
    strip_.load(product_, rows, count, rows_);
    const Index n = some.last - some.first, lanes = strip_.lanes();
    for (Index l = 0; l < n; l += kTileKeys<T>) {
      const KeyTile<T> tile = landmarks.tile({some.first + l, some.first + std::min(n, l + kTileKeys<T>)});
      with_packets<kTilePackets>(strip_.queries.packets, [&](auto packets) {
        score_keys<packets>(tile, tile.count, strip_.queries.panel, product_.in.q.cols(), strip_.weights + l * lanes,
                            maximum_, {});
      });
    }
    std::copy_n(strip_.weights, lanes, maximum_);
    std::fill_n(nearest, count, Index{0});
    for (Index l = 1; l < n; ++l) {
      for (Index i = 0; i < count; ++i) {
        if (!(strip_.weights[l * lanes + i] > maximum_[i])) continue;
        maximum_[i] = strip_.weights[l * lanes + i];
        nearest[i] = l;
      }
    }
  }

 private:
  const Product<T>& product_;
  FieldStrip<T> strip_;
  T *maximum_, *rows_;
};

}  // namespace attn::detail
