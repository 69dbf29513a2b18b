/// A strip of queries meets a tile of keys under a causal mask: beside tiles that all its queries see, those at the
/// diagonal, of which each query sees some keys.
///
///   for each key j of the tile that any query sees:
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

namespace attn::detail {

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
    this->score(strip, scored, seen.count, prefetch[0]);
    if (this->adds_nothing(strip, state, tile)) return;
    hide(strip, tile, seen, limit);
    if (strip.far) this->refine(strip, state, scored, seen.count);
    if (adds_bias) {
      add_key_bias(tile, seen.count, strip.bias_origin, strip.lanes(), panel_);
      if (slope_ != 0) subtract_distances(tile, seen.count, slope_, limit, strip.lanes(), panel_);
      hide(strip, tile, seen, limit);
    }
    if (seen.partly() || adds_bias) set_tile_maximum(seen.count, strip.lanes());
    const bool shifts = own_origins && !adds_bias;
    if (!shifts) this->raise_maximum(strip, state, tile_maximum_);
    this->weigh_keys(strip, state, seen.count, shifts ? raise_shifted(strip, state, tile, limit) : state.maximum);
    if (seen.partly() && !finite_values(tile, seen.first_hidden(), seen.count)) {
      return add_seen_values(strip, state, tile, seen.count, limit);
    }
    this->add_weighted(strip, state, tile, seen.count, prefetch[1]);
  }

  void hide(const QueryStrip<T>& strip, const KeyTile<T>& tile, const SeenKeys& seen, Index limit) const {
    constexpr T kHidden = -std::numeric_limits<T>::infinity();
    hide_future(tile, seen, limit, kHidden, strip.lanes(), panel_);
    if (seen.leaves_any()) hide_past(tile, seen, limit, limits_.window, kHidden, strip.lanes(), panel_);
  }

  void set_tile_maximum(Index count, Index lanes) const {
    for (Index p = 0; p < lanes; p += kLanes<T>) {
      auto top = broadcast(kNoMaximum<T>);
      for (Index j = 0; j < count; ++j) top = max(top, load(panel_ + j * lanes + p));
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
  /// Whether the values of keys [first, last) of a tile are finite.
  virtual bool finite_values(const KeyTile<T>& tile, Index first, Index last) const {
    return tile.values().finite_keys(first, last, this->d_v_);
  }

  /// add_weighted where 0 times a value may be NaN: the finite values for all queries, then the others for those that
  /// see them. A query that sees only finite ones gets the bits that it would get from add_weighted.
  [[gnu::noinline]] virtual void add_seen_values(const QueryStrip<T>& strip, const LaneState<T>& state,
                                                 const KeyTile<T>& tile, Index count, Index limit) const {
    const Index d_v = this->d_v_, lanes = strip.lanes();
    for (Index j = 0; j < count; ++j) {
      for (Index c = 0; c < d_v; ++c) {
        const T x = tile.v[j * tile.v_stride + c];
        finite_values_[j * d_v + c] = is_finite(x) ? x : T(0);
      }
    }
    KeyTile<T> finite = tile;
    finite.v = finite_values_;
    finite.v_stride = d_v;
    this->add_weighted(strip, state, finite, count, {});
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
