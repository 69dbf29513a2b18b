/// Gradients of multipole attention: of the products of near and far fields, and through the summaries.
///
///   far and near fields, as any product:   slope = weight (dout.v - dot),  dv += weight dout,  dk += slope s q, ...
///   a summary, with g_k, g_v, g_e the gradients by k_c, v_c and e_c:
///     g_k      <- g_k - g_e s l                                    for e_c holds s l.k_c
///     slope_j   = r_j (g_k.k_j + g_v.v_j - (g_k.k_c + g_v.v_c) + g_e)
///     dk_j     += r_j g_k + slope_j s l       dv_j += r_j g_v      dl += sum_j slope_j s k_j - g_e s k_c
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

/// Where gradients by keys, by values and by biases of keys are added.
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
      to.dbias[tile.row(j)] += sum(over_queries);
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
  FieldSizes sizes;
  FieldRecord<T, const Index> record;
  ConstMatrixRef<T> out, dout;
  MatrixRef<T> dq;
  bool at_most_one;
};

/// Summaries and the gradients by them.
template <class T>
struct SummaryGradients {
  Summaries<T> of, by;
  T* far_bias;  ///< e_c, or -infinity for those that are not far

  SummaryGradients(Index count, Index width, Scratch& scratch)
      : of(Summaries<T>::make(count, width, scratch)),
        by(Summaries<T>::make(count, width, scratch)),
        far_bias(scratch.elements<T>(count)) {}

  Index count() const { return of.tokens.rows(); }

  void clear() const {
    set_zero(by.tokens);
    std::fill_n(by.bias, count(), T(0));
  }

  /// Some of them as keys and values, with far_bias for a bias.
  KeyTile<T> far_tile(Range some, Index value_offset) const {
    KeyTile<T> tile = of.tile(some, value_offset);
    tile.bias = far_bias + some.first;
    return tile;
  }
};

/// Adds up the gradients of some regions of queries. One for each part of them.
template <class T>
class FieldBackward {
 public:
  FieldBackward(const FieldGradients<T>& given, Scratch& scratch)
      : given_(given),
        d_(given.keys.d),
        d_v_(given.keys.d_v),
        value_offset_(given.keys.value_offset()),
        width_(given.keys.tokens.cols()),
        branches_(given.sizes.open == given.keys.tree.sets() ? 0 : given.keys.tree.sets(), width_, scratch),
        clusters_(given.sizes.open * given.keys.tree.parts_in_a_set, width_, scratch),
        summarizer_(given.keys, scratch),
        strip_(d_, d_v_, scratch),
        near_(given.keys, scratch),
        dland_(scratch.elements<T>(value_offset_)),
        row_(scratch.elements<T>(value_offset_)) {}

  /// Rows of dq of the regions' queries are set; to (n, padded d + padded d_v) and dbias (n), in the order of clusters,
  /// are set to what they add to keys and values.
  void run(Range regions, const MatrixRef<T>& to, T* dbias) {
    const KeyGradients<T> gradients = of_tokens(to, dbias);
    set_zero(to);
    std::fill_n(dbias, to.rows(), T(0));
    const NestedRows& groups = given_.queries.tree;
    for (Index region = regions.first; region < regions.last; ++region) {
      const T* const landmark = row_of(given_.queries.region_means, region);
      for (Index b = 0; b < branches_.count(); ++b) summarizer_.summarize_branch({landmark, branches_.of, b}, b);
      branches_.clear();
      const Range some = groups.parts_of(region);
      for (Index group = some.first; group < some.last; ++group) add_group(group, gradients);
      if (branches_.count() == 0) continue;
      begin_landmark();
      for (Index b = 0; b < branches_.count(); ++b) {
        summarizer_.summarize_branch({landmark, branches_.of, b}, b);
        add_summary(landmark, given_.keys.tree.range(b), summarizer_.shares(0), branches_, b, gradients);
      }
      scatter_landmark(groups.range(region));
    }
  }

 private:
  Index query(const QueryBlock& block, Index i) const {
    return given_.queries.tree.parts.rows.data()[block.queries.first + i];
  }

  std::span<const Index> open_to(Index group) const {
    return numbers(given_.record.open + group * given_.sizes.open, given_.sizes.open);
  }

  KeyGradients<T> of_tokens(const MatrixRef<T>& tokens, T* dbias) const {
    return {{tokens.data(), tokens.rows(), d_, tokens.outerStride()},
            {tokens.data() + value_offset_, tokens.rows(), d_v_, tokens.outerStride()},
            dbias};
  }

