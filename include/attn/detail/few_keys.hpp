/// Many queries meet few keys, all of them at once: what a landmark method's wide factor is.
///
///   for each strip of queries:                             keys lie along the lanes, packed once for all strips
///     score[i]  = scale q_i.k + bias                       register tiles, keep c + diag(factor) a b
///     weight[i] = 2^(score[i] - their maximum)
///     out[i]    = factor_i sum_j weight[i][j] v_j          register tiles
///
/// Neither q nor out is transposed as strip.hpp would, which at 64 keys takes a tenth of the time.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/exp2.hpp>
#include <attn/detail/key_tiles.hpp>
#include <attn/detail/panel.hpp>
#include <attn/detail/panels.hpp>
#include <attn/detail/product.hpp>
#include <attn/detail/upcoming.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>

namespace attn::detail {

/// All keys and values of a product, which several workers read.
template <class T>
struct FewKeys {
  Panels<T> keys, values;
  const T* bias;  ///< of each lane of keys.packets, in units of log2, -infinity beyond the last key; null if all are 0

  /// Below four queries a key, packing costs more than it saves.
  static bool suits(const Product<T>& product) {
    const Index n_q = product.in.q.rows(), n_k = product.in.k.rows();
    return product.in.mask.causal == Causal::none && n_k <= kTileKeys<T> && n_k <= n_q / 4 && product.partition.splits == 1;
  }

  static FewKeys pack(const Product<T>& product, Scratch& scratch) {
    const KeyReader<T> reader(product.in, product.space, scratch);
    const KeyTile<T> tile = reader.read(0, product.in.k.rows());
    const ConstMatrixRef<T> k(tile.k, tile.count, product.in.k.cols(), tile.k_stride),
        v(tile.v, tile.count, product.in.v.cols(), tile.v_stride);
    const auto keys = Panels<T>::pack(transposed(k), scratch);
    const auto values = Panels<T>::pack(v, scratch);
    const Index lanes = keys.packets * kLanes<T>;
    if (tile.bias == nullptr && lanes == tile.count) return {keys, values, nullptr};
    const std::span<T> bias = scratch.array<T>(lanes);
    std::fill(bias.begin(), bias.end(), -std::numeric_limits<T>::infinity());
    for (Index j = 0; j < tile.count; ++j) bias[static_cast<std::size_t>(j)] = tile.bias != nullptr ? tile.bias[j] : T(0);
    return {keys, values, bias.data()};
  }
};

/// Computes rows of a product with few keys. One for each worker; all its memory comes from the scratch that it is made with.
template <class T>
class FewKeysRunner {
 public:
  FewKeysRunner(const Product<T>& product, const FewKeys<T>& few, Scratch& scratch)
      : product_(product),
        few_(few),
        scores_(scratch.matrix<T>(kWidth, few.keys.packets * kLanes<T>)),
        queries_(scratch.matrix<T>(kWidth, product.in.q.cols())),
        results_(scratch.matrix<T>(kWidth, product.in.v.cols())),
        lanes_(scratch.array<T>(kLanes<T> * kLanes<T>).data()) {
    for (T** row : {&maximum_, &sum_, &query_bias_, &factor_}) *row = scratch.array<T>(kWidth).data();
    scores_.setZero();
  }

  /// out (n_q, d_v) <- the finished rows of a block; lse, unless empty, their log-sums.
  void finish_block(Index block, const ResultRows<T>& out, std::span<T> lse) {
    const Range strips = product_.partition.strips_of_block(block);
    for (Index s = strips.first; s < strips.last; ++s) finish_rows(rows_of_strip(s), out, lse);
  }

 private:
  static constexpr Index kWidth = kTilePackets * kLanes<T>;
  static constexpr int kRows = std::min(4, kLanes<T>);  ///< weighed side by side, so that none waits for another

  Range rows_of_strip(Index s) const {
    const Range packets = product_.partition.packets_of_strip(s);
    return {packets.first * kLanes<T>, std::min(packets.last * kLanes<T>, product_.in.q.rows())};
  }

  void finish_rows(Range rows, const ResultRows<T>& out, std::span<T> lse) {
    const Index count = rows.last - rows.first;
    const Upcoming next_queries = Upcoming::of(product_.in.q.memory(), {rows.last, rows.last + count}),
                   results = Upcoming::of(out.memory(), rows);
    const MatrixRef<T> weights = scores_.topRows(count);
    few_.keys.multiply({&product_.space.scale, 0}, read_queries(rows), 0, weights, next_queries);
    weigh();
    product_.set_factors(maximum_, sum_, query_bias_, kWidth, factor_);
    MatrixRef<T> to =
        out.in_place() ? MatrixRef<T>(out.matrix().middleRows(rows.first, count)) : MatrixRef<T>(results_.topRows(count));
    few_.values.multiply({factor_, 1}, weights, 0, to, results);
    for (Index i = 0; i < count; ++i) {
      const bool keeps = keeps_query(product_.in, rows.first + i);
      if (!keeps) to.row(i).setZero();
      out.finish_row(rows.first + i, to.row(i).data());
      if (!lse.empty())
        lse[static_cast<std::size_t>(rows.first + i)] = product_.log_sum(keeps, maximum_[i], sum_[i], query_bias_[i]);
    }
  }

