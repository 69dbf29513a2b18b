/// A strip of queries meets a tile of keys: the inner part of every streamed product.
///
///   for each key j of the tile:                  in registers, 8 (or 4) keys by 3 packets of queries at a time
///     score[j]  = scale q.k_j + bias_j           queries lie along the lanes: their statistics need no horizontal step
///     maximum   = max(maximum, score[j])
///   correction  = 2^(old maximum - maximum)
///   for each key j:
///     weight[j] = 2^(score[j] - maximum)
///     sum       = correction sum + weight[j]
///   for each column c of v:                      in registers, 8 (or 4) columns by 3 packets of queries at a time
///     weighted[c] = correction weighted[c] + sum_j v[j][c] weight[j]
///
/// Both products are register tiles: k row by row against the queries' panel, v column by column against the weights'
/// panel. Neither k nor v is packed; scores and weights of a tile live in one panel that stays in L1.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/far_pairs.hpp>
#include <attn/engine/query_strip.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>

#include <algorithm>
#include <array>
#include <limits>
#include <numbers>
#include <numeric>

namespace attn::detail {

/// Row states of a strip, queries along the lanes: beside its statistics what the weights seen so far add up to with
/// the values, weighted (d_v rows), which has room for whole tiles.
template <class T>
struct LaneState : RowStatistics<T> {
  T* weighted;

  [[gnu::noinline]] static LaneState make(Index d_v, Scratch& scratch) {
    T* const rows = scratch.elements<T>(kTileWidth<T> * (3 + round_up_to_tiles(d_v)));
    return {{rows, rows + kTileWidth<T>, rows + 2 * kTileWidth<T>}, rows + 3 * kTileWidth<T>};
  }
};

/// Where one of two states has a base, both get it.
template <class T>
void align_bases(const LaneState<T>& a, const LaneState<T>& b, Index lanes) {
  for (Index i = 0; i < lanes; ++i) {
    const T base = std::max(a.base[i], b.base[i]);
    a.maximum[i] -= base - a.base[i];
    b.maximum[i] -= base - b.base[i];
    a.base[i] = b.base[i] = base;
  }
}

/// total <- total and recent together, for lanes whose weighted has d_v rows.
template <class T>
inline void merge_lanes(const LaneState<T>& total, const LaneState<T>& recent, Index lanes, Index d_v) {
  align_bases(total, recent, lanes);
  for (Index p = 0; p < lanes; p += kLanes<T>) {
    const auto a = load(total.maximum + p), b = load(recent.maximum + p), top = max(a, b);
    const auto of_total = exp2_bounded(a - top), of_recent = exp2_bounded(b - top);
    store(total.maximum + p, top);
    store(total.sum + p, multiply_add(load(recent.sum + p), of_recent, load(total.sum + p) * of_total));
    for (Index c = 0; c < d_v; ++c) {
      T* to = total.weighted + c * lanes + p;
      store(to, multiply_add(load(recent.weighted + c * lanes + p), of_recent, load(to) * of_total));
    }
  }
}

/// tile[r][p] += bias[r]; where there are fewer biases than rows, the last one stands for those that are missing.
template <std::size_t kRowExtent, std::size_t kPacketExtent, class T>
[[gnu::always_inline]] inline void add_to_rows(const T* bias, Index count,
                                               Packet<T> (&tile)[kRowExtent][kPacketExtent]) {
#pragma GCC unroll 8
  for (int r = 0; r < static_cast<int>(kRowExtent); ++r) {
    const auto x = broadcast(bias[std::min<Index>(r, count - 1)]);
#pragma GCC unroll 4
    for (std::size_t p = 0; p < kPacketExtent; ++p) tile[r][p] = tile[r][p] + x;
  }
}

/// Features that are summed up at once, which keeps chains of sums short.
inline constexpr Index kFeaturesAtOnce = 256;

/// The products of a tile's keys, rows of them real, with the queries' features: sums of kFeaturesAtOnce at a time, all
/// but the last by way of the panel. Packets below kFirst may become anything.
template <int kPackets, int kFirst, class Feature, class T>
[[gnu::always_inline]] inline void multiply_features(const Feature* k, Index rows, Index k_stride,
                                                     const Feature* queries, Index d, T* panel,
                                                     Packet<T> (&score)[array_size(kTileRows)][array_size(kPackets)]) {
  for (Index first = 0;; first += kFeaturesAtOnce) {
    const Index count = std::min(d - first, kFeaturesAtOnce);
    multiply_tile<kFirst>(k + first, rows, k_stride, 1, queries + first * kPackets * kLanes<T>, count, score);
    if (first > 0) {
#pragma GCC unroll 32
      for (int i = 0; i < kTileRows * kPackets; ++i) {
        auto& x = score[i / kPackets][i % kPackets];
        x = x + load(panel + i * kLanes<T>);
      }
    }
    if (first + count == d) return;
#pragma GCC unroll 32
    for (int i = 0; i < kTileRows * kPackets; ++i) store(panel + i * kLanes<T>, score[i / kPackets][i % kPackets]);
  }
}

/// panel <- the scores of a register tile, packets from kFirst on; maximum follows.
template <int kPackets, int kFirst, class T>
[[gnu::always_inline]] inline void keep_scores(const Packet<T> (&score)[array_size(kTileRows)][array_size(kPackets)],
                                               T* panel, T* maximum) {
#pragma GCC unroll 4
  for (int p = kFirst; p < kPackets; ++p) {
    auto top = load(maximum + p * kLanes<T>);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      top = max(top, score[r][p]);
      store(panel + (r * kPackets + p) * kLanes<T>, score[r][p]);
    }
    store(maximum + p * kLanes<T>, top);
  }
}

