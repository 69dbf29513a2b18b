/// A block of queries meets a range of keys: what one parallel task of kernel_matmul does.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/strip.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numbers>

namespace attn::detail {

/// Runs tasks of a Product. One for each worker; all its memory comes from the scratch that it is made with.
template <class T>
class BlockRunner {
 public:
  BlockRunner(const Product<T>& product, Scratch& scratch)
      : product_(product),
        reader_(product.in, product.space, scratch),
        kernel_(product.in, product.space.bias, product.maximum, scratch),
        rows_(scratch.elements<T>(kLanes<T> * std::max(product.in.q.cols(), product.in.v.cols()))),
        strips_(scratch.elements<Lanes>(product.partition.most_strips_a_block())) {
    const Index d = product.in.q.cols(), d_v = product.in.v.cols();
    for (Index s = 0; s < product.partition.most_strips_a_block(); ++s) {
      Lanes& strip = strips_[s];
      strip.queries = scratch.elements<T>(kTileWidth<T> * d);
      strip.query_bias = scratch.elements<T>(2 * kTileWidth<T>);
      strip.norm = strip.query_bias + kTileWidth<T>;
      strip.bias_origin =
          product.space.bias_origins.of_queries == nullptr ? nullptr : scratch.elements<T>(kTileWidth<T>);
      strip.recent = LaneState<T>::make(d_v, scratch);
      strip.total = LaneState<T>::make(d_v, scratch);
    }
  }

  /// Streams keys past the queries of a block. totals: where the states of all strips are kept, null for the runner's
  /// own. to: where the rows will be written.
  void stream(Index block, Range keys, const LaneState<T>* totals, const MemoryRows& to) {
    open(block, totals);
    const Index limit = product_.limits.of(strips_[count_ - 1].rows().last - 1);
    if (limit < keys.last) keys.last = std::max(keys.first, limit + 1);
    Range chunk{keys.first, keys.first};
    do {  // once even where there are no keys
      chunk = {chunk.last, std::min(keys.last, chunk.last + kChunkKeys)};
      LaneState<T> Lanes::*const state = chunk.first == keys.first ? &Lanes::total : &Lanes::recent;
      for (Index s = 0; s < count_; ++s) reset(strips_[s], strips_[s].*state);
      stream_chunk(state, chunk, keys.last, to);
      for (Index s = 0; s < count_ && state == &Lanes::recent; ++s) merge(strips_[s], strips_[s].recent);
    } while (chunk.last < keys.last);
  }

  /// The states of a block's strips from those of each split of the keys, which parts has one after another.
  void merge_splits(Index block, const LaneState<T>* parts) {
    open(block, parts);
    for (Index split = 1; split < product_.partition.splits; ++split) {
      for (Index s = 0; s < count_; ++s)
        merge(strips_[s], parts[split * product_.partition.strips + strips_[s].number]);
    }
  }

  /// out (n_q, d_v) <- the finished rows of the block, and their log-sums.
  void write_results(const ResultRows<T>& out, const LogSums<T>& logs) const {
    for (Index s = 0; s < count_; ++s) {
      const Lanes& strip = strips_[s];
      RowScales<T> scales;
      for (Index i = 0; i < strip.lanes(); ++i) strip.query_bias[i] += strip.total.base[i];
      product_.set_scales(strip.first, strip.total.maximum, strip.total.sum, strip.query_bias, strip.lanes(), &scales);
      write_rows(strip, scales, out);
      for (Index i = 0; i < strip.count; ++i) {
        product_.write_log_sums(logs, strip.first + i, strip.total.maximum[i], strip.total.sum[i], strip.query_bias[i],
                                strip.total.base[i]);
      }
    }
  }

  /// states, maximum, sum and weighted <- those of the rows of the block.
  template <class States>
  void write_states(const States& states) const {
    for (Index s = 0; s < count_; ++s) {
      const Lanes& strip = strips_[s];
      RowScales<T> scales;
      for (Index i = 0; i < strip.count; ++i) {
        const T sum = keeps(strip, i) ? strip.total.sum[i] : T(0);
        states.maximum.data()[strip.first + i] = set_state_scale(strip, i, sum, &scales.first[i]);
        states.sum.data()[strip.first + i] = scales.first[i] * sum;
      }
      write_rows(strip, scales, states.weighted);
    }
  }

 private:
  /// Tiles that are added up before the result joins the total, which keeps chains of sums short.
  static constexpr Index kChunkKeys = 32 * kTileKeys<T>;

