/// Few queries meet many keys, which takes as long as reading them: what decoding with a cache is.
///
///   for each tile of keys:                                features lie along the lanes, rows are read where they lie
///     score[i][j]  = scale q_i.k_j, or of a Gaussian -bias |q_i - k_j|^2, + a_j - origin_i
///     for each query i:                                   keys lie along the lanes
///       correction_i = 2^(maximum_i - max(maximum_i, score[i]))     maximum_i follows
///       weight[i][j] = 2^(score[i][j] - maximum_i)
///       sum_i        = correction_i sum_i + sum_j weight[i][j]
///     weighted_i   = correction_i weighted_i + sum_j weight[i][j] v_j
///
/// strip.hpp has queries along the lanes, and so computes at least two packets of them. Here no row of results depends
/// on the other queries: heads that share their keys get bitwise what each of them gets alone. A Gaussian's scores are
/// log2 kappa itself, from the difference of the tokens: no center is needed to keep their digits.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/row_products.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numbers>

namespace attn::detail {

/// All queries of a product, which several workers read.
template <class T>
struct FewQueries {
  FewRows<T> rows;  ///< scaled, as pack_query makes them; as they are where distances are measured
  T* norm;          ///< bias |q - center|^2 where that is finite, which log-sums are relative to; 0 without a center

  /// Up to so many queries take less time than strips of them would; 0 if none do. Distances take longer than products,
  /// and are the scores of a Gaussian alone, not of every kernel that has a bias.
  static constexpr Index most(bool has_bias, bool gaussian) {
    if (gaussian) return (kLanes<T> + 1) / 2;
    return has_bias ? 0 : kLanes<T> + kLanes<T> / 4;
  }

  static bool suits(const Product<T>& product) {
    return product.in.q.rows() <= most(product.kernel.bias != 0, measures_distances(product));
  }

  static bool measures_distances(const Product<T>& product) { return product.kernel.center != nullptr; }

  static FewQueries pack(const Product<T>& product, Scratch& scratch) {
    const TokenRows<T>& q = product.in.q;
    const Index d = q.cols(), cols = std::max<Index>(d, kLanes<T>), room = with_room<T>(q.rows());
    const Index width = times_to_read(cols, kLanes<T>) * kLanes<T>;
    const FewQueries few{{scratch.elements<T>(room * width), q.rows(), width}, scratch.elements<T>(kTileWidth<T>)};
    std::fill_n(few.norm, kTileWidth<T>, T(0));
    std::fill_n(few.rows.data, room * width, T(0));
    T* const row = scratch.elements<T>(cols);
    std::fill_n(row, cols, T(0));
    for (Index i = 0; i < q.rows(); ++i) {
      if (!keeps_query(product.in, i)) continue;
      T* const to = few.rows.row(i);
      if (measures_distances(product)) {
        q.copy_row(i, to);
        const T norm = product.kernel.bias * squared_distance<T>(to, product.kernel.center, d);
        few.norm[i] = is_finite(norm) ? norm : T(0);
      } else {
        q.copy_row(i, row);
        scale_row(product.kernel.scale, row, row, d);
        pack_query(row, cols, to);
      }
    }
    return few;
  }
};

/// Row states of few queries: beside their statistics what the weights seen so far add up to with the values, each row
/// as its packets.
template <class T>
struct FewQueriesState : RowStatistics<T> {
  FewRows<T> weighted;

