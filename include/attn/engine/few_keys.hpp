/// Many queries meet few keys, all of them at once: what a landmark method's wide factor is.
///
///   for each strip of queries:                             keys lie along the lanes, packed once for all strips
///     score[i]  = scale q_i.k + bias                       register tiles, beta c + diag(factor) a b
///     weight[i] = 2^(score[i] - their maximum)
///     out[i]    = factor_i sum_j weight[i][j] v_j          register tiles
///
/// Neither q nor out is transposed as strip.hpp would, which at 64 keys takes a tenth of the time.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/far_pairs.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <limits>
#include <span>

namespace attn::detail {

/// All keys and values of a product, which several workers read.
template <class T>
struct FewKeys {
  Panels<T> keys, values;
  const T* bias;  ///< of each lane of keys.packets, in units of log2, -infinity beyond the last key; null if all are 0
  KeyTile<T> tile;
  const FarKeys<T>* far = nullptr;  ///< the same keys, if any is far from the center

  /// Below four queries a key, packing costs more than it saves.
  static bool suits(const Product<T>& product) {
    const Index n_q = product.in.q.rows(), n_k = product.in.k.rows();
    return product.in.mask.causal == Causal::none && n_k <= kTileKeys<T> && n_k <= n_q / 4 &&
           product.partition.splits == 1 && !product.in.mask.own_products;
  }

  static FewKeys pack(const Product<T>& product, Scratch& scratch) {
    const KeyReader<T> reader(product.in, product.kernel, scratch);
    const KeyTile<T> tile = reader.read(0, product.in.k.rows());
    const ConstMatrixRef<T> k(tile.k, tile.count, product.in.k.cols(), tile.k_stride),
        v(tile.v, tile.count, product.in.v.cols(), tile.v_stride);
    const auto keys = Panels<T>::pack(transposed(k), scratch);
    const auto values = Panels<T>::pack(v, scratch);
    const Index lanes = keys.packets * kLanes<T>;
    FewKeys few{keys, values, nullptr, tile};
    if (tile.bias == nullptr && lanes == tile.count) return few;
    T* const bias = scratch.elements<T>(lanes);
    for (Index j = 0; j < tile.count; ++j) bias[j] = tile.bias != nullptr ? tile.bias[j] : T(0);
    std::fill_n(bias + tile.count, lanes - tile.count, -std::numeric_limits<T>::infinity());
    few.bias = bias;
    if (const FarPairs<T>* const pairs = product.far_pairs(scratch)) few.far = pairs->keys(tile, lanes, scratch);
    return few;
  }
};

/// Computes rows of a product with few keys. One for each worker; all its memory comes from the scratch that it is made
/// with.
template <class T>
class FewKeysRunner {
 public:
  FewKeysRunner(const Product<T>& product, const FewKeys<T>& few, Scratch& scratch)
      : product_(product),
        few_(few),
        width_(few.keys.packets * kLanes<T>),
        scores_(scratch.elements<T>(kTileWidth<T> * width_)),
        queries_(scratch.elements<T>(kTileWidth<T> * product.in.q.cols())),
        results_(scratch.elements<T>(kTileWidth<T> * product.in.v.cols())),
        norm_(scratch.elements<T>(4 * kTileWidth<T>)),
        rows_{norm_ + kTileWidth<T>, norm_ + 2 * kTileWidth<T>, norm_ + 3 * kTileWidth<T>},
        tokens_(scratch.elements<T>(2 * product.in.q.cols())) {
    std::fill_n(scores_, kTileWidth<T> * width_, T(0));
  }

  /// out (n_q, d_v) <- the finished rows of a block, and their log-sums.
  void finish_block(Index block, const ResultRows<T>& out, const LogSums<T>& logs) {
    const Range strips = product_.partition.strips_of_block(block);
    for (Index s = strips.first; s < strips.last; ++s) finish_rows(rows_of_strip(s), out, logs);
  }

 private:
  Range rows_of_strip(Index s) const {
    const Range packets = product_.partition.packets_of_strip(s);
    return {packets.first * kLanes<T>, std::min(packets.last * kLanes<T>, product_.in.q.rows())};
  }