  void add_group(Index group, const KeyGradients<T>& to) {
    const T* const landmark = row_of(given_.queries.means, group);
    const std::span<const Index> open = open_to(group);
    summarizer_.summarize_clusters({landmark, clusters_.of, 0}, open);
    clusters_.clear();
    for (Index b = 0; b < given_.blocks.count(group); ++b) add_block(given_.blocks.block(group, b), open, to);
    begin_landmark();
    Index i = 0;
    for (const Index b : open) {
      summarizer_.summarize_clusters({landmark, clusters_.of, i}, {&b, 1});
      const Range clusters = given_.keys.tree.parts_of(b);
      for (Index c = clusters.first; c < clusters.last; ++c, ++i) {
        add_summary(landmark, given_.keys.tree.parts.range(c), summarizer_.shares(c - clusters.first), clusters_, i,
                    to);
      }
    }
    scatter_landmark(given_.queries.tree.parts.range(group));
  }

  void add_block(const QueryBlock& block, std::span<const Index> open, const KeyGradients<T>& to) {
    const Product<T>& product = given_.product;
    const Index count = block.queries.last - block.queries.first;
    strip_.open(
        count, product.kernel.center, product.kernel.scale,
        [&](Index i) { return product.in.q.row_or_null(query(block, i)); },
        [&](Index i) { return row_of(given_.dout, query(block, i)); });
    for (Index i = 0; i < count; ++i) set_statistics(block, i);
    hide_near(block, open);
    add_far(branches_);
    add_far(clusters_);
    add_near(block, to);
    write_dq(block);
  }

  std::span<const Index> near_to(const QueryBlock& block) const {
    return numbers(given_.record.near + block.number * given_.record.most_near, given_.record.near_count[block.number]);
  }

