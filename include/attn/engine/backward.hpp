/// Gradients of a streamed product: a block of queries meets a range of keys once more, and every weight is computed
/// anew.
///
///   for each key j of a tile:        score[j]  = scale q.k_j + bias_j             as in the forward pass
///                                    slope[j]  = dout.v_j
///   for each key j:                  weight[j] = 2^(score[j] - log_divisor)       what multiplied v_j
///                                    slope[j]  = weight[j] (slope[j] - dot)       the loss's derivative by the score
///   for each key j:                  dv_j     += sum over queries weight[j] dout
///                                    dk_j     += sum over queries slope[j] scale q
///   for each column c of k:          dq[c]    += sum_j k[j][c] slope[j]
///
/// Five products of the same register tile; queries lie along the lanes, as in strip.hpp.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/far_pairs.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/strip.hpp>
#include <attn/engine/tile.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <limits>
#include <numbers>
#include <span>

namespace attn::detail {

/// What the backward pass knows of each query: dout (n_q, d_v); log_sum, LogSums::relative, empty for raw rows; dot,
/// dout_i.out_i, which a normalised row's slopes are measured from, empty for raw rows.
template <class T>
struct RowGradients {
  ConstMatrixRef<T> dout;
  std::span<const RowLog<T>> log_sum;
  std::span<const T> dot;
};

/// Rows of a strip for the products that add to keys: slices of kSlicePackets packets of columns, each with one row a
/// lane.
inline constexpr int kSlicePackets = 2;
template <class T>
inline constexpr Index kSliceWidth = kSlicePackets * kLanes<T>;

/// Elements of the slices of so many lanes of rows with d columns.
template <class T>
inline Index slices_size(Index d, Index lanes) {
  return (d + kSliceWidth<T> - 1) / kSliceWidth<T> * kSliceWidth<T> * lanes;
}

/// Lane's row of slices <- scale (row - center), zeros beyond d; a null row and a null center are zeros. Returns
/// whether all is finite.
template <class T>
inline bool slice_row(const T* row, Index d, const T* center, T scale, T* slices, Index lanes, Index lane) {
  FiniteLanes<T> elements;
  for (Index c = 0; c < d; c += kLanes<T>) {
    const auto x =
        row == nullptr ? broadcast(T(0)) : (load_row(row, c, d) - load_row_if(center, c, d)) * broadcast(scale);
    elements.add(x);
    store(slices + (c / kSliceWidth<T> * lanes + lane) * kSliceWidth<T> + c % kSliceWidth<T>, x);
  }
  for (Index c = (d + kLanes<T> - 1) / kLanes<T> * kLanes<T>; c % kSliceWidth<T> != 0; c += kLanes<T>) {
    store(slices + (c / kSliceWidth<T> * lanes + lane) * kSliceWidth<T> + c % kSliceWidth<T>, broadcast(T(0)));
  }
  return elements.all();
}

/// scores <- weights, slopes <- the loss's derivatives by the scores; panels of count keys. at_most_one: no weight
/// exceeds 1, but for rounding.
template <int kPackets, class T>
[[gnu::noinline]] void weigh_slopes(T* scores, T* slopes, Index count, const T* log_divisor, const T* dot,
                                    bool at_most_one) {
  Packet<T> divisor[array_size(kPackets)], dots[array_size(kPackets)];
#pragma GCC unroll 4
  for (int p = 0; p < kPackets; ++p) {
    divisor[p] = load(log_divisor + p * kLanes<T>);
    dots[p] = load(dot + p * kLanes<T>);
  }
  const auto weigh = [&](const auto& power) {
    for (Index j = 0; j < count; ++j, scores += kPackets * kLanes<T>, slopes += kPackets * kLanes<T>) {
#pragma GCC unroll 4
      for (int p = 0; p < kPackets; ++p) {
        const auto weight = power(load(scores + p * kLanes<T>) - divisor[p]);
        store(scores + p * kLanes<T>, weight);
        store(slopes + p * kLanes<T>, weight * (load(slopes + p * kLanes<T>) - dots[p]));
      }
    }
  };
  if (at_most_one) {
    weigh([](Packet<T> x) { return exp2_bounded(min(x, broadcast(T(0)))); });
  } else {
    weigh([](Packet<T> x) { return exp2(x); });
  }
}

/// to_j += sum over lanes i of panel[j][i] row_i, for the count keys j of a tile and rows given as slices.
template <class T>
[[gnu::noinline]] void add_to_keys(const T* panel, Index lanes, const T* slices, const KeyTile<T>& tile, Index count,
                                   MatrixRef<T> to) {
  for (Index c = 0; c < to.cols(); c += kSliceWidth<T>, slices += lanes * kSliceWidth<T>) {
    for (Index j = 0; j < count; j += kTileRows) {
      Packet<T> added[array_size(kTileRows)][array_size(kSlicePackets)];
      multiply_tile(panel + j * lanes, count - j, lanes, 1, slices, lanes, added);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        if (j + r >= count) break;
        T* row = to.data() + tile.row(j + r) * to.outerStride();
#pragma GCC unroll 4
        for (int p = 0; p < kSlicePackets; ++p) {
          const Index at = c + p * kLanes<T>;
          if (at < to.cols()) store_row(row, at, to.cols(), load_row(row, at, to.cols()) + added[r][p]);
        }
      }
    }
  }
}