  static FewQueriesState make(Index n_q, Index d_v, Scratch& scratch) {
    T* const rows = scratch.elements<T>(3 * kTileWidth<T>);
    const Index width = times_to_read(d_v, kLanes<T>) * kLanes<T>;
    return {{rows, rows + kTileWidth<T>, rows + 2 * kTileWidth<T>},
            {scratch.elements<T>(with_room<T>(n_q) * width), n_q, width}};
  }
};

/// to_i <- factors_i to_i + from_factors_i from_i.
template <class T>
[[gnu::noinline]] void add_rows(const FewRows<T>& to, const T* factors, const FewRows<T>& from, const T* from_factors) {
  for (Index i = 0; i < to.count; ++i) {
    const auto factor = broadcast(factors[i]), from_factor = broadcast(from_factors[i]);
    for (Index c = 0; c < to.stride; c += kLanes<T>) {
      store(to.row(i) + c, multiply_add(load(from.row(i) + c), from_factor, load(to.row(i) + c) * factor));
    }
  }
}

/// Streams keys past the queries of a product. One for each worker; all its memory comes from the scratch that it is
/// made with.
template <class T>
class FewQueriesRunner {
 public:
  FewQueriesRunner(const Product<T>& product, const FewQueries<T>& queries, Scratch& scratch)
      : product_(product),
        queries_(queries),
        tile_keys_(std::clamp(kTileElements / (product.in.k.cols() + product.in.v.cols()), kFewestKeys, kKeys)),
        drops_keys_(!product.in.mask.keep_key.empty() || !product.in.key_bias.empty()),
        recent_(FewQueriesState<T>::make(queries.rows.count, product.in.v.cols(), scratch)),
        scores_{scratch.elements<T>(with_room<T>(queries.rows.count) * kKeys), queries.rows.count, kKeys},
        sums_(FewQueriesState<T>::make(queries.rows.count, product.in.v.cols(), scratch).weighted),
        tile_maximum_(scratch.elements<T>(kTileWidth<T>)),
        correction_(scratch.elements<T>(kTileWidth<T>)),
        ones_(scratch.elements<T>(kTileWidth<T>)),
        key_bias_(product.in.key_bias.empty() ? nullptr : scratch.elements<T>(kKeys)),
        padded_k_(padding(product.in.k, scratch)),
        padded_v_(padding(product.in.v, scratch)),
        row_(scratch.elements<T>(std::max(product.in.k.cols(), product.in.v.cols()))),
        numbers_(scratch.elements<Index>(kKeys)),
        seen_(scratch.elements<Index>(queries.rows.count)),
        past_(product.limits.has_window() ? scratch.elements<Range>(queries.rows.count) : nullptr) {
    std::fill_n(ones_, kTileWidth<T>, T(1));
    std::fill_n(scores_.data, with_room<T>(queries.rows.count) * kKeys, T(0));
    for (Index j = 0; j < kKeys; ++j) numbers_[j] = j;
  }

  /// total <- the state after the given keys.
  void stream(Range keys, const FewQueriesState<T>& total) const {
    const Index limit = product_.limits.of(queries_.rows.count - 1);
    if (limit < keys.last) keys.last = std::max(keys.first, limit + 1);
    Range chunk{keys.first, keys.first};
    do {  // once even where there are no keys
      chunk = {chunk.last, std::min(keys.last, chunk.last + kChunk * tile_keys_)};
      if (chunk.first != keys.first && product_.limits.passes_over(chunk, 0)) continue;
      const FewQueriesState<T>& state = chunk.first == keys.first ? total : recent_;
      reset(state);
      for (Index first = chunk.first; first < chunk.last; first += tile_keys_) {
        const Range tile{first, std::min(chunk.last, first + tile_keys_)};
        if (!product_.limits.passes_over(tile, 0)) add(tile, state);
      }
      if (chunk.first != keys.first) merge(total, recent_);
    } while (chunk.last < keys.last);
  }

  /// into <- both states together.
  void merge(const FewQueriesState<T>& into, const FewQueriesState<T>& from) const {
    T *const of_into = tile_maximum_, *const of_from = correction_;
    for (Index p = 0; p < kTileWidth<T>; p += kLanes<T>) {
      const auto a = load(into.maximum + p), b = load(from.maximum + p), top = max(a, b);
      store(of_into + p, exp2_bounded(a - top));
      store(of_from + p, exp2_bounded(b - top));
      store(into.maximum + p, top);
      store(into.sum + p, multiply_add(load(from.sum + p), load(of_from + p), load(into.sum + p) * load(of_into + p)));
    }
    add_rows(into.weighted, of_into, from.weighted, of_from);
  }

  /// out (n_q, d_v) <- the finished rows, and their log-sums.
  void write_results(const FewQueriesState<T>& total, const ResultRows<T>& out, const LogSums<T>& logs) const {
    RowScales<T> scales;
    product_.set_scales(0, total, queries_.norm, kTileWidth<T>, &scales);
    write_rows(total, scales, out);
    product_.write_log_sums(logs, 0, total, queries_.norm, queries_.rows.count);
  }

