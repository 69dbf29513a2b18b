/// A strip of queries meets a tile of keys under a causal mask: beside tiles that all its queries see, those at the
/// diagonal, of which each query sees some keys.
///
///   for each key j of the tile that any query sees:         packets of queries that do not see it are left out
///     score[j]  = -infinity for the queries that must not see it, else as without a mask
///   maximum, correction, weights and sums, weighted                                    as without a mask
///
/// A window hides keys at its other end likewise.
///
/// A weight of 0 hides a value, unless that is not finite: such values are added for the queries that see them alone.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/query_strip.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/strip.hpp>
#include <attn/engine/tokens.hpp>

#include <algorithm>
#include <array>
#include <limits>
#include <type_traits>

namespace attn::detail {

/// body(std::integral_constant<int, p>, keys): the keys, in whole tiles of rows, that packets from p on are multiplied
/// with, and no others.
template <int kPackets, int kFirst = 0, class Body>
[[gnu::always_inline]] inline void for_each_part(const PacketCounts& counts, const Body& body) {
  const Range keys{round_up_to_tiles(counts.before(kFirst)), counts.of(kFirst)};
  if (keys.first < keys.last) body(std::integral_constant<int, kFirst>{}, keys);
  if constexpr (kFirst + 1 < kPackets) for_each_part<kPackets, kFirst + 1>(counts, body);
}

/// tile += v^T weights over the keys, or pairs of them, that each packet is multiplied with: in the order, and so with
/// the rounding, of a product with all of them.
template <int kPackets, int kFirst = 0, class Value, class T>
[[gnu::always_inline]] inline void add_products_of(const Value* v, Index rows, Index v_stride, const Value* weights,
                                                   const PacketCounts& counts,
                                                   Packet<T> (&tile)[array_size(kTileRows)][array_size(kPackets)]) {
  const Index first = counts.before(kFirst);
  add_product<kFirst>(v + first * v_stride, rows, 1, v_stride, weights + first * kPackets * kLanes<T>,
                      counts.of(kFirst) - first, tile);
  if constexpr (kFirst + 1 < kPackets) {
    add_products_of<kPackets, kFirst + 1>(v, rows, v_stride, weights, counts, tile);
  }
}

/// add_values of so many keys, or pairs of them, for each packet.
template <int kPackets, class Value, class T>
[[gnu::noinline]] void add_some_values(const Value* v, Index v_stride, Index d_v, const Value* weights,
                                       const PacketCounts& counts, const T* correction, T* weighted,
                                       const Prefetch& prefetch) {
  for (Index c = 0; c < d_v; c += kTileRows) {
    prefetch.fetch(c, kTileRows, d_v);
    Packet<T> tile[array_size(kTileRows)][array_size(kPackets)];
#pragma GCC unroll 32
    for (int i = 0; i < kTileRows * kPackets; ++i) tile[i / kPackets][i % kPackets] = broadcast(T(0));
    add_products_of<kPackets>(v + c, d_v - c, v_stride, weights, counts, tile);
    correct_and_add(tile, correction, weighted);
    weighted += kTileRows * kPackets * kLanes<T>;
  }
}

/// The StripKernel of causal masks.
template <class T>
class CausalStripKernel : public StripKernel<T> {
  using Base = StripKernel<T>;

 protected:
  using Base::panel_;
  using Base::tile_maximum_;

 public:
  CausalStripKernel(const Product<T>& product, const FarPairs<T>* far_pairs, Scratch& scratch)
      : Base(product.in, product.maximum, far_pairs, scratch),
        limits_(product.limits),
        slope_(product.kernel.slope),
        finite_values_(scratch.elements<T>(kTileKeys<T> * product.in.v.cols())),
        shift_(scratch.elements<T>(kTileWidth<T>)),
        shifted_maximum_(scratch.elements<T>(kTileWidth<T>)) {}

