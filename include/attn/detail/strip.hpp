/// A strip of queries meets a tile of keys: the inner part of every streamed product.
///
///   for each key j of the tile:                          in registers, 8 (or 4) keys by 3 packets of queries at a time
///     score[j]  = scale q.k_j + bias_j                   queries lie along the lanes, so row statistics need no horizontal step
///     maximum   = max(maximum, score[j])
///   correction  = 2^(old maximum - maximum)
///   for each key j:
///     weight[j] = 2^(score[j] - maximum)
///     sum       = correction sum + weight[j]
///   for each column c of v:                              in registers, 8 (or 4) columns by 3 packets of queries at a time
///     weighted[c] = correction weighted[c] + sum_j v[j][c] weight[j]
///
/// Both products are register tiles: k row by row against the queries' panel, v column by column against the weights' panel. Neither k
/// nor v is packed; scores and weights of a tile live in one panel that stays in L1.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/exp2.hpp>
#include <attn/detail/float_bits.hpp>
#include <attn/detail/key_tiles.hpp>
#include <attn/detail/panel.hpp>
#include <attn/detail/register_tile.hpp>
#include <attn/detail/upcoming.hpp>

#include <algorithm>
#include <array>
#include <limits>

namespace attn::detail {

/// The statistics of a row before it has seen a key.
template <class T>
inline constexpr T kNoMaximum = std::numeric_limits<T>::lowest();

/// Row states of a strip, queries along the lanes: the weights seen so far are 2^maximum times those that sum and weighted (d_v rows)
/// add up. weighted has room for whole tiles.
template <class T>
struct LaneState {
  T *maximum, *sum, *weighted;

  [[gnu::noinline]] static LaneState make(Index d_v, Scratch& scratch) {
    T* const rows = scratch.elements<T>(kTileWidth<T> * (2 + whole_tiles(d_v)));
    return {rows, rows + kTileWidth<T>, rows + 2 * kTileWidth<T>};
  }
};

/// Up to kTilePackets packets of queries, count of them real. panel: scaled queries, d rows.
template <class T>
struct Strip {
  const T* panel;
  LaneState<T> state;
  int packets;
  Index count;