/// Scores of keys [first, last) of count, whole tiles but at the end, for the packets of a strip from kFirst on, into a
/// panel with room for whole tiles; maximum follows. What keys have as a bias is added to the products at last, for a
/// sum that began with it would be rounded at its size all along.
template <int kPackets, int kFirst, class T>
[[gnu::noinline]] void score_some_keys(const KeyTile<T>& tile, Range keys, Index count, const T* queries, Index d,
                                       T* panel, T* maximum, const Prefetch& prefetch) {
  constexpr Index kStep = kTileRows * kPackets * kLanes<T>;
  panel += keys.first / kTileRows * kStep;
  for (Index j = keys.first; j < keys.last; j += kTileRows, panel += kStep) {
    prefetch.fetch(j, kTileRows, count);
    Packet<T> score[array_size(kTileRows)][array_size(kPackets)];
    multiply_features<kPackets, kFirst>(tile.k + j * tile.k_stride, count - j, tile.k_stride, queries, d, panel, score);
    if (tile.bias != nullptr) add_to_rows(tile.bias + j, count - j, score);
    keep_scores<kPackets, kFirst>(score, panel, maximum);
  }
}

/// Scores of count keys for a strip; their maximum into maximum.
template <int kPackets, class T>
void score_keys(const KeyTile<T>& tile, Index count, const T* queries, Index d, T* panel, T* maximum,
                const Prefetch& prefetch) {
  std::fill_n(maximum, kPackets * kLanes<T>, kNoMaximum<T>);  // in memory: the register tile needs the registers
  score_some_keys<kPackets, 0>(tile, {0, count}, count, queries, d, panel, maximum, prefetch);
}

/// panel <- panel + the key biases of count keys, counted from each query's own origin. Those of keys that a query must
/// not see may become any number.
template <class T>
[[gnu::noinline]] void add_key_bias(const KeyTile<T>& tile, Index count, const T* origin, Index lanes, T* panel) {
  for (Index j = 0; j < count; ++j, panel += lanes) {
    for (Index p = 0; p < lanes; p += kLanes<T>) {
      const auto bias = broadcast(std::numbers::log2e_v<T>) * (broadcast(tile.key_bias[j]) - load(origin + p));
      store(panel + p, load(panel + p) + bias);
    }
  }
}

/// shift <- what a tile's biases, counted from its own origins, lack to those counted from each query's, in units of
/// log2.
template <class T>
void set_bias_shift(const KeyTile<T>& tile, const T* origin, T slope, Index limit, Index lanes, T* shift) {
  for (Index i = 0; i < lanes; ++i) shift[i] = std::numbers::log2e_v<T> * (tile.bias_origin - origin[i]);
  for (Index i = 0; i < lanes && slope != 0; ++i) shift[i] += slope * static_cast<T>(tile.origin_row - limit - i);
}

/// row <- slope times how many rows from a key to the last one that each query sees, of which the first sees up to
/// limit, are left out: negative before that one.
template <class T>
void set_distances(T slope, Index key, Index limit, Index lanes, T* row) {
  for (Index i = 0; i < lanes; ++i) row[i] = slope * static_cast<T>(key - limit - i);
}