  /// states, maximum, sum and weighted <- those of the rows.
  template <class States>
  void write_states(const FewQueriesState<T>& total, const States& states) const {
    RowScales<T> scales;
    for (Index i = 0; i < queries_.rows.count; ++i) {
      const T sum = keeps_query(product_.in, i) ? total.sum[i] : T(0);
      states.maximum.data()[i] = product_.state_maximum(i, total.maximum[i], sum, 0, &scales.first[i]);
      states.sum.data()[i] = scales.first[i] * sum;
    }
    write_rows(total, scales, states.weighted);
  }

 private:
  static constexpr Index kKeys = 256, kFewestKeys = 32;  ///< of a tile: no sum in a register is longer than the most
  static constexpr Index kTileElements = 32768;          ///< of its keys and values, which fit a small L2 cache
  static constexpr Index kChunk = 32;                    ///< tiles that are added up before they join the total

  static T* padding(const TokenRows<T>& x, Scratch& scratch) {
    return x.cols() < kLanes<T> ? scratch.elements<T>(kKeys * kLanes<T>) : nullptr;
  }

  void reset(const FewQueriesState<T>& state) const {
    std::copy_n(queries_.norm, kTileWidth<T>, state.base);
    std::fill_n(state.maximum, kTileWidth<T>, product_.maximum == Maximum::none ? T(0) : kNoMaximum<T>);
    std::fill_n(state.sum, kTileWidth<T>, T(0));
    std::fill_n(state.weighted.data, state.weighted.count * state.weighted.stride, T(0));
  }

  /// Adds the kept keys of a tile to a state.
  void add(Range tile, const FewQueriesState<T>& state) const {
    const Index kept = list_keys(tile), count = set_seen(tile, kept);
    if (count == 0) return;
    const bool leaves_any = past_ != nullptr && set_past(tile, kept);
    const Index by_all = *std::min_element(seen_, seen_ + queries_.rows.count);
    const MemoryRows &k_rows = product_.in.k.memory(), &v_rows = product_.in.v.memory();
    const Index next = std::min(tile.last, k_rows.rows - 1);
    const Read k = read(product_.in.k, tile, count, v_rows.row(tile.first), padded_k_),
               v = read(product_.in.v, tile, count, k_rows.row(next), padded_v_);
    if (FewQueries<T>::measures_distances(product_)) {
      measure_distances(tile, count);
    } else {
      k.products.score(k.rows, queries_.rows, scores_);
    }
    set_key_bias(tile, count);
    std::fill_n(tile_maximum_, kTileWidth<T>, kNoMaximum<T>);
    for (Index i = 0; i < queries_.rows.count; ++i) {
      if (product_.kernel.slope != 0) subtract_distances(i, tile.first);
      finish_scores(i, leaves_any ? past_[i] : Range{0, 0});
    }
    raise_maximum(state);
    for (Index i = 0; i < queries_.rows.count; ++i) state.sum[i] += weigh(scores_.row(i), seen_[i], state.maximum[i]);
    std::fill_n(sums_.data, with_room<T>(sums_.count) * sums_.stride, T(0));
    const Index together = leaves_any ? 0 : by_all;
    v.products.add(v.rows, {0, together}, scores_, sums_);
    for (Index i = 0; i < queries_.rows.count && together < count; ++i) {
      const Range past = leaves_any ? past_[i] : Range{together, together};
      v.products.add(v.rows, {together, past.first}, scores_.only(i), sums_.only(i));
      v.products.add(v.rows, {past.last, seen_[i]}, scores_.only(i), sums_.only(i));
    }
    add_rows(state.weighted, correction_, sums_, ones_);
  }

  /// numbers_ <- the kept keys, counted from the first of the tile; returns how many.
  Index list_keys(Range tile) const {
    if (!drops_keys_) return tile.last - tile.first;
    Index kept = 0;
    for (Index j = tile.first; j < tile.last; ++j) {
      if (keeps_key(product_.in, j)) numbers_[kept++] = j - tile.first;
    }
    return kept;
  }

