/// A block of queries meets a range of keys: what one parallel task of kernel_matmul does.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/panel.hpp>
#include <attn/detail/partition.hpp>
#include <attn/detail/row_states.hpp>
#include <attn/detail/strip.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <span>

namespace attn::detail {

/// One streamed product: what is multiplied, the kernel in units of log2, and how the work is cut.
template <class T>
struct Product {
  const Inputs<T>& in;
  KeySpace<T> space;
  Rows rows;
  Maximum maximum;
  Partition partition;

  /// The largest row number of the keys that query i may see.
  Index limit(Index i) const {
    switch (in.mask.causal) {
      case Causal::upper_left: return i;
      case Causal::lower_right: return i + in.k.rows() - in.q.rows();
      case Causal::none: break;
    }
    return StripKernel<T>::kNoLimit;
  }
};

/// Runs tasks of a Product. One for each worker; all its memory comes from the scratch that it is made with.
template <class T>
class BlockRunner {
 public:
  BlockRunner(const Product<T>& product, Scratch& scratch)
      : product_(product),
        reader_(product.in, product.space, scratch),
        kernel_(product.in.q.cols(), product.in.v.cols(), product.maximum, scratch),
        strips_(scratch.array<Lanes>(product.partition.most_strips_a_block())) {
    const Index d = product.in.q.cols(), d_v = product.in.v.cols();
    for (Lanes& strip : strips_) {
      strip.queries = scratch.array<T>(kWidth * d).data();
      strip.query_bias = scratch.array<T>(kWidth).data();
      for (LaneState<T>* state : {&strip.recent, &strip.total}) {
        *state = {scratch.array<T>(kWidth).data(), scratch.array<T>(kWidth).data(), scratch.array<T>(kWidth * d_v).data()};
      }
    }
  }

  /// out (n_q, d_v) <- the finished rows of a block; lse, unless empty, their log-sums.
  void finish_block(Index block, MatrixRef<T> out, std::span<T> lse) {
    stream(block, {0, product_.in.k.rows()});
    for (const Lanes& strip : used_strips()) {
      alignas(64) T factor[kWidth];
      for (Index i = 0; i < strip.lanes(); ++i) {
        const T maximum = absolute_maximum(strip, i), sum = strip.total.sum[i];
        factor[i] = row_factor(product_.rows, maximum, sum);
        if (!lse.empty() && i < strip.count) lse[at(strip, i)] = keeps(strip, i) ? row_log_sum(maximum, sum) : row_log_sum(T(0), T(0));
      }
      write_rows(strip, factor, out);
    }
  }

  /// states <- the rows of a block for some keys, to be merged.
  void partial_block(Index block, Range keys, const RowStates<T>& states) {
    stream(block, keys);
    for (const Lanes& strip : used_strips()) {
      alignas(64) T factor[kWidth];
      std::fill_n(factor, kWidth, T(1));
      for (Index i = 0; i < strip.count; ++i) {
        states.maximum[at(strip, i)] = keeps(strip, i) ? absolute_maximum(strip, i) : kNoMaximum<T>;
        states.sum[at(strip, i)] = keeps(strip, i) ? strip.total.sum[i] : T(0);
      }
      write_rows(strip, factor, states.weighted);
    }
  }

 private:
  static constexpr Index kWidth = kTilePackets * kLanes<T>;
  /// Tiles that are added up before the result joins the total, which keeps chains of sums short.
  static constexpr Index kChunkKeys = 32 * kTileKeys<T>;

  /// A strip and its results: recent ones of the current chunk of keys, total ones of all before.
  /// query_bias: -bias |q|^2, what log2 kappa has beyond the score.
  struct Lanes {
    T *queries, *query_bias;
    LaneState<T> recent, total;
    int packets;
    Index first, count;

    Index lanes() const { return packets * kLanes<T>; }
    Strip<T> strip() const { return {queries, recent, packets, count}; }
  };

  std::span<Lanes> used_strips() const { return strips_.first(static_cast<std::size_t>(used_)); }
  static std::size_t at(const Lanes& strip, Index i) { return static_cast<std::size_t>(strip.first + i); }
  bool keeps(const Lanes& strip, Index i) const { return keeps_query(product_.in, strip.first + i); }