  void add(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile, Index limit,
           const std::array<Prefetch, 2>& prefetch) const override {
    if (limits_.has_window()) return add_window(strip, state, tile.without_past(limits_, limit), limit, prefetch);
    add_seen(strip, state, tile, tile.seen_by(strip.count, limit), limit, prefetch);
  }

 private:
  [[gnu::noinline]] void add_window(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile,
                                    Index limit, const std::array<Prefetch, 2>& prefetch) const {
    if (tile.count > 0) add_seen(strip, state, tile, tile.seen_by(limits_, strip.count, limit), limit, prefetch);
  }

  void add_seen(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile, const SeenKeys& seen,
                Index limit, const std::array<Prefetch, 2>& prefetch) const {
    if (seen.partly() || strip.bias_origin != nullptr) return add_some(strip, state, tile, seen, limit, prefetch);
    this->add_keys(strip, state, tile, seen.count, prefetch);
  }

  [[gnu::noinline]] void add_some(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile,
                                  const SeenKeys& seen, Index limit, const std::array<Prefetch, 2>& prefetch) const {
    if (seen.count == 0) return;
    const bool own_origins = strip.bias_origin != nullptr, adds_bias = own_origins && !tile.seen_wholly(seen);
    const KeyTile<T> scored = adds_bias ? tile.without_key_bias() : tile;
    const PacketCounts counts = tile.seen_by_packets(seen, strip.packets, limit);
    this->score(strip, scored, counts, prefetch[0]);
    if (this->adds_nothing(strip, state, tile)) return;
    hide(strip, tile, seen, limit);
    if (strip.far) this->refine(strip, state, scored, seen.count);
    if (adds_bias) {
      add_key_bias(tile, seen.count, strip.bias_origin, strip.lanes(), panel_);
      if (slope_ != 0) subtract_distances(tile, seen.count, slope_, limit, strip.lanes(), panel_);
      hide(strip, tile, seen, limit);
    }
    if (seen.partly() || adds_bias) set_tile_maximum(counts, strip.lanes());
    const bool shifts = own_origins && !adds_bias;
    if (!shifts) this->raise_maximum(strip, state, tile_maximum_);
    this->weigh_keys(strip, state, counts, shifts ? raise_shifted(strip, state, tile, limit) : state.maximum);
    if (seen.partly() && !finite_values(tile, seen.first_hidden(), seen.count)) {
      return add_seen_values(strip, state, tile, counts, limit);
    }
    this->add_weighted(strip, state, tile, counts, prefetch[1]);
  }

  void hide(const QueryStrip<T>& strip, const KeyTile<T>& tile, const SeenKeys& seen, Index limit) const {
    constexpr T kHidden = -std::numeric_limits<T>::infinity();
    hide_future(tile, seen, limit, kHidden, strip.lanes(), panel_);
    if (seen.leaves_any()) hide_past(tile, seen, limit, limits_.window, kHidden, strip.lanes(), panel_);
  }

  void set_tile_maximum(const PacketCounts& counts, Index lanes) const {
    for (Index p = 0; p < lanes; p += kLanes<T>) {
      auto top = broadcast(kNoMaximum<T>);
      for (Index j = 0; j < counts.of(p / kLanes<T>); ++j) top = max(top, load(panel_ + j * lanes + p));
      store(tile_maximum_ + p, top);
    }
  }

  /// raise_maximum for a tile whose biases are counted from another origin than those of each query, which is no
  /// smaller. The weights are relative to the maximum as counted from the tile's origin; where that is too far below to
  /// be told from it, to the tile's own.
  const T* raise_shifted(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile,
                         Index limit) const {
    set_bias_shift(tile, strip.bias_origin, slope_, limit, strip.lanes(), shift_);
    for (Index i = 0; i < strip.lanes(); ++i) shifted_maximum_[i] = tile_maximum_[i] + shift_[i];
    this->raise_maximum(strip, state, shifted_maximum_);
    for (Index i = 0; i < strip.lanes(); ++i) {
      shifted_maximum_[i] = std::max(state.maximum[i] - shift_[i], tile_maximum_[i]);
    }
    return shifted_maximum_;
  }