  Index lanes() const { return packets * kLanes<T>; }
};

/// Scores of count keys for a strip, into a panel with room for whole tiles; their maximum into maximum.
template <int kPackets, class T>
[[gnu::noinline]] void score_keys(const KeyTile<T>& tile, Index count, const T* queries, Index d, T* panel, T* maximum,
                                  const Upcoming& upcoming) {
  Packet<T> top[extent(kPackets)];
#pragma GCC unroll 4
  for (int p = 0; p < kPackets; ++p) top[p] = broadcast(kNoMaximum<T>);
  for (Index j = 0; j < count; j += kTileRows, panel += kTileRows * kPackets * kLanes<T>) {
    upcoming.fetch(j, kTileRows, count);
    Packet<T> score[extent(kTileRows)][extent(kPackets)];
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const auto bias = broadcast(tile.bias == nullptr ? T(0) : tile.bias[std::min(j + r, count - 1)]);
#pragma GCC unroll 4
      for (int p = 0; p < kPackets; ++p) score[r][p] = bias;
    }
    add_product(tile.k + j * tile.k_stride, count - j, tile.k_stride, 1, queries, d, score);
#pragma GCC unroll 32
    for (int i = 0; i < kTileRows * kPackets; ++i) {
      const auto x = score[i / kPackets][i % kPackets];
      top[i % kPackets] = max(top[i % kPackets], x);
      store(panel + i * kLanes<T>, x);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < kPackets; ++p) store(maximum + p * kLanes<T>, top[p]);
}

/// Whether every query of a call has the same, known bound of its scores, so that no maximum is kept.
enum class Maximum { running, fixed };

/// What no exponent of a weight is above, but for rounding.
template <class T>
T highest_exponent(Maximum maximum) {
  return maximum == Maximum::fixed ? T(0) : std::numeric_limits<T>::infinity();
}

/// Turns a panel of scores into weights relative to maximum, and adds them to sum. No exponent is above limit: 0 where the maximum is
/// fixed, for rounding may lift scores above that (where the last digit of |q|^2 is above 1, their weights could be any numbers).
template <int kPackets, class T>
[[gnu::noinline]] void weigh(T* panel, Index count, const T* maximum, T limit, T* sum) {
  Packet<T> top[extent(kPackets)], total[extent(kPackets)];
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
[[gnu::noinline]] void add_values(const T* v, Index v_stride, Index d_v, const T* weights, Index count, const T* correction,
                                  T* weighted, const Upcoming& upcoming) {
  for (Index c = 0; c < d_v; c += kTileRows) {
    upcoming.fetch(c, kTileRows, d_v);
    Packet<T> tile[extent(kTileRows)][extent(kPackets)];
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
  StripKernel(Index d, Index d_v, Maximum maximum, Scratch& scratch)
      : d_(d),
        d_v_(d_v),
        maximum_(maximum),
        panel_(scratch.elements<T>(kTileKeys<T> * kTileWidth<T>)),
        tile_maximum_(scratch.elements<T>(kTileWidth<T>)),
        correction_(scratch.elements<T>(kTileWidth<T>)),
        finite_values_(scratch.elements<T>(kTileKeys<T> * d_v)) {}

  /// Adds the keys of a tile to a strip. limit: the largest row number that the strip's first query sees, its next query one more,
  /// and so on; kNoLimit without a causal mask. upcoming: what is used next, fetched during the first product and during the second.
  void add(const Strip<T>& strip, const KeyTile<T>& tile, Index limit, const std::array<Upcoming, 2>& upcoming) const {
    const Index count = limit == kNoLimit ? tile.count : tile.visible(limit + strip.count - 1);
    if (count == 0) return;
    const Index seen_by_all = limit == kNoLimit ? count : tile.visible(limit);
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      score_keys<packets>(tile, count, strip.panel, d_, panel_, tile_maximum_, upcoming[0]);
    });
    if (seen_by_all < count) hide_future(strip, tile, seen_by_all, count, limit);
    raise_maximum(strip);
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      weigh<packets>(panel_, count, strip.state.maximum, highest_exponent<T>(maximum_), strip.state.sum);
    });
    if (seen_by_all < count && !all_finite(tile, seen_by_all, count)) return add_seen_values(strip, tile, count, limit);
    add_weighted(strip, tile.v, tile.v_stride, count, upcoming[1]);
  }

  static constexpr Index kNoLimit = std::numeric_limits<Index>::max();

 private:
  /// Scores of keys that a query must not see become -infinity, whatever they were, and the maximum is taken anew without them.
  void hide_future(const Strip<T>& strip, const KeyTile<T>& tile, Index first, Index count, Index limit) const {
    const Index lanes = strip.lanes();
    for (Index j = first; j < count; ++j) {
      std::fill_n(panel_ + j * lanes, std::min(tile.row(j) - limit, lanes), -std::numeric_limits<T>::infinity());
    }
    for (Index p = 0; p < lanes; p += kLanes<T>) {
      auto top = broadcast(kNoMaximum<T>);
      for (Index j = 0; j < count; ++j) top = max(top, load(panel_ + j * lanes + p));
      store(tile_maximum_ + p, top);
    }
  }

  /// maximum <- max(maximum, that of the tile); correction and sum follow.
  void raise_maximum(const Strip<T>& strip) const {
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      if (maximum_ == Maximum::fixed) {
        store(correction_ + p, broadcast(T(1)));
        continue;
      }
      const auto before = load(strip.state.maximum + p), after = max(before, load(tile_maximum_ + p));
      const auto correction = exp2_bounded(before - after);
      store(strip.state.maximum + p, after);
      store(correction_ + p, correction);
      store(strip.state.sum + p, load(strip.state.sum + p) * correction);
    }
  }

  void add_weighted(const Strip<T>& strip, const T* v, Index v_stride, Index count, const Upcoming& upcoming) const {
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      add_values<packets>(v, v_stride, d_v_, panel_, count, correction_, strip.state.weighted, upcoming);
    });
  }

  /// Whether the values of keys that only some of a strip's queries see are finite: a weight of 0 then hides them.
  bool all_finite(const KeyTile<T>& tile, Index first, Index count) const {
    FiniteLanes<T> values;
    for (Index j = first; j < count; ++j) {
      const T* row = tile.v + j * tile.v_stride;
      for (Index c = 0; c < d_v_; c += kLanes<T>) values.add(load_row(row, c, d_v_));
    }
    return values.all();
  }

  /// add_values where 0 times a value may be NaN: the finite values for all queries, then the others for those that see them.
  /// A query that sees only finite ones gets the bits that it would get from add_values.
  void add_seen_values(const Strip<T>& strip, const KeyTile<T>& tile, Index count, Index limit) const {
    for (Index j = 0; j < count; ++j) {
      for (Index c = 0; c < d_v_; ++c) {
        const T x = tile.v[j * tile.v_stride + c];
        finite_values_[j * d_v_ + c] = is_finite(x) ? x : T(0);
      }
    }
    add_weighted(strip, finite_values_, d_v_, count, {});
    for (Index j = 0; j < count; ++j) {
      for (Index c = 0; c < d_v_; ++c) {
        const T x = tile.v[j * tile.v_stride + c];
        if (is_finite(x)) continue;
        for (Index i = std::max<Index>(0, tile.row(j) - limit); i < strip.lanes(); ++i) {
          strip.state.weighted[c * strip.lanes() + i] += panel_[j * strip.lanes() + i] * x;
        }
      }
    }
  }

  Index d_, d_v_;
  Maximum maximum_;
  T *panel_, *tile_maximum_, *correction_, *finite_values_;
};

}  // namespace attn::detail