  /// far_bias of branches that are not open and of clusters that are not near is theirs. near and open are ascending.
  void hide_near(const QueryBlock& block, std::span<const Index> open) const {
    constexpr T kHidden = -std::numeric_limits<T>::infinity();
    std::copy_n(branches_.of.bias, branches_.count(), branches_.far_bias);
    std::copy_n(clusters_.of.bias, clusters_.count(), clusters_.far_bias);
    for (const Index b : open) {
      if (branches_.count() > 0) branches_.far_bias[b] = kHidden;
    }
    const Index in_a_branch = given_.keys.tree.parts_in_a_set;
    for (const Index c : near_to(block)) {
      const auto branch = std::lower_bound(open.begin(), open.end(), c / in_a_branch) - open.begin();
      clusters_.far_bias[branch * in_a_branch + c % in_a_branch] = kHidden;
    }
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

  void add_far(const SummaryGradients<T>& summaries) {
    for (Range some{0, 0}; some.first < summaries.count(); some.first = some.last) {
      some.last = std::min(summaries.count(), some.first + kTileKeys<T>);
      strip_.add(summaries.far_tile(some, value_offset_), given_.at_most_one,
                 of_tokens(summaries.by.tokens, summaries.by.bias));
    }
  }

  void add_near(const QueryBlock& block, const KeyGradients<T>& to) {
    near_.for_each_tile(near_to(block), [&](const KeyTile<T>& tile) { strip_.add(tile, given_.at_most_one, to); });
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

  void begin_landmark() { std::fill_n(dland_, value_offset_, T(0)); }

  /// From the gradients by the i-th of some summaries, of a cluster whose shares are r_j, those by its keys and values;
  /// dland_ <- dland_ + the gradient by s l. landmark: s l, in units of log2.
  void add_summary(const T* landmark, Range cluster, const T* shares, const SummaryGradients<T>& summaries, Index i,
                   const KeyGradients<T>& to) {
    const Index stride = to.dk.outerStride();
    const T* const token = row_of(summaries.of.tokens, i);
    T* const gradient = row_of(summaries.by.tokens, i);
    const T de = summaries.by.bias[i], to_natural = std::numbers::ln2_v<T>;
    add_row(-to_natural * de, landmark, gradient, value_offset_);
    add_row(-de, token, dland_, value_offset_);
    const T dot = dot_product(gradient, token, width_) - de;
    for (Index first = cluster.first; first < cluster.last; first += kLanes<T>) {
      const Index count = std::min<Index>(kLanes<T>, cluster.last - first);
      const T* const share = shares + first - cluster.first;
      alignas(64) T slopes[array_size(kLanes<T>)];
      store(slopes, load_unaligned(share) *
                        (row_products(given_.keys.row(first), width_, count, gradient, width_) - broadcast(dot)));
      sum_scaled_rows<1>({slopes}, count, given_.keys.row(first), width_, value_offset_, {row_});
      add_row(T(1), row_, dland_, value_offset_);
      for (Index j = 0; j < count; ++j) {
        T* const dtoken = to.dk.data() + (first + j) * stride;
        add_row(share[j], gradient, dtoken, width_);
        add_row(to_natural * slopes[j], landmark, dtoken, value_offset_);
        to.dbias[first + j] += slopes[j];
      }
    }
  }

  /// Every query of some that is finite gets an equal share of their landmark's gradient.
  void scatter_landmark(Range queries) {
    const Index* const rows = given_.queries.tree.parts.rows.data();
    const auto finite = [&](Index i) { return is_finite(squared_norm(given_.product.in.q.row_or_null(rows[i]), d_)); };
    Index count = 0;
    for (Index i = queries.first; i < queries.last; ++i) count += finite(i) ? 1 : 0;
    const T share = std::numbers::ln2_v<T> * given_.product.kernel.scale / static_cast<T>(std::max<Index>(count, 1));
    for (Index i = queries.first; i < queries.last; ++i) {
      if (finite(i)) add_row(share, dland_, row_of(given_.dq, rows[i]), d_);
    }
  }

  const FieldGradients<T>& given_;
  Index d_, d_v_, value_offset_, width_;
  SummaryGradients<T> branches_, clusters_;
  Summarizer<T> summarizer_;
  GradientStrip<T> strip_;
  NearKeys<T> near_;
  T *dland_, *row_;  ///< the gradient by s l, and room for a row
};

/// dk and dv <- dk and dv + what parts of the queries add to them, part after part in tokens and dbias, in the order of
/// clusters; a key's norm is in its bias: dk_j -= 2 bias dbias_j k_j.
template <class T>
void add_parts(const KeyClusters<T>& keys, const MatrixRef<T>& tokens, const MatrixRef<T>& dbias, T bias,
               const Gradients<T>& gradients, Context& context) {
  const T twice_bias = 2 * std::numbers::ln2_v<T> * bias;
  const NestedRows& tree = keys.tree;
  context.for_each(tree.sets(), [&](Index b, int) {
    for (Index j = tree.range(b).first; j < tree.range(b).last; ++j) {
      T* const dk = row_of(gradients.dk, tree.parts.rows.data()[j]);
      T* const dv = row_of(gradients.dv, tree.parts.rows.data()[j]);
      T slopes = 0;
      for (Index part = 0; part < dbias.rows(); ++part) {
        const T* const row = row_of(tokens, part * keys.tokens.rows() + j);
        add_row(T(1), row, dk, keys.d);
        add_row(T(1), row + keys.value_offset(), dv, keys.d_v);
        slopes += row_of(dbias, part)[j];
      }
      add_row(-twice_bias * slopes, keys.row(j), dk, keys.d);
    }
  });
}

/// gradients of a product by fields, as saved has them.
template <class T, class State>
void multipole_backward(const Product<T>& product, const State& saved, const ConstMatrixRef<T>& out,
                        const ConstMatrixRef<T>& dout, const Gradients<T>& gradients, Context& context) {
  constexpr Index kMostParts = 4;  // whose sums are added up in order, whatever the workers
  Scratch scratch = context.scratch();
  const NestedRows clusters{copy_of(saved.keys, saved.key_starts, scratch), saved.clusters_in_a_branch},
      groups{copy_of(saved.queries, saved.query_starts, scratch), saved.groups_in_a_region};
  const FieldSizes sizes{saved.most_open, saved.most_near};
  const auto keys =
      KeyClusters<T>::make(product.in, product.kernel, clusters, sizes.open == clusters.sets(), context, scratch);
  const auto queries = QueryGroups<T>::make(product.in, product.kernel, groups, context, scratch);
  const QueryBlocks blocks(groups.parts, kTileWidth<T>, scratch);
  const bool at_most_one = product.rows == Rows::normalized;
  const FieldGradients<T> given{
      product,      keys,
      queries,      blocks,
      sizes,        {saved.open.data(), saved.near.data(), saved.near_count.data(), saved.most_near, saved.lse.data()},
      out,          dout,
      gradients.dq, at_most_one};
  for (const MatrixRef<T>* gradient : {&gradients.dq, &gradients.dk, &gradients.dv}) set_zero(*gradient);
  const Index parts = std::min(kMostParts, groups.sets()), n = keys.tokens.rows(), width = keys.tokens.cols();
  const MatrixRef<T> tokens = scratch.matrix<T>(parts * n, width), dbias = scratch.matrix<T>(parts, n);
  FieldBackward<T>* const runners = scratch.make<FieldBackward<T>>(parts, given, scratch);
  context.for_each(parts, [&](Index part, int) {
    runners[part].run(nth_part(groups.sets(), parts, part), rows_of(tokens, {part * n, (part + 1) * n}),
                      dbias.data() + part * n);
  });
  add_parts<T>(keys, tokens, dbias, product.kernel.bias, gradients, context);
}

}  // namespace attn::detail