  /// The queries, relative to the center; sets their bias.
  ConstMatrixRef<T> read_queries(Range rows) {
    const bool as_they_are = product_.in.q.in_place() && product_.space.center == nullptr;
    const ConstMatrixRef<T> queries =
        as_they_are ? ConstMatrixRef<T>(product_.in.q.matrix().middleRows(rows.first, rows.last - rows.first)) : copy_queries(rows);
    std::fill_n(query_bias_, kWidth, T(0));
    if (product_.space.bias == 0) return queries;
    for (Index i = 0; i < queries.rows(); ++i) {
      query_bias_[i] = -product_.space.bias * squared_norm(queries.data() + i * queries.outerStride(), queries.cols());
    }
    return queries;
  }

  ConstMatrixRef<T> copy_queries(Range rows) {
    const Index d = queries_.cols(), count = rows.last - rows.first;
    for (Index i = 0; i < count; ++i) {
      T* to = queries_.data() + i * d;
      product_.in.q.copy_row(rows.first + i, to);
      if (product_.space.center == nullptr) continue;
      for (Index c = 0; c < d; c += kLanes<T>) store_row(to, c, d, load_row(to, c, d) - load_row(product_.space.center, c, d));
    }
    return queries_.topRows(count);
  }

  /// Turns scores into weights relative to a maximum of each row, and sums them.
  void weigh() {
    if (few_.bias != nullptr) add_bias();
    for (Index first = 0; first < kWidth; first += kLanes<T>) {
      if (product_.maximum == Maximum::fixed) {
        set_fixed_maxima(first);
        for (Index i = first; i < first + kLanes<T>; i += kRows) weigh_rows<Maximum::fixed>(i);
      } else {
        set_maxima(first);
        for (Index i = first; i < first + kLanes<T>; i += kRows) weigh_rows<Maximum::running>(i);
      }
      store(sum_ + first, reduce_rows([](auto a, auto b) { return a + b; }));
    }
  }

  void add_bias() {
    for (Index i = 0; i < kWidth; ++i) {
      T* row = scores_.data() + i * scores_.cols();
      for (Index j = 0; j < scores_.cols(); j += kLanes<T>) store(row + j, load(row + j) + load(few_.bias + j));
    }
  }

  /// What makes the weights kappa itself; where that is NaN, all scores are, too.
  void set_fixed_maxima(Index first) {
    for (Index i = first; i < first + kLanes<T>; ++i) maximum_[i] = std::isnan(query_bias_[i]) ? T(0) : -query_bias_[i];
  }

  void set_maxima(Index first) {
    for (Index i = first; i < first + kLanes<T>; i += kRows) {
      Packet<T> top[extent(kRows)];
      unroll<kRows>([&](int r) __attribute__((always_inline)) { top[r] = broadcast(kNoMaximum<T>); });
      const T* row = scores_.data() + i * scores_.cols();
      for (Index j = 0; j < scores_.cols(); j += kLanes<T>) {
        unroll<kRows>([&](int r) __attribute__((always_inline)) { top[r] = max(top[r], load(row + r * scores_.cols() + j)); });
      }
      keep_lanes(i % kLanes<T>, top);
    }
    store(maximum_ + first, reduce_rows([](auto a, auto b) { return max(a, b); }));
  }

  /// Of rows i to i + kRows. No score is above a fixed maximum but by rounding (see weigh).
  template <Maximum kMaximum>
  void weigh_rows(Index i) {
    Packet<T> total[extent(kRows)];
    unroll<kRows>([&](int r) __attribute__((always_inline)) { total[r] = broadcast(T(0)); });
    T* row = scores_.data() + i * scores_.cols();
    for (Index j = 0; j < scores_.cols(); j += kLanes<T>) {
      unroll<kRows>([&](int r) __attribute__((always_inline)) {
        T* to = row + r * scores_.cols() + j;
        auto exponent = load(to) - broadcast(maximum_[i + r]);
        if constexpr (kMaximum == Maximum::fixed) exponent = min(exponent, broadcast(T(0)));
        const auto weight = exp2(exponent);
        total[r] = total[r] + weight;
        store(to, weight);
      });
    }
    keep_lanes(i % kLanes<T>, total);
  }

  void keep_lanes(Index row, const Packet<T> (&rows)[extent(kRows)]) {
    unroll<kRows>([&](int r) __attribute__((always_inline)) { store(lanes_ + (row + r) * kLanes<T>, rows[r]); });
  }

  /// Lane i: the lanes kept of row i, combined.
  template <class Op>
  Packet<T> reduce_rows(const Op& op) const {
    Packet<T> rows[extent(kLanes<T>)];
    unroll<kLanes<T>>([&](int r) __attribute__((always_inline)) { rows[r] = load(lanes_ + r * kLanes<T>); });
    return reduce(rows, op);
  }

  const Product<T>& product_;
  const FewKeys<T>& few_;
  MatrixRef<T> scores_, queries_, results_;
  T *lanes_, *maximum_, *sum_, *query_bias_, *factor_;
};

}  // namespace attn::detail
