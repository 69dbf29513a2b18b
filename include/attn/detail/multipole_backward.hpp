/// Gradients of multipole attention: of the products of near and far fields, and through the summaries.
///
///   far and near fields, as any product:   slope = weight (dout.v - dot),  dv += weight dout,  dk += slope s q, ...
///   a summary, with g_k, g_v, g_e the gradients by k_c, v_c and e_c:
///     g_k      <- g_k - g_e s l                                    for e_c holds s l.k_c
///     slope_j   = r_j (g_k.k_j + g_v.v_j - (g_k.k_c + g_v.v_c) + g_e)
///     dk_j     += r_j g_k + slope_j s l       dv_j += r_j g_v      dl += sum_j slope_j s k_j - g_e s k_c
///
/// So a summary is a product of one more kind: queries are landmarks, values are keys and values side by side.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/detail/multipole_fields.hpp>
#include <attn/engine/backward.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/strip.hpp>
#include <attn/engine/tile.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <limits>
#include <numbers>
#include <span>

namespace attn::detail {

/// Where gradients by keys, by values and by biases of keys are added; dbias is null where it is not wanted.
template <class T>
struct KeyGradients {
  MatrixRef<T> dk, dv;
  T* dbias;
};

/// A strip of queries, and of gradients by their rows of width elements, that meets tiles of keys; what they add to the
/// queries is summed up.
template <class T>
class GradientStrip {
 public:
  GradientStrip(Index d, Index width, Scratch& scratch)
      : log_divisor(scratch.elements<T>(kTileWidth<T>)),
        dot(scratch.elements<T>(kTileWidth<T>)),
        dq(scratch.elements<T>(kTileWidth<T> * round_up_to_tiles(d))),
        slope_sum(scratch.elements<T>(kTileWidth<T>)),
        d_(d),
        width_(width),
        panel_(scratch.elements<T>(kTileWidth<T> * d)),
        rows_(scratch.elements<T>(slices_size<T>(d, kTileWidth<T>))),
        dout_panel_(scratch.elements<T>(kTileWidth<T> * width)),
        dout_rows_(scratch.elements<T>(slices_size<T>(width, kTileWidth<T>))),
        scores_(scratch.elements<T>(kTileKeys<T> * kTileWidth<T>)),
        slopes_(scratch.elements<T>(kTileKeys<T> * kTileWidth<T>)),
        ones_(scratch.elements<T>(kTileWidth<T>)),
        unused_(scratch.elements<T>(kTileWidth<T>)) {
    std::fill_n(ones_, kTileWidth<T>, T(1));
  }

  Index lanes() const { return packets_ * kLanes<T>; }

  /// Begins with count queries, query(i) and dout(i) their rows: sets all but log_divisor and dot. Queries are taken
  /// relative to the center; scale: the kernel's, in units of log2.
  template <class Query, class Dout>
  void open(Index count, const T* center, T scale, const Query& query, const Dout& dout) {
    packets_ = static_cast<int>(packet_count<T>(count));
    std::fill_n(dq, lanes() * round_up_to_tiles(d_), T(0));
    std::fill_n(slope_sum, lanes(), T(0));
    for (Index p = 0; p < lanes(); p += kLanes<T>) {
      const T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < count ? query(p + i) : nullptr;
        slice_row<T>(rows[i], d_, center, std::numbers::ln2_v<T> * scale, rows_, lanes(), p + i);
      }
      pack_rows<T>(rows, d_, center, scale, panel_ + p, lanes());
    }
    set_dout(count, dout);
    for (Index i = count; i < lanes(); ++i) {
      log_divisor[i] = std::numeric_limits<T>::infinity();
      dot[i] = 0;
    }
  }