  /// seen_ <- how many of the listed keys each query sees; returns the most.
  Index set_seen(Range tile, Index kept) const {
    if (!product_.limits.causal) {
      std::fill_n(seen_, queries_.rows.count, kept);
      return kept;
    }
    for (Index i = 0; i < queries_.rows.count; ++i) {
      seen_[i] = std::upper_bound(numbers_, numbers_ + kept, product_.limits.of(i) - tile.first) - numbers_;
    }
    return *std::max_element(seen_, seen_ + queries_.rows.count);
  }

  /// past_ <- which of the listed keys that each query would see its window leaves behind; returns whether any.
  bool set_past(Range tile, Index kept) const {
    const auto before = [&](Index row) {
      return std::lower_bound(numbers_, numbers_ + kept, row - tile.first) - numbers_;
    };
    const Index sinks = before(product_.limits.sinks);
    bool any = false;
    for (Index i = 0; i < queries_.rows.count; ++i) {
      const Index first = std::min(sinks, seen_[i]);
      past_[i] = {first, std::clamp(before(product_.limits.from(i)), first, seen_[i])};
      any = any || past_[i].first < past_[i].last;
    }
    return any;
  }

  /// Rows to be multiplied, and how.
  struct Read {
    ListedRows rows;
    const RowProducts<T>& products;
  };

  /// The listed rows as they lie, or where they are shorter than a packet, padded with zeros. next: the row that will
  /// be read after the first.
  Read read(const TokenRows<T>& x, Range tile, Index count, const char* next, T* padded) const {
    const MemoryRows& memory = x.memory();
    const char* const first = memory.row(tile.first);
    if (padded == nullptr) {
      return {{first, memory.stride_bytes, x.cols(), numbers_, count, bytes_between(first, next)}, x.products()};
    }
    for (Index j = 0; j < count; ++j) {
      T* const to = padded + numbers_[j] * kLanes<T>;
      std::fill_n(to, kLanes<T>, T(0));
      x.copy_row(tile.first + numbers_[j], to);
    }
    return {{reinterpret_cast<const char*>(padded), kLanes<T> * Index{sizeof(T)}, kLanes<T>, numbers_, count, 0},
            kRowProducts<T, T>};
  }

  static Index bytes_between(const char* from, const char* to) {
    return static_cast<Index>(reinterpret_cast<std::uintptr_t>(to) - reinterpret_cast<std::uintptr_t>(from));
  }

  /// Scores of a Gaussian: log2 kappa.
  void measure_distances(Range tile, Index count) const {
    const TokenRows<T>& k = product_.in.k;
    for (Index j = 0; j < count; ++j) {
      const T* const key = k.row(tile.first + numbers_[j], row_);
      for (Index i = 0; i < queries_.rows.count; ++i) {
        scores_.row(i)[j] = -product_.kernel.bias * distance(queries_.rows.row(i), key, k.cols());
      }
    }
  }

  /// |q - k|^2, some features at a time, which keeps chains of sums short.
  static T distance(const T* q, const T* k, Index d) {
    constexpr Index kAtOnce = 64 * kLanes<T>;
    T total = 0;
    for (Index c = 0; c < d; c += kAtOnce) total += squared_distance(q + c, k + c, std::min(kAtOnce, d - c));
    return total;
  }

  void set_key_bias(Range tile, Index count) const {
    for (Index j = 0; j < count && key_bias_ != nullptr; ++j) {
      key_bias_[j] = product_.in.key_bias.data()[tile.first + numbers_[j]];
    }
  }

  /// Scores of query i <- less what their keys' distances from its last one weigh.
  void subtract_distances(Index i, Index first) const {
    const Index limit = product_.limits.of(i) - first;
    for (Index j = 0; j < seen_[i]; ++j) {
      scores_.row(i)[j] += product_.kernel.slope * static_cast<T>(numbers_[j] - limit);
    }
  }

