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

/// tile[r][p] += the packets of a panel.
template <std::size_t kRowExtent, std::size_t kPacketExtent, class T>
[[gnu::always_inline]] inline void add_panel(const T* panel, Packet<T> (&tile)[kRowExtent][kPacketExtent]) {
#pragma GCC unroll 32
  for (std::size_t i = 0; i < kRowExtent * kPacketExtent; ++i) {
    auto& x = tile[i / kPacketExtent][i % kPacketExtent];
    x = x + load(panel + static_cast<Index>(i) * kLanes<T>);
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

/// panel <- the products of kTileRows keys, rows of them real, with the queries' features but for the last
/// kFeaturesAtOnce at most; returns how many features that are.
template <int kPackets, class T>
[[gnu::noinline]] Index score_first_features(const T* k, Index rows, Index k_stride, const T* queries, Index d,
                                             T* panel) {
  constexpr Index kWidth = kPackets * kLanes<T>;
  Index first = 0;
  for (; d - first > kFeaturesAtOnce; first += kFeaturesAtOnce) {
    Packet<T> score[array_size(kTileRows)][array_size(kPackets)];
    multiply_tile(k + first, rows, k_stride, 1, queries + first * kWidth, kFeaturesAtOnce, score);
#pragma GCC unroll 32
    for (int i = 0; i < kTileRows * kPackets; ++i) {
      const auto x = score[i / kPackets][i % kPackets];
      store(panel + i * kLanes<T>, first == 0 ? x : x + load(panel + i * kLanes<T>));
    }
  }
  return first;
}

/// Scores of count keys for a strip, into a panel with room for whole tiles; their maximum into maximum. What keys have
/// as a bias is added to the products at last, for a sum that began with it would be rounded at its size all along.
template <int kPackets, class T>
[[gnu::noinline]] void score_keys(const KeyTile<T>& tile, Index count, const T* queries, Index d, T* panel, T* maximum,
                                  const Prefetch& prefetch) {
  std::fill_n(maximum, kPackets * kLanes<T>, kNoMaximum<T>);  // in memory: the register tile needs the registers
  for (Index j = 0; j < count; j += kTileRows, panel += kTileRows * kPackets * kLanes<T>) {
    prefetch.fetch(j, kTileRows, count);
    const T* const k = tile.k + j * tile.k_stride;
    const Index first =
        d <= kFeaturesAtOnce ? 0 : score_first_features<kPackets>(k, count - j, tile.k_stride, queries, d, panel);
    Packet<T> score[array_size(kTileRows)][array_size(kPackets)];
    multiply_tile(k + first, count - j, tile.k_stride, 1, queries + first * kPackets * kLanes<T>, d - first, score);
    if (first > 0) add_panel(panel, score);
    if (tile.bias != nullptr) add_to_rows(tile.bias + j, count - j, score);
#pragma GCC unroll 4
    for (int p = 0; p < kPackets; ++p) {
      auto top = load(maximum + p * kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        top = max(top, score[r][p]);
        store(panel + (r * kPackets + p) * kLanes<T>, score[r][p]);
      }
      store(maximum + p * kLanes<T>, top);
    }
  }
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

/// shift <- what a tile's biases, counted from tile_origin, lack to those counted from each query's own origin, in
/// units of log2.
template <class T>
void set_bias_shift(T tile_origin, const T* origin, Index lanes, T* shift) {
  for (Index i = 0; i < lanes; ++i) shift[i] = std::numbers::log2e_v<T> * (tile_origin - origin[i]);
}

/// Scores in a panel of keys that a query must not see become hidden, whatever they were. limit as in
/// KeyTile::seen_by.
template <class T>
void hide_future(const KeyTile<T>& tile, const SeenKeys& seen, Index limit, T hidden, Index lanes, T* panel) {
  for (Index j = seen.by_all; j < seen.count; ++j) {
    std::fill_n(panel + j * lanes, std::min(tile.row(j) - limit, lanes), hidden);
  }
}

/// Turns a panel of scores into weights relative to maximum, and adds them to sum. No exponent is above limit: 0 where
/// there is no maximum, for rounding may lift scores above that (where the last digit of |q|^2 is above 1, their
/// weights could be any numbers).
template <int kPackets, class T>
[[gnu::noinline]] void weigh(T* panel, Index count, const T* maximum, T limit, T* sum) {
  Packet<T> top[array_size(kPackets)], total[array_size(kPackets)];
#pragma GCC unroll 4
  for (int p = 0; p < kPackets; ++p) {
    top[p] = load(maximum + p * kLanes<T>);
    total[p] = broadcast(T(0));
  }
  for (Index j = 0; j < count; ++j, panel += kPackets * kLanes<T>) {
#pragma GCC unroll 4
    for (int p = 0; p < kPackets; ++p) {
      const auto weight = exp2_bounded(min(load(panel + p * kLanes<T>) - top[p], broadcast(limit)));
      total[p] = total[p] + weight;
      store(panel + p * kLanes<T>, weight);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPackets; ++p) store(sum + p * kLanes<T>, load(sum + p * kLanes<T>) + total[p]);
}

/// weighted <- correction weighted + v^T weights, over count keys. weighted has room for whole tiles.
template <int kPackets, class T>
[[gnu::noinline]] void add_values(const T* v, Index v_stride, Index d_v, const T* weights, Index count,
                                  const T* correction, T* weighted, const Prefetch& prefetch) {
  for (Index c = 0; c < d_v; c += kTileRows) {
    prefetch.fetch(c, kTileRows, d_v);
    Packet<T> tile[array_size(kTileRows)][array_size(kPackets)];
    multiply_tile(v + c, d_v - c, 1, v_stride, weights, count, tile);
#pragma GCC unroll 32
    for (int i = 0; i < kTileRows * kPackets; ++i, weighted += kLanes<T>) {
      const auto correct = load(correction + i % kPackets * kLanes<T>);
      store(weighted, multiply_add(load(weighted), correct, tile[i / kPackets][i % kPackets]));
    }
  }
}

/// Feeds strips with tiles of keys. One for each worker: it owns the panel of weights and a few rows of statistics.
template <class T>
class StripKernel {
 public:
  StripKernel(const Sources<T>& in, T bias, Maximum maximum, Scratch& scratch)
      : d_(in.q.cols()),
        d_v_(in.v.cols()),
        maximum_(maximum),
        far_pairs_(in, bias, maximum, scratch),
        panel_(scratch.elements<T>(kTileKeys<T> * kTileWidth<T>)),
        tile_maximum_(scratch.elements<T>(kTileWidth<T>)),
        correction_(scratch.elements<T>(kTileWidth<T>)),
        shift_(scratch.elements<T>(kTileWidth<T>)),
        shifted_maximum_(scratch.elements<T>(kTileWidth<T>)),
        finite_values_(scratch.elements<T>(kTileKeys<T> * d_v_)) {}

  /// Adds the keys of a tile to the state of a strip, whose first query sees row numbers up to limit, as in
  /// KeyTile::seen_by. prefetch: what is used next, fetched during the first product and during the second.
  void add(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile, Index limit,
           const std::array<Prefetch, 2>& prefetch) const {
    const SeenKeys seen = tile.seen_by(strip.count, limit);
    if (seen.count == 0) return;
    const bool own_origins = strip.bias_origin != nullptr, adds_bias = own_origins && !tile.seen_wholly(seen);
    const KeyTile<T> scored = adds_bias ? tile.without_key_bias() : tile;
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      score_keys<packets>(scored, seen.count, strip.panel, d_, panel_, tile_maximum_, prefetch[0]);
    });
    if (strip.far && adds_nothing(strip, state, tile)) return;
    hide(strip, tile, seen, limit);
    if (strip.far) refine(strip, state, scored, seen.count);
    if (adds_bias) {
      add_key_bias(tile, seen.count, strip.bias_origin, strip.lanes(), panel_);
      hide(strip, tile, seen, limit);
    }
    if (seen.partly() || adds_bias) set_tile_maximum(seen.count, strip.lanes());
    const T* const top = own_origins && !adds_bias ? raise_shifted(strip, state, tile.bias_origin)
                                                   : raise_maximum(strip, state, tile_maximum_);
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      weigh<packets>(panel_, seen.count, top, highest_exponent<T>(maximum_), state.sum);
    });
    // A weight of 0 hides a value that is finite.
    if (seen.partly() && !tile.values().finite_keys(seen.by_all, seen.count, d_v_)) {
      return add_seen_values(strip, state, tile, seen.count, limit);
    }
    add_weighted(strip, state, tile.v, tile.v_stride, seen.count, prefetch[1]);
  }

  /// maximum <- at least the largest score of a tile's keys, which are to be added, but for rounding: what is as
  /// nothing beside them is passed over from the beginning.
  void expect(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile) const {
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      score_keys<packets>(tile, tile.count, strip.panel, d_, panel_, tile_maximum_, {});
    });
    T most_norm = 0;
    for (Index j = 0; j < tile.count; ++j) most_norm = std::max(most_norm, -tile.norm_bias[j]);
    for (Index i = 0; i < strip.lanes(); ++i) {
      state.maximum[i] = std::max(state.maximum[i], tile_maximum_[i] - score_rounding(strip.norm[i] + most_norm));
    }
  }

 private:
  [[gnu::noinline]] void hide(const QueryStrip<T>& strip, const KeyTile<T>& tile, const SeenKeys& seen,
                              Index limit) const {
    hide_future(tile, seen, limit, -std::numeric_limits<T>::infinity(), strip.lanes(), panel_);
  }

  /// Whether all weights of a tile's scores, whose maxima are known, are 0, and all that they hide is finite.
  [[gnu::noinline]] bool adds_nothing(const QueryStrip<T>& strip, const LaneState<T>& state,
                                      const KeyTile<T>& tile) const {
    if (!tile.finite || !strip.finite || tile.key_bias != nullptr) return false;
    const auto rounding = broadcast(score_rounding(T(1)));
    auto most = broadcast(std::numeric_limits<T>::lowest());
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      const auto score = load(tile_maximum_ + p) - load(state.base + p) - load(state.maximum + p);
      most = max(most, multiply_add(rounding, load(strip.norm + p), score));
    }
    return largest(most) < -std::max(matters_above<T>(maximum_), T(Exp2<T>::kBias));
  }

  /// Scores of pairs that are far from the center and near each other are mended.
  [[gnu::noinline]] void refine(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile,
                                Index count) const {
    if (maximum_ == Maximum::running) {
      far_pairs_.find_near(strip, tile, count, panel_, tile_maximum_, state.base, state.maximum);
    }
    far_pairs_.refine(strip, tile, count, state.base, state.maximum, panel_, tile_maximum_);
  }

  [[gnu::noinline]] void set_tile_maximum(Index count, Index lanes) const {
    for (Index p = 0; p < lanes; p += kLanes<T>) {
      auto top = broadcast(kNoMaximum<T>);
      for (Index j = 0; j < count; ++j) top = max(top, load(panel_ + j * lanes + p));
      store(tile_maximum_ + p, top);
    }
  }

  /// maximum <- max(maximum, that of a tile); correction and sum follow. Returns what the tile's weights are relative
  /// to: the maximum.
  const T* raise_maximum(const QueryStrip<T>& strip, const LaneState<T>& state, const T* of_tile) const {
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
    return state.maximum;
  }

  /// raise_maximum for a tile whose biases are counted from another origin than those of each query, which is no
  /// smaller. The weights are relative to the maximum as counted from the tile's origin; where that is too far below to
  /// be told from it, to the tile's own.
  [[gnu::noinline]] const T* raise_shifted(const QueryStrip<T>& strip, const LaneState<T>& state, T tile_origin) const {
    set_bias_shift(tile_origin, strip.bias_origin, strip.lanes(), shift_);
    for (Index i = 0; i < strip.lanes(); ++i) shifted_maximum_[i] = tile_maximum_[i] + shift_[i];
    raise_maximum(strip, state, shifted_maximum_);
    for (Index i = 0; i < strip.lanes(); ++i) {
      shifted_maximum_[i] = std::max(state.maximum[i] - shift_[i], tile_maximum_[i]);
    }
    return shifted_maximum_;
  }

  void add_weighted(const QueryStrip<T>& strip, const LaneState<T>& state, const T* v, Index v_stride, Index count,
                    const Prefetch& prefetch) const {
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      add_values<packets>(v, v_stride, d_v_, panel_, count, correction_, state.weighted, prefetch);
    });
  }

  /// add_values where 0 times a value may be NaN: the finite values for all queries, then the others for those that see
  /// them. A query that sees only finite ones gets the bits that it would get from add_values.
  [[gnu::noinline]] void add_seen_values(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile,
                                         Index count, Index limit) const {
    for (Index j = 0; j < count; ++j) {
      for (Index c = 0; c < d_v_; ++c) {
        const T x = tile.v[j * tile.v_stride + c];
        finite_values_[j * d_v_ + c] = is_finite(x) ? x : T(0);
      }
    }
    add_weighted(strip, state, finite_values_, d_v_, count, {});
    for (Index j = 0; j < count; ++j) {
      for (Index c = 0; c < d_v_; ++c) {
        const T x = tile.v[j * tile.v_stride + c];
        if (is_finite(x)) continue;
        for (Index i = std::max<Index>(0, tile.row(j) - limit); i < strip.lanes(); ++i) {
          state.weighted[c * strip.lanes() + i] += panel_[j * strip.lanes() + i] * x;
        }
      }
    }
  }

  Index d_, d_v_;
  Maximum maximum_;
  FarPairs<T> far_pairs_;
  T *panel_, *tile_maximum_, *correction_, *shift_, *shifted_maximum_, *finite_values_;
};

}  // namespace attn::detail