  void finish_rows(Range rows, const ResultRows<T>& out, const LogSums<T>& logs) {
    const Index count = rows.last - rows.first, d_v = out.cols();
    const Prefetch next_queries = Prefetch::of(product_.in.q.memory(), {rows.last, rows.last + count}),
                   results = Prefetch::of(out.memory(), rows);
    few_.keys.multiply({&product_.kernel.scale, 0}, read_queries(rows), 0, {scores_, count, width_, width_},
                       next_queries);
    weigh(rows);
    RowScales<T> scales;
    product_.set_scales(rows.first, rows_, norm_, kTileWidth<T>, &scales);
    const MatrixRef<T> to = out.in_place() ? rows_of(out.matrix(), rows) : MatrixRef<T>(results_, count, d_v, d_v);
    few_.values.multiply({scales.first, 1}, {scores_, count, few_.values.depth, width_, 1}, 0, to, results);
    for (Index i = 0; i < count; ++i) {
      const bool keeps = keeps_query(product_.in, rows.first + i);
      T* row = row_of(to, i);
      if (scales.twice) scale_row(scales.second[i], row, row, d_v);
      if (!keeps) std::fill_n(row, d_v, T(0));
      out.finish_row(rows.first + i, row);
    }
    product_.write_log_sums(logs, rows.first, rows_, norm_, count);
  }

  /// The queries, relative to the center; sets their norms.
  Operand<T> read_queries(Range rows) {
    const TokenRows<T>& q = product_.in.q;
    const Index d = q.cols(), count = rows.last - rows.first;
    Operand<T> queries(queries_, count, d, d, 1);
    if (q.in_place() && product_.kernel.center == nullptr) {
      queries = {q.data() + rows.first * q.outerStride(), count, d, q.outerStride(), 1};
    } else {
      copy_queries(rows.first, count);
    }
    std::fill_n(norm_, kTileWidth<T>, T(0));
    for (Index i = 0; i < count && product_.kernel.bias != 0; ++i) {
      norm_[i] = product_.kernel.bias * squared_norm(queries.data + i * queries.row_step, d);
    }
    return queries;
  }

  void copy_queries(Index first, Index count) {
    const Index d = product_.in.q.cols();
    for (Index i = 0; i < count; ++i) {
      T* to = queries_ + i * d;
      product_.in.q.copy_row(first + i, to);
      if (product_.kernel.center != nullptr) add_row(T(-1), product_.kernel.center, to, d);
    }
  }

  /// Turns scores into weights relative to a maximum of each row, and sums them.
  void weigh(Range rows) {
    if (few_.bias != nullptr) add_bias();
    std::fill_n(rows_.base, kTileWidth<T>, T(0));
    for (Index i = 0; i < rows.last - rows.first && few_.far != nullptr; ++i) {
      if (norm_[i] > kFarNorm<T>) refine_row(rows.first + i, scores_ + i * width_, norm_[i], &rows_.base[i]);
    }
    for (Index i = 0; i < kTileWidth<T>; ++i) {
      rows_.maximum[i] = product_.maximum == Maximum::none ? kappa_unit(i) : row_maximum(scores_ + i * width_, width_);
    }
    const T limit = highest_exponent<T>(product_.maximum);
    for (Index i = 0; i < kTileWidth<T>; ++i) {
      rows_.sum[i] = sum(
          weigh_packets(scores_ + i * width_, few_.keys.packets, Index{kLanes<T>}, broadcast(rows_.maximum[i]), limit));
    }
  }

  void add_bias() {
    for (Index i = 0; i < kTileWidth<T>; ++i) add_row(T(1), few_.bias, scores_ + i * width_, width_);
  }

  /// What makes the weights kappa itself; where that is NaN, all scores are, too.
  T kappa_unit(Index i) const { return is_nan(norm_[i]) ? T(0) : norm_[i] - rows_.base[i]; }

  /// The scores of a query far from the center, mended as in far_pairs.hpp: where it has a near key, they become
  /// relative to a base.
  [[gnu::noinline]] void refine_row(Index query, T* scores, T norm, T* base) const {
    const T top = product_.maximum == Maximum::running ? row_maximum(scores, width_) : norm,
            floor = floor_of(top, norm, product_.maximum);
    if (!few_.far->any_near(scores, needed_score(norm, norm), floor)) return;
    *base = norm;
    add_to_row(-norm, scores, width_);
    few_.far->mend(scores, needed_score(norm, T(0)), floor - norm, product_.in.q.row(query, tokens_),
                   tokens_ + product_.in.q.cols());
  }