  /// Other gradients for the same queries.
  template <class Dout>
  void set_dout(Index count, const Dout& dout) {
    for (Index p = 0; p < lanes(); p += kLanes<T>) {
      const T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < count ? dout(p + i) : nullptr;
        slice_row<T>(rows[i], width_, nullptr, T(1), dout_rows_, lanes(), p + i);
      }
      pack_rows<T>(rows, width_, nullptr, T(1), dout_panel_ + p, lanes());
    }
  }

  /// Adds a tile's part to dq and slope_sum, and to its keys' gradients, rows tile.first on. at_most_one: no weight
  /// exceeds 1, but for rounding.
  void add(const KeyTile<T>& tile, bool at_most_one, const KeyGradients<T>& to) {
    with_packets<kTilePackets>(packets_, [&](auto packets) {
      score_keys<packets>(tile, tile.count, panel_, d_, scores_, unused_, {});
      score_keys<packets>(tile.values(), tile.count, dout_panel_, width_, slopes_, unused_, {});
      weigh_slopes<packets>(scores_, slopes_, tile.count, log_divisor, dot, at_most_one);
      add_values<packets>(tile.k, tile.k_stride, d_, slopes_, tile.count, ones_, dq, {});
    });
    for (Index j = 0; j < tile.count; ++j) {
      auto over_queries = broadcast(T(0));
      for (Index p = 0; p < lanes(); p += kLanes<T>) {
        const auto slope = load(slopes_ + j * lanes() + p);
        over_queries = over_queries + slope;
        store(slope_sum + p, load(slope_sum + p) + slope);
      }
      if (to.dbias != nullptr) to.dbias[tile.first + j] += sum(over_queries);
    }
    add_to_keys(scores_, lanes(), dout_rows_, tile, tile.count, to.dv);
    add_to_keys(slopes_, lanes(), rows_, tile, tile.count, to.dk);
  }

  T *log_divisor, *dot;  ///< of each lane, as in weigh_slopes
  T *dq, *slope_sum;     ///< sums so far: of slopes times keys (d rows, queries along the lanes), and of slopes

 private:
  Index d_, width_;
  T *panel_, *rows_, *dout_panel_, *dout_rows_, *scores_, *slopes_, *ones_, *unused_;
  int packets_ = 0;
};

/// What the backward pass is given, in the order of clusters and groups.
template <class T>
struct FieldGradients {
  const Product<T>& product;
  const KeyClusters<T>& keys;
  const QueryGroups<T>& queries;
  const QueryBlocks& blocks;
  FieldRecord<T, const Index> record;
  ConstMatrixRef<T> out, dout;
  MatrixRef<T> dq;
  bool at_most_one;
};

/// Adds up the gradients of some groups of queries. One for each part of them.
template <class T>
class FieldBackward {
 public:
  FieldBackward(const FieldGradients<T>& given, Scratch& scratch)
      : given_(given),
        d_(given.keys.d),
        d_v_(given.keys.d_v()),
        summaries_(Summaries<T>::make(std::min(kTileWidth<T>, given.queries.groups.count()), given.keys, scratch)),
        dsummaries_(scratch.matrix<T>(summaries_.tokens.rows(), d_ + d_v_)),
        dbias_(scratch.matrix<T>(summaries_.bias.rows(), summaries_.bias.cols())),
        far_bias_(scratch.elements<T>(given.keys.clusters.count())),
        runner_(given.product.in, given.keys, scratch),
        strip_(d_, d_v_, scratch),
        landmarks_(d_, d_ + d_v_, scratch),
        dland_(scratch.matrix<T>(summaries_.scaled.rows(), d_)) {}