  /// Scores of the keys that query i sees, and -infinity in the place of those past and up to a whole packet;
  /// tile_maximum_ follows.
  void finish_scores(Index i, Range past) const {
    T* const row = scores_.row(i);
    const Index seen = seen_[i];
    const T origin = product_.kernel.bias_origins.of(i);
    for (Index j = 0; j < seen && key_bias_ != nullptr; ++j) {
      row[j] += std::numbers::log2e_v<T> * (key_bias_[j] - origin);
    }
    constexpr T kHidden = -std::numeric_limits<T>::infinity();
    std::fill_n(row + seen, whole_packets(seen) - seen, kHidden);
    std::fill_n(row + past.first, past.last - past.first, kHidden);
    auto top = broadcast(kNoMaximum<T>);
    for (Index j = 0; j < seen; j += kLanes<T>) top = max(top, load(row + j));
    tile_maximum_[i] = largest(top);
  }

  static Index whole_packets(Index n) { return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }

  /// maximum <- max(maximum, that of the tile); correction and sum follow.
  void raise_maximum(const FewQueriesState<T>& state) const {
    for (Index p = 0; p < kTileWidth<T>; p += kLanes<T>) {
      const auto before = load(state.maximum + p);
      const auto after = product_.maximum == Maximum::none ? before : max(before, load(tile_maximum_ + p));
      const auto correction = exp2_bounded(before - after);
      store(state.maximum + p, after);
      store(correction_ + p, correction);
      store(state.sum + p, load(state.sum + p) * correction);
    }
  }

  /// Turns scores into weights relative to maximum, and returns their sum.
  T weigh(T* row, Index seen, T maximum) const {
    const auto limit = broadcast(highest_exponent<T>(product_.maximum));
    auto total = broadcast(T(0));
    for (Index j = 0; j < seen; j += kLanes<T>) {
      const auto weight = exp2_bounded(min(load(row + j) - broadcast(maximum), limit));
      total = total + weight;
      store(row + j, weight);
    }
    return sum(total);
  }

  /// to <- scales times the rows of a state; dropped queries become 0.
  void write_rows(const FewQueriesState<T>& total, const RowScales<T>& scales, const ResultRows<T>& to) const {
    const Index d_v = to.cols();
    for (Index i = 0; i < queries_.rows.count; ++i) {
      T* const row = to.row(i, row_);
      const T* const from = total.weighted.row(i);
      for (Index time = 0; time < times_to_read(d_v, kLanes<T>); ++time) {
        const auto x = load(from + time * kLanes<T>) * broadcast(scales.first[i]);
        if (d_v < kLanes<T>) {
          store_some(row, d_v, x);
        } else {
          store_unaligned(row + start_to_read(time, d_v, kLanes<T>), x);
        }
      }
      if (scales.twice) scale_row(scales.second[i], row, row, d_v);
      if (!keeps_query(product_.in, i)) std::fill_n(row, d_v, T(0));
      to.finish_row(i, row);
    }
  }

  const Product<T>& product_;
  const FewQueries<T>& queries_;
  Index tile_keys_;
  bool drops_keys_;
  FewQueriesState<T> recent_;
  FewRows<T> scores_, sums_;
  T *tile_maximum_, *correction_, *ones_;
  T *key_bias_, *padded_k_, *padded_v_;  ///< of the tile; each null where it is not needed
  T* row_;                               ///< a key, or a row of results, where they are not in place
  Index *numbers_, *seen_;
  Range* past_;  ///< null without a window
};

/// Streams all keys past the queries, cut into splits that are merged, and calls write with a runner and the state.
template <class T, class Write>
void run_few_queries(const Product<T>& product, Context& context, Scratch& scratch, const Write& write) {
  const Index splits = product.partition.splits, n_k = product.in.k.rows();
  const FewQueries<T> queries = FewQueries<T>::pack(product, scratch);
  FewQueriesRunner<T>* const runners = scratch.make<FewQueriesRunner<T>>(context.workers(), product, queries, scratch);
  FewQueriesState<T>* const parts = scratch.elements<FewQueriesState<T>>(splits);
  for (Index i = 0; i < splits; ++i) {
    parts[i] = FewQueriesState<T>::make(queries.rows.count, product.in.v.cols(), scratch);
  }
  context.for_each(
      splits, [&](Index split, int worker) { runners[worker].stream(nth_part(n_k, splits, split), parts[split]); });
  for (Index i = 1; i < splits; ++i) runners[0].merge(parts[0], parts[i]);
  write(runners[0], parts[0]);
}

}  // namespace attn::detail