 protected:
  void score(const QueryStrip<T>& strip, const KeyTile<T>& tile, const PacketCounts& counts,
             const Prefetch& prefetch) const override {
    if (counts.are_equal()) return Base::score(strip, tile, counts, prefetch);
    std::fill_n(tile_maximum_, strip.lanes(), kNoMaximum<T>);
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      for_each_part<packets>(counts, [&](auto first, Range keys) {
        score_some_keys<packets, first>(tile, keys, counts.all(), strip.panel, this->d_, panel_, tile_maximum_,
                                        prefetch);
      });
    });
  }

  void weigh_keys(const QueryStrip<T>& strip, const LaneState<T>& state, const PacketCounts& counts,
                  const T* top) const override {
    if (counts.are_equal()) return Base::weigh_keys(strip, state, counts, top);
    for (Index p = 0; p < strip.packets; ++p) {
      const Index lane = p * kLanes<T>;
      store(state.sum + lane,
            load(state.sum + lane) + weigh_packets(panel_ + lane, counts.of(p), strip.lanes(), load(top + lane),
                                                   highest_exponent<T>(this->maximum_)));
    }
  }

  void add_weighted(const QueryStrip<T>& strip, const LaneState<T>& state, const KeyTile<T>& tile,
                    const PacketCounts& counts, const Prefetch& prefetch) const override {
    if (counts.are_equal()) return Base::add_weighted(strip, state, tile, counts, prefetch);
    with_packets<kTilePackets>(strip.packets, [&](auto packets) {
      add_some_values<packets>(tile.v, tile.v_stride, this->d_v_, panel_, counts, this->correction_, state.weighted,
                               prefetch);
    });
  }

  /// Whether the values of keys [first, last) of a tile are finite.
  virtual bool finite_values(const KeyTile<T>& tile, Index first, Index last) const {
    return tile.values().finite_keys(first, last, this->d_v_);
  }

  /// add_weighted where 0 times a value may be NaN: the finite values for all queries, then the others for those that
  /// see them. A query that sees only finite ones gets the bits that it would get from add_weighted.
  [[gnu::noinline]] virtual void add_seen_values(const QueryStrip<T>& strip, const LaneState<T>& state,
                                                 const KeyTile<T>& tile, const PacketCounts& counts,
                                                 Index limit) const {
    const Index d_v = this->d_v_, lanes = strip.lanes(), count = counts.all();
    for (Index j = 0; j < count; ++j) {
      for (Index c = 0; c < d_v; ++c) {
        const T x = tile.v[j * tile.v_stride + c];
        finite_values_[j * d_v + c] = is_finite(x) ? x : T(0);
      }
    }
    KeyTile<T> finite = tile;
    finite.v = finite_values_;
    finite.v_stride = d_v;
    add_weighted(strip, state, finite, counts, {});
    for (Index j = 0; j < count; ++j) {
      for (Index c = 0; c < d_v; ++c) {
        const T x = tile.v[j * tile.v_stride + c];
        if (is_finite(x)) continue;
        const Range seeing = limits_.queries_seeing(tile.row(j), limit, lanes);
        for (Index i = seeing.first; i < seeing.last; ++i) {
          state.weighted[c * lanes + i] += panel_[j * lanes + i] * x;
        }
      }
    }
  }

  CausalLimits limits_;
  T slope_;
  T* finite_values_;  ///< kTileKeys rows of d_v elements

 private:
  T *shift_, *shifted_maximum_;
};

template <class T>
const StripKernel<T>& make_causal_strip_kernel(const Product<T>& product, Scratch& scratch) {
  const FarPairs<T>* const far_pairs = product.far_pairs(scratch);
  return *scratch.make<CausalStripKernel<T>>(1, product, far_pairs, scratch);
}

}  // namespace attn::detail