  /// Groups of queries: their rows of dq are set; to (n, d + d_v) and dbias (n), in the order of clusters, are set to
  /// what they add to keys and values.
  void run(Range groups, const MatrixRef<T>& to, T* dbias) {
    set_zero(to);
    std::fill_n(dbias, to.rows(), T(0));
    for (Range wave{groups.first, 0}; wave.first < groups.last; wave.first = wave.last) {
      wave.last = std::min(groups.last, wave.first + summaries_.scaled.rows());
      summaries_.look_from(given_.queries, wave, given_.product.kernel.scale);
      for (Index c = 0; c < given_.keys.clusters.count(); ++c) runner_.summarize(c, summaries_);
      set_zero(dsummaries_);
      set_zero(dbias_);
      for (Index g = wave.first; g < wave.last; ++g) {
        for (Index b = 0; b < given_.blocks.count(g); ++b) {
          add_block(given_.blocks.block(g, b, g - wave.first), to, dbias);
        }
      }
      add_summaries(to, dbias);
      for (Index g = wave.first; g < wave.last; ++g) scatter_landmark(g, g - wave.first);
    }
  }

 private:
  Index query(const QueryBlock& block, Index i) const {
    return given_.queries.groups.rows.data()[block.queries.first + i];
  }

  KeyGradients<T> of_tokens(const MatrixRef<T>& tokens, T* dbias) const {
    return {{tokens.data(), tokens.rows(), d_, tokens.outerStride()},
            {tokens.data() + d_, tokens.rows(), d_v_, tokens.outerStride()},
            dbias};
  }

  void add_block(const QueryBlock& block, const MatrixRef<T>& to, T* dbias) {
    const Product<T>& product = given_.product;
    const Index count = block.queries.last - block.queries.first;
    strip_.open(
        count, product.kernel.center, product.kernel.scale,
        [&](Index i) { return product.in.q.row_or_null(query(block, i)); },
        [&](Index i) { return row_of(given_.dout, query(block, i)); });
    for (Index i = 0; i < count; ++i) set_statistics(block, i);
    add_far(block);
    const Index near_count = given_.record.near_count[block.number];
    const Index* const near = given_.record.near + block.number * given_.record.most_near;
    for (Index i = 0; i < near_count; ++i) add_keys(given_.keys.clusters.range(near[i]), to, dbias);
    write_dq(block);
  }

  void set_statistics(const QueryBlock& block, Index i) {
    const Index row = query(block, i);
    const bool normalized = given_.product.rows == Rows::normalized;
    strip_.dot[i] = normalized ? dot_product(row_of(given_.out, row), row_of(given_.dout, row), d_v_) : T(0);
    if (normalized) {
      strip_.log_divisor[i] = std::numbers::log2e_v<T> * given_.record.lse[row].value;
      if (is_negative_infinity(strip_.log_divisor[i])) strip_.log_divisor[i] = std::numeric_limits<T>::infinity();
    } else {
      strip_.log_divisor[i] = static_cast<T>(-given_.product.origin(row, -norm_of(row)));
    }
  }

  /// bias |q|^2, relative to the center.
  T norm_of(Index row) const {
    const T* const center = given_.product.kernel.center;
    const T* const q = given_.product.in.q.row_or_null(row);
    T total = 0;
    for (Index c = 0; c < d_; ++c) {
      const T x = center == nullptr ? q[c] : q[c] - center[c];
      total += x * x;
    }
    return given_.product.kernel.bias * total;
  }

  void add_far(const QueryBlock& block) {
    const Index m = given_.keys.clusters.count(), first = block.lane * m;
    std::copy_n(summaries_.bias.data() + first, m, far_bias_);
    const Index* const near = given_.record.near + block.number * given_.record.most_near;
    for (Index i = 0; i < given_.record.near_count[block.number]; ++i) {
      far_bias_[near[i]] = -std::numeric_limits<T>::infinity();
    }
    for (Index c = 0; c < m; c += kTileKeys<T>) {
      const T* const tokens = summaries_.tokens.data() + (first + c) * summaries_.tokens.cols();
      const KeyTile<T> tile{.k = tokens,
                            .v = tokens + d_,
                            .bias = far_bias_ + c,
                            .k_stride = summaries_.tokens.cols(),
                            .v_stride = summaries_.tokens.cols(),
                            .rows = nullptr,
                            .first = first + c,
                            .count = std::min(m - c, kTileKeys<T>)};
      strip_.add(tile, given_.at_most_one, of_tokens(dsummaries_, dbias_.data()));
    }
  }