  /// log2 of the factor between a state's sums and those of kappa.
  T absolute_maximum(const Lanes& strip, Index i) const {
    if (product_.maximum == Maximum::fixed) return 0;
    if (strip.total.sum[i] == 0) return kNoMaximum<T>;
    return strip.total.maximum[i] + strip.query_bias[i] + std::numbers::log2e_v<T> * product_.space.bias_origin;
  }

  void stream(Index block, Range keys) {
    load_queries(block);
    const Lanes& bottom = used_strips().back();
    const Index limit = product_.limit(bottom.first + bottom.count - 1);
    const Index last = limit < keys.last ? std::max(keys.first, limit + 1) : keys.last;
    for (Lanes& strip : used_strips()) reset(strip, strip.recent);
    for (Index first = keys.first; first < last; first += kChunkKeys) {
      stream_chunk({first, std::min(last, first + kChunkKeys)});
      for (Lanes& strip : used_strips()) {
        if (first == keys.first) {
          std::swap(strip.recent, strip.total);
        } else {
          merge_lanes(strip.total, strip.recent, strip.lanes(), product_.in.v.cols());
        }
        if (first + kChunkKeys < last) reset(strip, strip.recent);
      }
    }
    if (keys.first >= last) {
      for (Lanes& strip : used_strips()) std::swap(strip.recent, strip.total);
    }
  }

  void stream_chunk(Range keys) {
    for (Index first = keys.first; first < keys.last; first += kTileKeys<T>) {
      const KeyTile<T> tile = reader_.read(first, std::min(keys.last, first + kTileKeys<T>));
      for (const Lanes& strip : used_strips()) kernel_.add(strip.strip(), tile, product_.limit(strip.first));
    }
  }

  void load_queries(Index block) {
    const Range range = product_.partition.strips_of_block(block);
    used_ = range.last - range.first;
    for (Index s = range.first; s < range.last; ++s) {
      Lanes& strip = strips_[static_cast<std::size_t>(s - range.first)];
      const Range packets = product_.partition.packets_of_strip(s);
      strip.packets = static_cast<int>(packets.last - packets.first);
      strip.first = packets.first * kLanes<T>;
      strip.count = std::min(packets.last * kLanes<T>, product_.in.q.rows()) - strip.first;
      pack_queries(strip);
    }
  }

  void pack_queries(const Lanes& strip) const {
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      const T* rows[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        const bool real = p + i < strip.count && keeps(strip, p + i);
        rows[i] = real ? product_.in.q.data() + (strip.first + p + i) * product_.in.q.outerStride() : nullptr;
      }
      const auto squares = pack_rows(rows, product_.in.q.cols(), product_.space.center, product_.space.scale,
                                     strip.queries + p, strip.lanes());
      store(strip.query_bias + p, broadcast(-product_.space.bias) * squares);
    }
  }

  void reset(const Lanes& strip, const LaneState<T>& state) const {
    for (Index i = 0; i < strip.lanes(); ++i) {
      state.maximum[i] = product_.maximum == Maximum::running ? kNoMaximum<T>
                         : std::isnan(strip.query_bias[i])    ? T(0)  // its scores are NaN where it sees a key
                                                              : -strip.query_bias[i];
    }
    std::fill_n(state.sum, strip.lanes(), T(0));
    std::fill_n(state.weighted, strip.lanes() * product_.in.v.cols(), T(0));
  }

  /// to <- factor times the rows of a strip; dropped queries become 0.
  void write_rows(const Lanes& strip, const T* factor, MatrixRef<T> to) const {
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      T* rows[kLanes<T>];
      for (int i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < strip.count ? to.data() + (strip.first + p + i) * to.outerStride() : nullptr;
      }
      unpack_rows(strip.total.weighted + p, strip.lanes(), to.cols(), load(factor + p), rows);
      for (int i = 0; i < kLanes<T>; ++i) {
        if (rows[i] != nullptr && !keeps(strip, p + i)) std::fill_n(rows[i], to.cols(), T(0));
      }
    }
  }

  const Product<T>& product_;
  KeyReader<T> reader_;
  StripKernel<T> kernel_;
  std::span<Lanes> strips_;
  Index used_ = 0;
};

}  // namespace attn::detail