/// Where a task of the backward pass adds up: dq (n_q, d) of its keys, dk (n_k, d), dv (n_k, d_v) and dbias (n_k) of
/// its queries.
template <class T>
struct PartialGradients {
  MatrixRef<T> dq, dk, dv;
  std::span<T> dbias;
};

/// Runs tasks of a Product's backward pass. One for each worker; all its memory comes from the scratch that it is made
/// with.
template <class T>
class BackwardRunner {
 public:
  BackwardRunner(const Product<T>& product, const RowGradients<T>& rows, Scratch& scratch)
      : product_(product),
        rows_(rows),
        reader_(product.in, product.kernel, scratch),
        far_pairs_(product.far_pairs(scratch)),
        scores_(scratch.elements<T>(kTileKeys<T> * kTileWidth<T>)),
        slopes_(scratch.elements<T>(kTileKeys<T> * kTileWidth<T>)),
        ones_(scratch.elements<T>(kTileWidth<T>)),
        unused_(scratch.elements<T>(kTileWidth<T>)),
        strips_(scratch.array<Lanes>(kBlockStrips)) {
    std::fill_n(ones_, kTileWidth<T>, T(1));
    const Index d = product.in.q.cols(), d_v = product.in.v.cols();
    for (Lanes& strip : strips_) {
      strip.queries = QueryStrip<T>::make(product, scratch);
      for (T** row : {&strip.log_divisor, &strip.base, &strip.dot, &strip.slope_sum}) {
        *row = scratch.elements<T>(kTileWidth<T>);
      }
      strip.dq = scratch.elements<T>(kTileWidth<T> * round_up_to_tiles(d));
      strip.douts = scratch.elements<T>(kTileWidth<T> * d_v);
      strip.query_rows = scratch.elements<T>(slices_size<T>(d, kTileWidth<T>));
      strip.dout_rows = scratch.elements<T>(slices_size<T>(d_v, kTileWidth<T>));
    }
  }

  /// The queries of some strips meet some keys: their rows of to.dq are set, the keys' rows of to.dk, to.dv and
  /// to.dbias are set to what these queries add to them.
  void run(Range strips, Range keys, const PartialGradients<T>& to) {
    rows_of(to.dk, keys).setZero();
    rows_of(to.dv, keys).setZero();
    if (!to.dbias.empty()) std::fill_n(to.dbias.data() + keys.first, keys.last - keys.first, T(0));
    for (Range block{strips.first, 0}; block.first < strips.last; block.first = block.last) {
      block.last = std::min(strips.last, block.first + kBlockStrips);
      const std::span<Lanes> lanes = strips_.first(static_cast<std::size_t>(block.last - block.first));
      for (Lanes& strip : lanes) load_strip(strip, block.first++);
      stream(lanes, keys, to);
      for (const Lanes& strip : lanes) write_dq(strip, to.dq);
    }
  }