  void add_keys(Range keys, const MatrixRef<T>& to, T* dbias) {
    for (Range some{keys.first, 0}; some.first < keys.last; some.first = some.last) {
      some.last = std::min(keys.last, some.first + kTileKeys<T>);
      strip_.add(given_.keys.tile(some), given_.at_most_one, of_tokens(to, dbias));
    }
  }

  /// dq_i = scale sum_j slope k_j - 2 bias (sum_j slope) q_i.
  void write_dq(const QueryBlock& block) {
    const Product<T>& product = given_.product;
    const T scale = std::numbers::ln2_v<T> * product.kernel.scale,
            twice_bias = 2 * std::numbers::ln2_v<T> * product.kernel.bias;
    const Index count = block.queries.last - block.queries.first;
    for (Index p = 0; p < strip_.lanes(); p += kLanes<T>) {
      T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < count ? row_of(given_.dq, query(block, p + i)) : nullptr;
      }
      unpack_rows(strip_.dq + p, strip_.lanes(), d_, broadcast(scale), rows);
    }
    for (Index i = 0; i < count && twice_bias != 0; ++i) {
      T* const to = row_of(given_.dq, query(block, i));
      const T* const q = product.in.q.row_or_null(query(block, i));
      const T factor = twice_bias * strip_.slope_sum[i];
      for (Index c = 0; c < d_; ++c)
        to[c] -= factor * (q[c] - (product.kernel.center == nullptr ? T(0) : product.kernel.center[c]));
    }
  }

  /// From the gradients by summaries those by keys, values and landmarks.
  void add_summaries(const MatrixRef<T>& to, T* dbias) {
    const Index m = given_.keys.clusters.count(), count = summaries_.landmarks.count;
    const T to_natural = std::numbers::ln2_v<T>;
    const auto of = [&](Index lane, Index c) { return dsummaries_.data() + (lane * m + c) * dsummaries_.cols(); };
    landmarks_.open(
        count, nullptr, given_.product.kernel.scale,
        [&](Index lane) { return given_.queries.means.data() + (summaries_.first + lane) * d_; },
        [&](Index lane) { return of(lane, 0); });
    set_zero(dland_);
    for (Index c = 0; c < m; ++c) {
      for (Index lane = 0; lane < count; ++lane) {
        const T* const summary = summaries_.tokens.data() + (lane * m + c) * dsummaries_.cols();
        const T* const scaled = summaries_.scaled.data() + lane * d_;  // in units of log2
        const T de = dbias_.data()[lane * m + c];
        add_row(-to_natural * de, scaled, of(lane, c), d_);
        add_row(-de, summary, dland_.data() + lane * d_, d_);
        landmarks_.dot[lane] = dot_product(of(lane, c), summary, dsummaries_.cols()) - de;
        landmarks_.log_divisor[lane] = summaries_.bias.data()[lane * m + c] + dot_product(scaled, summary, d_);
      }
      landmarks_.set_dout(count, [&](Index lane) { return of(lane, c); });
      for (Range some = given_.keys.clusters.range(c), all = some; some.first < all.last; some.first = some.last) {
        some.last = std::min(all.last, some.first + kTileKeys<T>);
        KeyTile<T> tile = given_.keys.tile(some);
        tile.v = tile.k;
        landmarks_.add(tile, true, {of_tokens(to, nullptr).dk, to, dbias});
      }
    }
  }

  /// Every query of a group that is finite gets an equal share of its landmark's gradient.
  void scatter_landmark(Index g, Index lane) {
    const Range range = given_.queries.groups.range(g);
    T* const dland = dland_.data() + lane * d_;  // what e_c adds, and what products add
    for (Index x = 0; x < d_; ++x) dland[x] += landmarks_.dq[x * landmarks_.lanes() + lane];
    Index count = 0;
    const auto finite = [&](Index i) {
      return is_finite(squared_norm(given_.product.in.q.row_or_null(given_.queries.groups.rows.data()[i]), d_));
    };
    for (Index i = range.first; i < range.last; ++i) count += finite(i) ? 1 : 0;
    const T share = std::numbers::ln2_v<T> * given_.product.kernel.scale / static_cast<T>(std::max<Index>(count, 1));
    for (Index i = range.first; i < range.last; ++i) {
      if (finite(i)) add_row(share, dland, row_of(given_.dq, given_.queries.groups.rows.data()[i]), d_);
    }
  }

  const FieldGradients<T>& given_;
  Index d_, d_v_;
  Summaries<T> summaries_;
  MatrixRef<T> dsummaries_, dbias_;  ///< gradients by the summaries' tokens and bias
  T* far_bias_;
  ClusterRunner<T> runner_;
  GradientStrip<T> strip_, landmarks_;
  MatrixRef<T> dland_;
};