  /// A strip, the number-th of all, and its results: total ones, and recent ones of the current chunk of keys unless it
  /// is the first. query_bias: -bias |q|^2, what log2 kappa has beyond the score, but for the base of a state.
  /// bias_origin and far_queries: as in Strip.
  struct Lanes {
    T *queries, *query_bias, *bias_origin, *norm;
    FarQueries<T> far_queries;
    bool far;
    LaneState<T> recent, total;
    int packets;
    Index number, first, count;

    Index lanes() const { return packets * kLanes<T>; }
    Range rows() const { return {first, first + count}; }
    Strip<T> with(const LaneState<T>& state) const {
      return {queries, bias_origin, far ? &far_queries : nullptr, state, packets, count};
    }
  };

  bool keeps(const Lanes& strip, Index i) const { return keeps_query(product_.in, strip.first + i); }

  /// Turns to the strips of a block.
  void open(Index block, const LaneState<T>* totals) {
    const Range strips = product_.partition.strips_of_block(block);
    count_ = strips.last - strips.first;
    for (Index s = 0; s < count_; ++s) {
      strips_[s].number = strips.first + s;
      if (totals != nullptr) strips_[s].total = totals[strips.first + s];
      load_queries(strips_[s]);
    }
  }

  [[gnu::noinline]] void merge(const Lanes& strip, const LaneState<T>& from) const {
    merge_lanes(strip.total, from, strip.lanes(), product_.in.v.cols());
  }

  /// Feeds a state of each strip with a chunk of the keys, which end at end. The first strip to use a tile's values, or
  /// the next keys, has fetched them for all; with the last tile come the rows of the results.
  void stream_chunk(LaneState<T> Lanes::*state, Range keys, Index end, const MemoryRows& to) {
    for (Range tile{keys.first, 0}; tile.first < keys.last; tile.first = tile.last) {
      tile.last = std::min(keys.last, tile.first + kTileKeys<T>);
      const KeyTile<T> read = reader_.read(tile.first, tile.last);
      const Range next{tile.last, std::min(end, tile.last + kTileKeys<T>)};
      std::array<Upcoming, 2> upcoming{Upcoming::of(product_.in.v.memory(), tile),
                                       Upcoming::of(product_.in.k.memory(), next)};
      for (Index s = 0; s < count_; ++s) {
        const Lanes& strip = strips_[s];
        if (tile.last == end) upcoming[1] = Upcoming::of(to, strip.rows());
        kernel_.add(strip.with(strip.*state), read, product_.limits.of(strip.first), upcoming);
        upcoming = {};
      }
    }
  }

  void load_queries(Lanes& strip) const {
    const Range packets = product_.partition.packets_of_strip(strip.number);
    strip.packets = static_cast<int>(packets.last - packets.first);
    strip.first = packets.first * kLanes<T>;
    strip.count = std::min(packets.last * kLanes<T>, product_.in.q.rows()) - strip.first;
    for (Index i = 0; i < strip.lanes() && strip.bias_origin != nullptr; ++i) {
      strip.bias_origin[i] = i < strip.count ? product_.space.bias_origins.of(strip.first + i) : T(0);
    }
    pack_queries(strip);
  }

  void pack_queries(Lanes& strip) const {
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      const T* rows[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        const bool real = p + i < strip.count && keeps(strip, p + i);
        rows[i] = real ? product_.in.q.row(strip.first + p + i, rows_ + i * product_.in.q.cols()) : nullptr;
      }
      const auto squares = pack_rows(rows, product_.in.q.cols(), product_.space.center, product_.space.scale,
                                     strip.queries + p, strip.lanes());
      store(strip.query_bias + p, broadcast(-product_.space.bias) * squares);
    }
    find_far(strip);
  }

  /// Whether any query is far from the center, and what is needed then.
  void find_far(Lanes& strip) const {
    strip.far = false;
    if (product_.space.center == nullptr) return;
    for (Index i = 0; i < strip.lanes(); ++i) {
      if (i >= strip.count || !keeps(strip, i)) strip.query_bias[i] = 0;  // no query, which is nowhere
      strip.far = strip.far || is_far(strip, i);
    }
    if (!strip.far) return;
    for (Index i = 0; i < strip.lanes(); ++i) strip.norm[i] = -strip.query_bias[i];
    strip.far_queries = {strip.norm, strip.first, strip.lanes()};
  }