/// panel <- panel - slope times the distances of count keys, which leaves digits where they are needed: near ones have
/// small distances.
template <class T>
[[gnu::noinline]] void subtract_distances(const KeyTile<T>& tile, Index count, T slope, Index limit, Index lanes,
                                          T* panel) {
  alignas(64) T row[array_size(kTileWidth<T>)];
  for (Index j = 0; j < count; ++j, panel += lanes) {
    set_distances(slope, tile.row(j), limit, lanes, row);
    for (Index p = 0; p < lanes; p += kLanes<T>) store(panel + p, load(panel + p) + load(row + p));
  }
}

/// The count first elements of some packets of lanes <- x.
template <class T>
inline void fill_lanes(T* lanes, Index count, T x, Packet<T> numbers) {
  for (; count >= kLanes<T>; count -= kLanes<T>, lanes += kLanes<T>) store(lanes, broadcast(x));
  if (count > 0) store(lanes, select_positive(broadcast(static_cast<T>(count)) - numbers, broadcast(x), load(lanes)));
}

/// Scores in a panel of keys that a query must not see become hidden, whatever they were. limit as in
/// KeyTile::seen_by.
template <class T>
[[gnu::noinline]] void hide_future(const KeyTile<T>& tile, const SeenKeys& seen, Index limit, T hidden, Index lanes,
                                   T* panel) {
  alignas(64) T numbers[array_size(kLanes<T>)];
  std::iota(numbers, numbers + kLanes<T>, T(0));
  for (Index j = seen.by_all; j < seen.count; ++j) {
    fill_lanes(panel + j * lanes, std::min(tile.row(j) - limit, lanes), hidden, load(numbers));
  }
}

/// The same for keys that a window has left behind for the later ones of the queries.
template <class T>
[[gnu::noinline]] void hide_past(const KeyTile<T>& tile, const SeenKeys& seen, Index limit, Index window, T hidden,
                                 Index lanes, T* panel) {
  for (Index j = seen.past.first; j < seen.past.last; ++j) {
    const Index first = std::clamp<Index>(tile.row(j) - limit + window, 0, lanes);
    std::fill_n(panel + j * lanes + first, lanes - first, hidden);
  }
}

/// Turns a panel of scores into weights relative to maximum, and adds them to sum. No exponent is above limit: 0 where
/// there is no maximum, for rounding may lift scores above that (where the last digit of |q|^2 is above 1, their
/// weights could be any numbers).
template <class T>
[[gnu::noinline]] void weigh(T* panel, Index count, Index lanes, const T* maximum, T limit, T* sum) {
  for (Index p = 0; p < lanes; p += kLanes<T>) {
    store(sum + p, load(sum + p) + weigh_packets(panel + p, count, lanes, load(maximum + p), limit));
  }
}

/// weighted <- correction weighted + tile.
template <std::size_t kRowExtent, std::size_t kPacketExtent, class T>
[[gnu::always_inline]] inline void correct_and_add(const Packet<T> (&tile)[kRowExtent][kPacketExtent],
                                                   const T* correction, T* weighted) {
#pragma GCC unroll 32
  for (std::size_t i = 0; i < kRowExtent * kPacketExtent; ++i, weighted += kLanes<T>) {
    const auto correct = load(correction + i % kPacketExtent * array_size(kLanes<T>));
    store(weighted, multiply_add(load(weighted), correct, tile[i / kPacketExtent][i % kPacketExtent]));
  }
}

/// weighted <- correction weighted + v^T weights, over count keys, or pairs of them. weighted has room for whole tiles.
template <int kPackets, class Value, class T>
[[gnu::noinline]] void add_values(const Value* v, Index v_stride, Index d_v, const Value* weights, Index count,
                                  const T* correction, T* weighted, const Prefetch& prefetch) {
  for (Index c = 0; c < d_v; c += kTileRows) {
    prefetch.fetch(c, kTileRows, d_v);
    Packet<T> tile[array_size(kTileRows)][array_size(kPackets)];
    multiply_tile(v + c, d_v - c, 1, v_stride, weights, count, tile);
    correct_and_add(tile, correction, weighted);
    weighted += kTileRows * kPackets * kLanes<T>;
  }
}

/// Feeds strips with tiles of keys that all queries see. One for each worker: it owns the panel of weights and a few
/// rows of statistics.
template <class T>
class StripKernel {
 public:
  /// far_pairs: null where no token is far from a center.
  StripKernel(const Sources<T>& in, Maximum maximum, const FarPairs<T>* far_pairs, Scratch& scratch)
      : d_(in.q.cols()),
        d_v_(in.v.cols()),
        maximum_(maximum),
        far_pairs_(far_pairs),
        panel_(scratch.elements<T>(kTileKeys<T> * kTileWidth<T>)),
        tile_maximum_(scratch.elements<T>(kTileWidth<T>)),
        correction_(scratch.elements<T>(kTileWidth<T>)) {}