 private:
  static constexpr Index kBlockStrips = 4;

  /// A strip of queries, and what it adds up: queries and dout transposed for the products that run over features, as
  /// rows for those that run over queries.
  struct Lanes {
    QueryStrip<T> queries;
    T *douts, *query_rows, *dout_rows;
    T *log_divisor, *base, *dot;  ///< base as in RowStatistics
    T *dq, *slope_sum;
    bool finite;    ///< all of the above that is read
    bool has_base;  ///< whether any base is not 0
  };

  bool has_bias() const { return product_.kernel.bias != 0; }

  bool weights_at_most_one() const {
    return product_.rows == Rows::normalized ||
           (product_.bounded && product_.in.key_bias.empty());  // slopes lessen them
  }

  void load_strip(Lanes& strip, Index s) const {
    strip.queries.open(product_, s);
    strip.finite = true;
    strip.has_base = false;
    const QueryStrip<T>& queries = strip.queries;
    for (Index p = 0; p < queries.lanes(); p += kLanes<T>) load_rows(strip, p);
    strip.queries.load(product_, nullptr);  // after their rows have been read in the order of memory
    for (Index i = 0; i < queries.lanes(); ++i) set_statistics(strip, i);
    std::fill_n(strip.dq, queries.lanes() * round_up_to_tiles(product_.in.q.cols()), T(0));
    std::fill_n(strip.slope_sum, queries.lanes(), T(0));
  }

  /// The rows of kLanes queries, scaled as in the panel but in units of log, and of their dout.
  void load_rows(Lanes& strip, Index lane) const {
    const TokenRows<T>& q = product_.in.q;
    const T scale = std::numbers::ln2_v<T> * product_.kernel.scale;
    const T* dout[kLanes<T>];
    for (Index i = 0; i < kLanes<T>; ++i) {
      const Index row = strip.queries.first + lane + i;
      const bool real = strip.queries.holds(product_, lane + i);
      dout[i] = real ? row_of(rows_.dout, row) : nullptr;
      const bool finite = slice_row(real ? q.row_or_null(row) : nullptr, q.cols(), product_.kernel.center, scale,
                                    strip.query_rows, strip.queries.lanes(), lane + i);
      strip.finite &=
          slice_row<T>(dout[i], rows_.dout.cols(), nullptr, T(1), strip.dout_rows, strip.queries.lanes(), lane + i) &&
          finite;
    }
    pack_rows<T>(dout, rows_.dout.cols(), nullptr, T(1), strip.douts + lane, strip.queries.lanes());
  }

  /// A lane without a query, and a row that saw no key, have no weights.
  void set_statistics(Lanes& strip, Index i) const {
    const auto row = static_cast<std::size_t>(strip.queries.first + i);
    const bool real = strip.queries.holds(product_, i);
    strip.dot[i] = real && !rows_.dot.empty() ? rows_.dot[row] : T(0);
    const RowLog<T> log_sum = real ? log_sum_of(row, strip.queries.norm[i]) : RowLog<T>{kInfinity, T(0)};
    strip.base[i] = log_sum.base;
    strip.log_divisor[i] = log_sum.value;
    strip.has_base = strip.has_base || log_sum.base != 0;
    if (!real || is_negative_infinity(strip.log_divisor[i])) strip.log_divisor[i] = kInfinity;
    strip.finite = strip.finite && is_finite(strip.dot[i]) && !is_nan(strip.log_divisor[i]);
  }

  /// The log2 of what a query's weights are divided by, as they are counted, and their base: raw rows that are far from
  /// the center have one.
  RowLog<T> log_sum_of(std::size_t row, T norm) const {
    if (!rows_.log_sum.empty()) return {std::numbers::log2e_v<T> * rows_.log_sum[row].value, rows_.log_sum[row].base};
    const T base = product_.kernel.center != nullptr && norm > kFarNorm<T> ? norm : T(0);
    return {static_cast<T>(-product_.origin(static_cast<Index>(row), base - norm)), base};
  }