  static bool is_far(const Lanes& strip, Index i) { return -strip.query_bias[i] > kFarNorm<T>; }

  /// Where the maximum is fixed, weights are kappa itself, and what is far from the center has its base from the
  /// beginning.
  void reset(const Lanes& strip, const LaneState<T>& state) const {
    for (Index i = 0; i < strip.lanes(); ++i) {
      const bool fixed = product_.maximum == Maximum::fixed;
      state.base[i] = fixed && strip.far && is_far(strip, i) ? -strip.query_bias[i] : T(0);
      state.maximum[i] = !fixed ? kNoMaximum<T>
                         : is_nan(strip.query_bias[i]) || state.base[i] != 0
                             ? T(0)  // NaN: its scores are where it sees a key
                             : -strip.query_bias[i];
    }
    std::fill_n(state.sum, strip.lanes(), T(0));
    std::fill_n(state.weighted, strip.lanes() * whole_tiles(product_.in.v.cols()), T(0));
  }

  /// The maximum of a row state: as near to the absolute one as T holds, which a large bias may make coarse; the
  /// weights are multiplied by scale, so that they are relative to just that.
  T set_state_scale(const Lanes& strip, Index i, T sum, T* scale) const {
    *scale = 1;
    if (sum == 0) return kNoMaximum<T>;
    if (product_.maximum == Maximum::fixed) return 0;
    const auto bias = static_cast<double>(product_.space.bias_origins.of(strip.first + i));
    const double origin = std::numbers::log2e * bias,
                 rest = std::fma(std::numbers::log2e, bias, -origin);  // a product, and what it lacks
    const double relative = product_.kernel_maximum(strip.total.maximum[i],
                                                    strip.total.base[i] == 0 ? exact_query_bias(strip.first + i) : 0);
    constexpr auto kLargest = static_cast<double>(std::numeric_limits<T>::max());
    const auto rounded = static_cast<T>(std::clamp(origin, -kLargest, kLargest));
    if (!(std::abs((origin - static_cast<double>(rounded)) + rest) < kMostStateScale)) {
      // Unequal origins of this size are too far apart for one to matter beside the other, so the rounded one stands
      // for its origin.
      *scale = static_cast<T>(std::exp2(std::clamp(relative, -kMostStateScale, kMostStateScale)));
      return rounded;
    }
    const auto absolute = static_cast<T>(origin + relative);
    const double lost = (origin - static_cast<double>(absolute)) + relative + rest;
    if (std::abs(lost) < kMostStateScale) *scale = static_cast<T>(std::exp2(lost));  // else scores have no digits left
    return absolute;
  }

  static constexpr double kMostStateScale = std::numeric_limits<T>::max_exponent / 4;  ///< log2 of it

  /// -bias |q|^2, in double: states of other keys, whose center may be another, are compared by it.
  double exact_query_bias(Index query) const {
    if (product_.space.bias == 0) return 0;
    double squares = 0;
    const T* const q = product_.in.q.row(query, rows_);
    const T* const center = product_.space.center;
    for (Index c = 0; c < product_.in.q.cols(); ++c) {
      const auto x = static_cast<double>(center == nullptr ? q[c] : q[c] - center[c]);
      squares += x * x;
    }
    return -static_cast<double>(product_.space.bias) * squares;
  }

  /// to <- scales times the rows of a strip; dropped queries become 0.
  void write_rows(const Lanes& strip, const RowScales<T>& scales, const ResultRows<T>& to) const {
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      T* rows[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < strip.count ? to.row(strip.first + p + i, rows_ + i * to.cols()) : nullptr;
      }
      unpack_rows(strip.total.weighted + p, strip.lanes(), to.cols(), load(scales.first + p), rows);
      for (int i = 0; i < kLanes<T>; ++i) {
        if (rows[i] == nullptr) continue;
        if (scales.twice) scale_row(scales.second[p + i], rows[i], rows[i], to.cols());
        if (!keeps(strip, p + i)) std::fill_n(rows[i], to.cols(), T(0));
        to.finish_row(strip.first + p + i, rows[i]);
      }
    }
  }

  const Product<T>& product_;
  KeyReader<T> reader_;
  StripKernel<T> kernel_;
  T* rows_;  ///< kLanes rows of q or of the results, where they are not in place
  Lanes* strips_;
  Index count_ = 0;  ///< strips of the current block
};

}  // namespace attn::detail