  const Product<T>& product_;
  const FewKeys<T>& few_;
  Index width_;  ///< elements between two rows of scores
  T *scores_, *queries_, *results_;
  T* norm_;  ///< bias |q|^2 of each query
  RowStatistics<T> rows_;
  T* tokens_;  ///< a query and a key, where they are not in place
};

/// to <- x, relative to origin unless that is null; returns bias times the squared norms of its rows.
template <class T>
std::span<T> copy_centered(const ConstMatrixRef<T>& x, const T* origin, T bias, MatrixRef<T> to, Scratch& scratch) {
  const std::span<T> norms = scratch.array<T>(x.rows());
  for (Index i = 0; i < x.rows(); ++i) {
    const T* from = row_of(x, i);
    T* row = row_of(to, i);
    for (Index c = 0; c < x.cols(); ++c) row[c] = from[c] - (origin != nullptr ? origin[c] : T(0));
    norms[static_cast<std::size_t>(i)] = bias * squared_norm(row, x.cols());
  }
  return norms;
}

/// out (n, m), which is log2 kappa(x_i, y_j) for a Gaussian: near pairs <- those by their difference.
template <class T>
void mend_rows(T bias, const ConstMatrixRef<T>& x, std::span<const T> norms_x, const ConstMatrixRef<T>& y,
               std::span<const T> norms_y, const MatrixRef<T>& out, Scratch& scratch) {
  constexpr T kAll = std::numeric_limits<T>::lowest();
  const Index m = y.rows(), lanes = (m + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const auto far = [](T norm) { return norm > kFarNorm<T>; };
  if (!std::any_of(norms_x.begin(), norms_x.end(), far) || !std::any_of(norms_y.begin(), norms_y.end(), far)) return;
  const GaussianFarKeys<T> keys(
      y, m, lanes, [](Index j) { return j; }, [&](Index j) { return norms_y[static_cast<std::size_t>(j)]; },
      [](Index) { return T(0); }, bias, scratch);
  T *const row = scratch.elements<T>(lanes), *const buffer = scratch.elements<T>(y.cols());
  std::fill_n(row, lanes, T(0));
  for (Index i = 0; i < out.rows(); ++i) {
    const T n_x = norms_x[static_cast<std::size_t>(i)];
    if (!far(n_x)) continue;
    std::copy_n(row_of(out, i), m, row);
    keys.mend(row, needed_score(n_x, T(0)), kAll, row_of(x, i), buffer);
    std::copy_n(row, m, row_of(out, i));
  }
}

/// out (n, m) <- scale x_i.y_j - bias (|x_i|^2 + |y_j|^2), at most 0 where kappa is at most 1. For a Gaussian that is
/// -bias |x_i - y_j|^2, and computed from a center amid y, or from that difference, see far_pairs.hpp.
template <class T>
void biased_scores(const ScoreParameters& parameters, const ConstMatrixRef<T>& x, const ConstMatrixRef<T>& y,
                   MatrixRef<T> out, Context& context) {
  const T bias = LogKernel<T>::of(parameters).bias,
          largest = parameters.bounded() ? T(0) : std::numeric_limits<T>::infinity();
  Scratch scratch = context.scratch();
  MatrixRef<T> from = scratch.matrix<T>(x.rows(), x.cols()), to = scratch.matrix<T>(y.rows(), y.cols());
  const T* origin = parameters.gaussian() ? choose_center(Sources<T>{x, y, y}, scratch) : nullptr;
  const auto norms_from = copy_centered(x, origin, bias, from, scratch),
             norms_to = copy_centered(y, origin, bias, to, scratch);
  gemm<T>(LogKernel<T>::of(parameters).scale, from, transposed(to), 0, out, context);
  for (Index i = 0; i < out.rows(); ++i) {
    const T n_x = norms_from[static_cast<std::size_t>(i)];
    for (Index j = 0; j < out.cols(); ++j) row_of(out, i)[j] -= n_x + norms_to[static_cast<std::size_t>(j)];
  }
  if (origin != nullptr) mend_rows<T>(bias, x, norms_from, y, norms_to, out, scratch);
  for (Index i = 0; i < out.rows(); ++i) {
    for (Index j = 0; j < out.cols(); ++j) row_of(out, i)[j] = std::min(row_of(out, i)[j], largest);
  }
}

/// out (n, m) <- kappa(x_i, y_j) for x (n, d) and y (m, d), rows divided by their sums if the kernel's are normalized.
/// Where kappa is at most 1, rounding does not lift it above that.
template <ScoreKernel Kernel, class T>
void kernel_matrix(const Kernel& kernel, const ConstMatrixRef<T>& x, const ConstMatrixRef<T>& y, MatrixRef<T> out,
                   Context& context) {
  const ScoreParameters parameters = score_parameters(kernel, x.cols());
  if constexpr (kMayHaveBias<Kernel>) {
    biased_scores<T>(parameters, x, y, out, context);
  } else {
    gemm<T>(LogKernel<T>::of(parameters).scale, x, transposed(y), 0, out, context);
  }
  for (Index i = 0; i < out.rows(); ++i) weigh_row(row_of(out, i), out.cols(), parameters.rows);
}

}  // namespace attn::detail