  /// Adds the keys of a tile to the state of a strip, whose first query sees row numbers up to limit, as in
  /// KeyTile::seen_by. prefetch: what is used next, fetched during the first product and during the second.
  [[gnu::noinline]] virtual void add(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile,
                                     Index /*limit*/, const std::array<Prefetch, 2>& prefetch) const {
    add_keys(strip, state, tile, tile.count, prefetch);
  }

  /// Loads the queries of a strip, as QueryStrip::load does.
  virtual void load_queries(QueryStrip<T>& strip, const Product<T>& product, T* buffer) const {
    strip.load(product, buffer);
  }

  /// What reads the tiles to be added.
  virtual const KeyReader<T>& reader(const Product<T>& product, Scratch& scratch) const {
    return *scratch.make<KeyReader<T>>(1, product.in, product.kernel, scratch);
  }

  /// maximum <- at least the largest score of a tile's keys, which are to be added, but for rounding: what is as
  /// nothing beside them is passed over from the beginning. For strips that are far from the center.
  void expect(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile) const {
    score(strip, tile, PacketCounts::whole(tile.count), {});
    far_pairs_->expect(strip, tile, tile_maximum_, state.maximum);
  }

 protected:
  /// Adds the first count keys of a tile, which all queries see.
  void add_keys(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile, Index count,
                const std::array<Prefetch, 2>& prefetch) const {
    if (count == 0) return;
    const PacketCounts counts = PacketCounts::whole(count);
    score(strip, tile, counts, prefetch[0]);
    if (adds_nothing(strip, state, tile)) return;
    if (strip.far) refine(strip, state, tile, count);
    raise_maximum(strip, state, tile_maximum_);
    weigh_keys(strip, state, counts, state.maximum);
    add_weighted(strip, state, tile, counts, prefetch[1]);
  }

  /// panel_ <- scores, tile_maximum_ <- their maximum.
  virtual void score(const QueryStrip<T>& strip, const KeyTile<T>& tile, const PacketCounts& counts,
                     const Prefetch& prefetch) const {
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      score_keys<packets>(tile, counts.all(), strip.panel, d_, panel_, tile_maximum_, prefetch);
    });
  }

  /// Whether a tile with such scores has nothing to add.
  bool adds_nothing(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile) const {
    return strip.far && far_pairs_->adds_nothing(strip, tile, tile_maximum_, state);
  }

  /// Scores of pairs that are far from the center and near each other are mended.
  [[gnu::noinline]] void refine(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile,
                                Index count) const {
    if (maximum_ == Maximum::running) {
      far_pairs_->find_near(strip, tile, count, panel_, tile_maximum_, state.base, state.maximum);
    }
    far_pairs_->refine(strip, tile, count, state.base, state.maximum, panel_, tile_maximum_);
  }

  /// maximum <- max(maximum, that of a tile); correction and sum follow.
  void raise_maximum(const QueryStrip<T>& strip, const LaneState<T>& state, const T* of_tile) const {
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      if (maximum_ == Maximum::none) {
        store(correction_ + p, broadcast(T(1)));
        continue;
      }
      const auto before = load(state.maximum + p), after = max(before, load(of_tile + p));
      const auto correction = exp2_bounded(before - after);
      store(state.maximum + p, after);
      store(correction_ + p, correction);
      store(state.sum + p, load(state.sum + p) * correction);
    }
  }

  /// Turns scores into weights relative to top.
  virtual void weigh_keys(const QueryStrip<T>& strip, const LaneState<T>& state, const PacketCounts& counts,
                          const T* top) const {
    weigh(panel_, counts.all(), strip.lanes(), top, highest_exponent<T>(maximum_), state.sum);
  }

  /// Adds the values of a tile's keys with these weights.
  virtual void add_weighted(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile,
                            const PacketCounts& counts, const Prefetch& prefetch) const {
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      add_values<packets>(tile.v, tile.v_stride, d_v_, panel_, counts.all(), correction_, state.weighted, prefetch);
    });
  }

  Index d_, d_v_;
  Maximum maximum_;
  const FarPairs<T>* far_pairs_;
  T *panel_, *tile_maximum_, *correction_;
};

template <class T>
const StripKernel<T>& make_strip_kernel(const Product<T>& product, Scratch& scratch) {
  const FarPairs<T>* const far_pairs = product.far_pairs(scratch);
  return *scratch.make<StripKernel<T>>(1, product.in, product.maximum, far_pairs, scratch);
}

}  // namespace attn::detail
