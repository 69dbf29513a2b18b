/// A block of queries meets a range of keys: what one parallel task of kernel_matmul does.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/causal_strip.hpp>
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
        kernel_(product.in.mask.make_kernel(product, scratch)),
        reader_(kernel_.reader(product, scratch)),
        rows_(scratch.elements<T>(kLanes<T> * std::max(product.in.q.cols(), product.in.v.cols()))),
        strips_(scratch.elements<Lanes>(product.partition.most_strips_a_block())) {
    for (Index s = 0; s < product.partition.most_strips_a_block(); ++s) {
      strips_[s].queries = QueryStrip<T>::make(product, scratch);
      strips_[s].recent = LaneState<T>::make(product.in.v.cols(), scratch);
      strips_[s].total = LaneState<T>::make(product.in.v.cols(), scratch);
    }
  }

  /// Streams keys past the queries of a block. totals: where the states of all strips are kept, null for the runner's
  /// own. to: where the rows will be written.
  void stream(Index block, Range keys, const LaneState<T>* totals, const MemoryRows& to) {
    open(block, totals);
    const Index limit = product_.limits.of(strips_[count_ - 1].queries.rows().last - 1);
    keys = tiles_up_to<T>(keys, limit);
    Range chunk{keys.first, keys.first};
    do {  // once even where there are no keys
      chunk = {chunk.last, std::min(keys.last, chunk.last + kChunkKeys)};
      LaneState<T> Lanes::*const state = chunk.first == keys.first ? &Lanes::total : &Lanes::recent;
      if (state == &Lanes::recent && passes_over(chunk)) continue;
      for (Index s = 0; s < count_; ++s) reset(strips_[s], strips_[s].*state);
      if (far_) expect_own_keys(state);
      stream_chunk(state, chunk, keys.last, to);
      for (Index s = 0; s < count_ && state == &Lanes::recent; ++s) merge(strips_[s], strips_[s].recent);
    } while (chunk.last < keys.last);
  }

  /// The states of a block's strips from those of each split of the keys, which parts has one after another.
  void merge_splits(Index block, const LaneState<T>* parts) {
    open(block, parts);
    for (Index split = 1; split < product_.partition.splits; ++split) {
      for (Index s = 0; s < count_; ++s) {
        merge(strips_[s], parts[split * product_.partition.strips + strips_[s].queries.number]);
      }
    }
  }

  /// out (n_q, d_v) <- the finished rows of the block, and their log-sums.
  void write_results(const ResultRows<T>& out, const LogSums<T>& logs) const {
    for (Index s = 0; s < count_; ++s) {
      const QueryStrip<T>& queries = strips_[s].queries;
      const LaneState<T>& total = strips_[s].total;
      RowScales<T> scales;
      product_.set_scales(queries.first, total, queries.norm, queries.lanes(), &scales);
      write_rows(strips_[s], scales, out);
      product_.write_log_sums(logs, queries.first, total, queries.norm, queries.count);
    }
  }

  /// states, maximum, sum and weighted <- those of the rows of the block.
  template <class States>
  void write_states(const States& states) const {
    for (Index s = 0; s < count_; ++s) {
      const QueryStrip<T>& queries = strips_[s].queries;
      RowScales<T> scales;
      for (Index i = 0; i < queries.count; ++i) {
        const T sum = queries.holds(product_, i) ? strips_[s].total.sum[i] : T(0);
        const LaneState<T>& total = strips_[s].total;
        const double query_bias = total.base[i] == 0 && sum != 0 ? exact_query_bias(queries.first + i) : 0;
        states.maximum.data()[queries.first + i] =
            product_.state_maximum(queries.first + i, total.maximum[i], sum, query_bias, &scales.first[i]);
        states.sum.data()[queries.first + i] = scales.first[i] * sum;
      }
      write_rows(strips_[s], scales, states.weighted);
    }
  }

 private:
  /// Tiles that are added up before the result joins the total, which keeps chains of sums short.
  static constexpr Index kChunkKeys = 32 * kTileKeys<T>;

  /// A strip and its results: total ones, and recent ones of the current chunk of keys unless it is the first.
  struct Lanes {
    QueryStrip<T> queries;
    LaneState<T> recent, total;
  };

  /// Turns to the strips of a block.
  void open(Index block, const LaneState<T>* totals) {
    const Range strips = product_.partition.strips_of_block(block);
    count_ = strips.last - strips.first;
    far_ = false;
    for (Index s = 0; s < count_; ++s) {
      if (totals != nullptr) strips_[s].total = totals[strips.first + s];
      strips_[s].queries.open(product_, strips.first + s);
      kernel_.load_queries(strips_[s].queries, product_, rows_);
      far_ = far_ || strips_[s].queries.far;
    }
  }

  [[gnu::noinline]] void merge(const Lanes& strip, const LaneState<T>& from) const {
    merge_lanes(strip.total, from, strip.queries.lanes(), product_.in.v.cols());
  }

  /// Whether no query of the block sees any of some keys, for they lie before all windows.
  bool passes_over(Range keys) const { return product_.limits.passes_over(keys, strips_[0].queries.first); }

  /// Feeds a state of each strip with a chunk of the keys, which end at end. The first strip to use a tile's values, or
  /// the next keys, has fetched them for all; with the last tile come the rows of the results.
  void stream_chunk(LaneState<T> Lanes::*state, Range keys, Index end, const MemoryRows& to) {
    for (Range tile{keys.first, 0}; tile.first < keys.last; tile.first = tile.last) {
      tile.last = std::min(keys.last, tile.first + kTileKeys<T>);
      if (passes_over(tile)) continue;
      KeyTile<T> read = reader_.read(tile.first, tile.last);
      read.finite = far_ && read.holds_finite(product_.in.k.cols(), product_.in.v.cols());
      const Range next{tile.last, std::min(end, tile.last + kTileKeys<T>)};
      std::array<Prefetch, 2> prefetch{Prefetch::of(product_.in.v.memory(), tile),
                                       Prefetch::of(product_.in.k.memory(), next)};
      for (Index s = 0; s < count_; ++s) {
        const QueryStrip<T>& queries = strips_[s].queries;
        if (tile.last == end) prefetch[1] = Prefetch::of(to, queries.rows());
        kernel_.add(queries, strips_[s].*state, read, product_.limits.of(queries.first), prefetch);
        prefetch = {};
      }
    }
  }

  /// Far queries may well be near the keys of their own numbers, and those are among the keys to come.
  void expect_own_keys(LaneState<T> Lanes::*state) const {
    constexpr Index kFewestKeys = 8 * kTileKeys<T>;
    if (product_.maximum == Maximum::none || product_.limits.causal || product_.partition.splits != 1 ||
        !product_.in.key_bias.empty() || product_.in.k.rows() < kFewestKeys) {
      return;
    }
    for (Index s = 0; s < count_; ++s) {
      const QueryStrip<T>& queries = strips_[s].queries;
      if (!queries.far || queries.rows().last > product_.in.k.rows()) continue;
      kernel_.expect(queries, strips_[s].*state, reader_.read(queries.rows().first, queries.rows().last));
    }
  }

  /// Without a maximum, weights are kappa itself, and what is far from the center has its base from the
  /// beginning. A norm that is NaN makes scores NaN, where the query sees a key.
  void reset(const Lanes& strip, const LaneState<T>& state) const {
    const QueryStrip<T>& queries = strip.queries;
    const bool no_maximum = product_.maximum == Maximum::none;
    for (Index i = 0; i < queries.lanes(); ++i) {
      const bool far = no_maximum && queries.far && queries.norm[i] > kFarNorm<T>;
      state.base[i] = far ? queries.norm[i] : T(0);
      state.maximum[i] = !no_maximum ? kNoMaximum<T> : far || is_nan(queries.norm[i]) ? T(0) : queries.norm[i];
    }
    std::fill_n(state.sum, queries.lanes(), T(0));
    std::fill_n(state.weighted, queries.lanes() * round_up_to_tiles(product_.in.v.cols()), T(0));
  }

  /// -bias |q|^2, in double: states of other keys, whose center may be another, are compared by it.
  double exact_query_bias(Index query) const {
    if (product_.kernel.bias == 0) return 0;
    double squares = 0;
    const T* const q = product_.in.q.row(query, rows_);
    const T* const center = product_.kernel.center;
    for (Index c = 0; c < product_.in.q.cols(); ++c) {
      const auto x = static_cast<double>(center == nullptr ? q[c] : q[c] - center[c]);
      squares += x * x;
    }
    return -static_cast<double>(product_.kernel.bias) * squares;
  }

  /// to <- scales times the rows of a strip; dropped queries become 0.
  void write_rows(const Lanes& strip, const RowScales<T>& scales, const ResultRows<T>& to) const {
    const QueryStrip<T>& queries = strip.queries;
    for (Index p = 0; p < queries.lanes(); p += kLanes<T>) {
      T* rows[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < queries.count ? to.row(queries.first + p + i, rows_ + i * to.cols()) : nullptr;
      }
      unpack_rows(strip.total.weighted + p, queries.lanes(), to.cols(), load(scales.first + p), rows);
      for (int i = 0; i < kLanes<T>; ++i) {
        if (rows[i] == nullptr) continue;
        if (scales.twice) scale_row(scales.second[p + i], rows[i], rows[i], to.cols());
        if (!queries.holds(product_, p + i)) std::fill_n(rows[i], to.cols(), T(0));
        to.finish_row(queries.first + p + i, rows[i]);
      }
    }
  }

  const Product<T>& product_;
  const StripKernel<T>& kernel_;
  const KeyReader<T>& reader_;
  T* rows_;  ///< kLanes rows of q or of the results, where they are not in place
  Lanes* strips_;
  Index count_ = 0;   ///< strips of the current block
  bool far_ = false;  ///< whether any of these is
};

}  // namespace attn::detail
