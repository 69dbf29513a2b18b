/// A block of queries meets a range of keys: what one parallel task of kernel_matmul does.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/float_bits.hpp>
#include <attn/detail/panel.hpp>
#include <attn/detail/partition.hpp>
#include <attn/detail/product.hpp>
#include <attn/detail/row_states.hpp>
#include <attn/detail/strip.hpp>
#include <attn/detail/upcoming.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <array>

namespace attn::detail {

/// Runs tasks of a Product. One for each worker; all its memory comes from the scratch that it is made with.
template <class T>
class BlockRunner {
 public:
  BlockRunner(const Product<T>& product, Scratch& scratch)
      : product_(product),
        reader_(product.in, product.space, scratch),
        kernel_(product.in.q.cols(), product.in.v.cols(), product.maximum, scratch),
        rows_(scratch.elements<T>(kLanes<T> * std::max(product.in.q.cols(), product.in.v.cols()))),
        strips_(scratch.elements<Lanes>(product.partition.most_strips_a_block())) {
    const Index d = product.in.q.cols(), d_v = product.in.v.cols();
    for (Index s = 0; s < product.partition.most_strips_a_block(); ++s) {
      Lanes& strip = strips_[s];
      strip.queries = scratch.elements<T>(kTileWidth<T> * d);
      strip.query_bias = scratch.elements<T>(kTileWidth<T>);
      strip.recent = LaneState<T>::make(d_v, scratch);
      strip.total = LaneState<T>::make(d_v, scratch);
    }
  }

  /// Streams keys past the queries of a block. totals: where the states of all strips are kept, null for the runner's own.
  /// to: where the rows will be written.
  void stream(Index block, Range keys, const LaneState<T>* totals, const MemoryRows& to) {
    open(block, totals);
    const Index limit = product_.limit(strips_[count_ - 1].rows().last - 1);
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
      for (Index s = 0; s < count_; ++s) merge(strips_[s], parts[split * product_.partition.strips + strips_[s].number]);
    }
  }

  /// out (n_q, d_v) <- the finished rows of the block; lse, unless null, their log-sums.
  void write_results(const ResultRows<T>& out, T* lse) const {
    for (Index s = 0; s < count_; ++s) {
      const Lanes& strip = strips_[s];
      alignas(64) T factor[extent(kTileWidth<T>)];
      product_.set_factors(strip.total.maximum, strip.total.sum, strip.query_bias, strip.lanes(), factor);
      write_rows(strip, factor, out);
      for (Index i = 0; i < strip.count && lse != nullptr; ++i) {
        lse[strip.first + i] = product_.log_sum(keeps(strip, i), strip.total.maximum[i], strip.total.sum[i], strip.query_bias[i]);
      }
    }
  }

  /// states <- those of the rows of the block.
  void write_states(const RowStates<T>& states) const {
    for (Index s = 0; s < count_; ++s) {
      const Lanes& strip = strips_[s];
      alignas(64) T factor[extent(kTileWidth<T>)];
      std::fill_n(factor, kTileWidth<T>, T(1));
      for (Index i = 0; i < strip.count; ++i) {
        states.maximum.data()[strip.first + i] =
            keeps(strip, i) ? product_.absolute_maximum(strip.total.maximum[i], strip.total.sum[i], strip.query_bias[i])
                            : kNoMaximum<T>;
        states.sum.data()[strip.first + i] = keeps(strip, i) ? strip.total.sum[i] : T(0);
      }
      write_rows(strip, factor, states.weighted);
    }
  }

 private:
  /// Tiles that are added up before the result joins the total, which keeps chains of sums short.
  static constexpr Index kChunkKeys = 32 * kTileKeys<T>;

  /// A strip, the number-th of all, and its results: total ones, and recent ones of the current chunk of keys unless it is the first.
  /// query_bias: -bias |q|^2, what log2 kappa has beyond the score.
  struct Lanes {
    T *queries, *query_bias;
    LaneState<T> recent, total;
    int packets;
    Index number, first, count;

    Index lanes() const { return packets * kLanes<T>; }
    Range rows() const { return {first, first + count}; }
    Strip<T> with(const LaneState<T>& state) const { return {queries, state, packets, count}; }
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

  /// Feeds a state of each strip with a chunk of the keys, which end at end. The first strip to use a tile's values, or the next
  /// keys, has fetched them for all; with the last tile come the rows of the results.
  void stream_chunk(LaneState<T> Lanes::*state, Range keys, Index end, const MemoryRows& to) {
    for (Range tile{keys.first, 0}; tile.first < keys.last; tile.first = tile.last) {
      tile.last = std::min(keys.last, tile.first + kTileKeys<T>);
      const KeyTile<T> read = reader_.read(tile.first, tile.last);
      const Range next{tile.last, std::min(end, tile.last + kTileKeys<T>)};
      std::array<Upcoming, 2> upcoming{Upcoming::of(product_.in.v.memory(), tile), Upcoming::of(product_.in.k.memory(), next)};
      for (Index s = 0; s < count_; ++s) {
        const Lanes& strip = strips_[s];
        if (tile.last == end) upcoming[1] = Upcoming::of(to, strip.rows());
        kernel_.add(strip.with(strip.*state), read, product_.limit(strip.first), upcoming);
        upcoming = {};
      }
    }
  }

  void load_queries(Lanes& strip) const {
    const Range packets = product_.partition.packets_of_strip(strip.number);
    strip.packets = static_cast<int>(packets.last - packets.first);
    strip.first = packets.first * kLanes<T>;
    strip.count = std::min(packets.last * kLanes<T>, product_.in.q.rows()) - strip.first;
    pack_queries(strip);
  }

  void pack_queries(const Lanes& strip) const {
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      const T* rows[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        const bool real = p + i < strip.count && keeps(strip, p + i);
        rows[i] = real ? product_.in.q.row(strip.first + p + i, rows_ + i * product_.in.q.cols()) : nullptr;
      }
      const auto squares =
          pack_rows(rows, product_.in.q.cols(), product_.space.center, product_.space.scale, strip.queries + p, strip.lanes());
      store(strip.query_bias + p, broadcast(-product_.space.bias) * squares);
    }
  }

  void reset(const Lanes& strip, const LaneState<T>& state) const {
    for (Index i = 0; i < strip.lanes(); ++i) {
      state.maximum[i] = product_.maximum == Maximum::running ? kNoMaximum<T>
                         : is_nan(strip.query_bias[i])        ? T(0)  // its scores are NaN where it sees a key
                                                              : -strip.query_bias[i];
    }
    std::fill_n(state.sum, strip.lanes(), T(0));
    std::fill_n(state.weighted, strip.lanes() * whole_tiles(product_.in.v.cols()), T(0));
  }

  /// to <- factor times the rows of a strip; dropped queries become 0.
  void write_rows(const Lanes& strip, const T* factor, const ResultRows<T>& to) const {
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      T* rows[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < strip.count ? to.row(strip.first + p + i, rows_ + i * to.cols()) : nullptr;
      }
      unpack_rows(strip.total.weighted + p, strip.lanes(), to.cols(), load(factor + p), rows);
      for (int i = 0; i < kLanes<T>; ++i) {
        if (rows[i] == nullptr) continue;
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