/// gradients of a product by fields, as saved has them.
template <class T, class State>
void multipole_backward(const Product<T>& product, const State& saved, const ConstMatrixRef<T>& out,
                        const ConstMatrixRef<T>& dout, const Gradients<T>& gradients, Context& context) {
  constexpr Index kMostParts = 4;  // whose sums are added up in order, whatever the workers
  Scratch scratch = context.scratch();
  const ClusteredRows clusters = copy_of(saved.keys, saved.key_starts, scratch),
                      groups = copy_of(saved.queries, saved.query_starts, scratch);
  const auto keys = KeyClusters<T>::make(product.in, product.kernel, clusters, context, scratch);
  const auto queries = QueryGroups<T>::make(product.in, product.kernel, groups, context, scratch);
  const QueryBlocks blocks(groups, kTileWidth<T>, scratch);
  const bool at_most_one = product.rows == Rows::normalized;
  const FieldGradients<T> given{product,
                                keys,
                                queries,
                                blocks,
                                {saved.near.data(), saved.near_count.data(), saved.most_near, saved.lse.data()},
                                out,
                                dout,
                                gradients.dq,
                                at_most_one};
  for (const MatrixRef<T>* gradient : {&gradients.dq, &gradients.dk, &gradients.dv}) set_zero(*gradient);
  const Index parts = std::min(kMostParts, groups.count()), n = keys.tokens.rows(), width = keys.tokens.cols();
  const MatrixRef<T> tokens = scratch.matrix<T>(parts * n, width), dbias = scratch.matrix<T>(parts, n);
  FieldBackward<T>* const runners = scratch.make<FieldBackward<T>>(parts, given, scratch);
  context.for_each(parts, [&](Index part, int) {
    runners[part].run(nth_part(groups.count(), parts, part), rows_of(tokens, {part * n, (part + 1) * n}),
                      dbias.data() + part * n);
  });
  const T twice_bias = 2 * std::numbers::ln2_v<T> * product.kernel.bias;
  context.for_each(clusters.count(), [&](Index c, int) {
    for (Index j = clusters.range(c).first; j < clusters.range(c).last; ++j) {
      T* const dk = row_of(gradients.dk, clusters.rows.data()[j]);
      T* const dv = row_of(gradients.dv, clusters.rows.data()[j]);
      T slopes = 0;
      for (Index part = 0; part < parts; ++part) {
        const T* const row = tokens.data() + (part * n + j) * width;
        add_row(T(1), row, dk, keys.d);
        add_row(T(1), row + keys.d, dv, keys.d_v());
        slopes += dbias.data()[part * n + j];
      }
      add_row(-twice_bias * slopes, keys.tokens.data() + j * width, dk, keys.d);
    }
  });
}

}  // namespace attn::detail