  void stream(std::span<Lanes> strips, Range keys, const PartialGradients<T>& to) {
    const Index limit = product_.limits.of(strips.back().queries.rows().last - 1);
    keys = tiles_up_to<T>(keys, limit);
    for (Index first = keys.first; first < keys.last; first += kTileKeys<T>) {
      const Range rows{first, std::min(keys.last, first + kTileKeys<T>)};
      if (product_.limits.passes_over(rows, strips.front().queries.first)) continue;
      const KeyTile<T> tile = reader_.read(rows.first, rows.last);
      for (const Lanes& strip : strips) add_seen_keys(strip, tile, to);
    }
  }

  void add_seen_keys(const Lanes& strip, const KeyTile<T>& tile, const PartialGradients<T>& to) {
    const QueryStrip<T>& queries = strip.queries;
    const CausalLimits& limits = product_.limits;
    const Index limit = limits.of(queries.first);
    if (!limits.has_window()) return add(strip, tile, tile.seen_by(queries.count, limit), limit, to);
    const KeyTile<T> some = tile.without_past(limits, limit);
    if (some.count > 0) add(strip, some, some.seen_by(limits, queries.count, limit), limit, to);
  }

  void add(const Lanes& strip, const KeyTile<T>& tile, const SeenKeys& seen, Index limit,
           const PartialGradients<T>& to) {
    const QueryStrip<T>& queries = strip.queries;
    const Index lanes = queries.lanes(), d = product_.in.k.cols();
    if (seen.count == 0) return;
    set_slopes(strip, tile, seen, limit);
    if (seen.partly()) {
      for (T* panel : {scores_, slopes_}) {
        hide_future(tile, seen, limit, T(0), lanes, panel);
        if (seen.leaves_any()) hide_past(tile, seen, limit, product_.limits.window, T(0), lanes, panel);
      }
      if (!strip.finite || !tile.finite_keys(seen.first_hidden(), seen.count, d)) {
        return add_seen(strip, tile, seen.count, limit, to);
      }
    }
    add_sums(strip, tile, seen.count, to);
    add_to_keys(scores_, lanes, strip.dout_rows, tile, seen.count, to.dv);
    add_to_keys(slopes_, lanes, strip.query_rows, tile, seen.count, to.dk);
    with_packets<kTilePackets>(queries.packets, [&](auto packets) {
      add_values<packets>(tile.k, tile.k_stride, d, slopes_, seen.count, ones_, strip.dq, {});
    });
  }

  /// scores_ and slopes_ <- weights and derivatives by the scores, of the keys that any query of the strip sees.
  void set_slopes(const Lanes& strip, const KeyTile<T>& tile, const SeenKeys& seen, Index limit) const {
    const QueryStrip<T>& queries = strip.queries;
    const bool own_origins = queries.bias_origin != nullptr, adds_bias = own_origins && !tile.seen_wholly(seen);
    const KeyTile<T> scored = adds_bias ? tile.without_key_bias() : tile;
    with_packets<kTilePackets>(queries.packets, [&](auto packets) {
      score_keys<packets>(scored, seen.count, queries.panel, product_.in.q.cols(), scores_, unused_, {});
      if (strip.has_base)
        far_pairs_->refine(queries, scored, seen.count, strip.base, strip.log_divisor, scores_, unused_);
      if (adds_bias) {
        const T slope = product_.kernel.slope;
        add_key_bias(tile, seen.count, queries.bias_origin, queries.lanes(), scores_);
        if (slope != 0) subtract_distances(tile, seen.count, slope, limit, queries.lanes(), scores_);
      }
      score_keys<packets>(tile.values(), seen.count, strip.douts, product_.in.v.cols(), slopes_, unused_, {});
      const T* const divisor = own_origins && !adds_bias ? shifted_divisor(strip, tile, limit) : strip.log_divisor;
      weigh_slopes<packets>(scores_, slopes_, seen.count, divisor, strip.dot, weights_at_most_one());
    });
  }

  /// log_divisor as counted from the origin of a tile's biases.
  const T* shifted_divisor(const Lanes& strip, const KeyTile<T>& tile, Index limit) const {
    const QueryStrip<T>& queries = strip.queries;
    set_bias_shift(tile, queries.bias_origin, product_.kernel.slope, limit, queries.lanes(), unused_);
    for (Index i = 0; i < queries.lanes(); ++i) unused_[i] = strip.log_divisor[i] - unused_[i];
    return unused_;
  }

  /// Sums of slopes: over the keys into slope_sum, over the queries into dbias.
  void add_sums(const Lanes& strip, const KeyTile<T>& tile, Index count, const PartialGradients<T>& to) const {
    if (to.dbias.empty()) return;
    for (Index j = 0; j < count; ++j) {
      auto over_queries = broadcast(T(0));
      for (Index p = 0; p < strip.queries.lanes(); p += kLanes<T>) {
        const auto slope = load(slopes_ + j * strip.queries.lanes() + p);
        over_queries = over_queries + slope;
        store(strip.slope_sum + p, load(strip.slope_sum + p) + slope);
      }
      to.dbias[static_cast<std::size_t>(tile.row(j))] += sum(over_queries);
    }
  }

  /// The products pair by pair, for a tile that only some queries see and that holds, or meets, what is not finite: 0
  /// times it would be NaN where nothing should be.
  void add_seen(const Lanes& strip, const KeyTile<T>& tile, Index count, Index limit,
                const PartialGradients<T>& to) const {
    const Index d = product_.in.k.cols(), d_v = product_.in.v.cols(), lanes = strip.queries.lanes();
    const auto sliced = [&](const T* slices, Index i, Index c) {
      return slices[(c / kSliceWidth<T> * lanes + i) * kSliceWidth<T> + c % kSliceWidth<T>];
    };
    for (Index j = 0; j < count; ++j) {
      const Index row = tile.row(j);
      const Range seeing = product_.limits.queries_seeing(row, limit, strip.queries.count);
      for (Index i = seeing.first; i < seeing.last; ++i) {
        const T weight = scores_[j * lanes + i], slope = slopes_[j * lanes + i];
        for (Index c = 0; c < d_v; ++c)
          to.dv.data()[row * to.dv.outerStride() + c] += weight * sliced(strip.dout_rows, i, c);
        for (Index c = 0; c < d; ++c)
          to.dk.data()[row * to.dk.outerStride() + c] += slope * sliced(strip.query_rows, i, c);
        for (Index c = 0; c < d; ++c) strip.dq[c * lanes + i] += slope * tile.k[j * tile.k_stride + c];
        strip.slope_sum[i] += slope;
        if (!to.dbias.empty()) to.dbias[static_cast<std::size_t>(row)] += slope;
      }
    }
  }

  /// dq_i = scale sum_j slope k_j - 2 bias (sum_j slope) q_i; dropped queries, and those that see no key, get zeros.
  void write_dq(const Lanes& strip, MatrixRef<T> dq) const {
    const T scale = std::numbers::ln2_v<T> * product_.kernel.scale,
            twice_bias = 2 * std::numbers::ln2_v<T> * product_.kernel.bias;
    for (Index p = 0; p < strip.queries.lanes(); p += kLanes<T>) {
      T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < strip.queries.count ? row_of(dq, strip.queries.first + p + i) : nullptr;
      }
      unpack_rows(strip.dq + p, strip.queries.lanes(), dq.cols(), broadcast(scale), rows);
    }
    for (Index i = 0; i < strip.queries.count; ++i) {
      const Index row = strip.queries.first + i;
      T* to = row_of(dq, row);
      if (!keeps_query(product_.in, row)) {
        std::fill_n(to, dq.cols(), T(0));
      } else if (has_bias() && strip.slope_sum[i] != 0) {
        const T* q = row_of(product_.in.q, row);
        const T* center = product_.kernel.center;
        for (Index c = 0; c < dq.cols(); ++c)
          to[c] -= twice_bias * strip.slope_sum[i] * (q[c] - (center == nullptr ? T(0) : center[c]));
      }
    }
  }

  static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  const Product<T>& product_;
  const RowGradients<T>& rows_;
  KeyReader<T> reader_;
  const FarPairs<T>* far_pairs_;
  T *scores_, *slopes_, *ones_, *unused_;
  std::span<Lanes> strips_;
};

}  // namespace attn::detail
