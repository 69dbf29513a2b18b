/// Multipole attention under a causal mask: a query sees recent keys as they are, and before them nodes of the past,
/// which are built from their own tokens alone, by a landmark that its own features choose.
///
///   each query i:                       state_i <- recent keys
///   for nodes of 1, 2, 4, ... chunks:
///     for each landmark of each node:
///       for the queries nearest to it:  state_i <- state_i + summaries of far clusters + keys of near clusters
///   out_i = weighted_i / sum_i
#pragma once

#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/detail/causal_fields.hpp>
#include <attn/detail/causal_layout.hpp>
#include <attn/detail/causal_level.hpp>
#include <attn/detail/causal_nodes.hpp>
#include <attn/detail/field_tokens.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <limits>
#include <memory>
#include <numbers>
#include <span>

namespace attn::detail {

/// What tokens of a causal product are measured from, d numbers: of each feature the median of the first kept key, the
/// first kept query and 0. No row sees more of the tokens than these, and one of them may be far from all others.
template <class T>
const T* early_center(const Sources<T>& in, Scratch& scratch) {
  const Index d = in.k.cols();
  T *const center = scratch.elements<T>(2 * d), *const query = center + d;
  std::fill_n(center, 2 * d, T(0));
  const auto copy_first = [](const TokenRows<T>& x, const auto& keeps, T* to) {
    for (Index i = 0; i < x.rows(); ++i) {
      if (keeps(i)) return x.copy_row(i, to);
    }
  };
  copy_first(in.k, kept_keys(in), center);
  copy_first(in.q, kept_queries(in), query);
  for (Index c = 0; c < d; ++c) {
    const T x = is_finite(center[c]) ? center[c] : T(0), y = is_finite(query[c]) ? query[c] : T(0);
    center[c] = with_few_digits(std::max(std::min(x, y), std::min(std::max(x, y), T(0))));
  }
  return center;
}

/// Queries of a causal product, but for nodes: what they see as it is, and their results.
template <class T>
class CausalAttention {
 public:
  CausalAttention(const Product<T>& product, const CausalTokens& tokens, Context& context, Scratch& scratch)
      : product_(product),
        context_(context),
        tokens_(tokens),
        rows_(CausalRows<T>::make(product.in.q.rows(), product.in.v.cols(), scratch)) {}

  /// Whether any query has a complete chunk before it.
  bool has_nodes() const { return tokens_.most_chunks() > 0; }

 protected:
  void add_recent() const {
    constexpr Index kRows = RecentRunner<T>::kRows;
    Scratch scratch = context_.scratch();
    const Index chunks = tokens_.most_chunks();
    const Index* const queries = tokens_.queries.data();
    const std::span<RecentBlock> blocks = scratch.array<RecentBlock>(product_.in.q.rows() / kRows + chunks + 1);
    Index count = 0;
    for (Index m = chunks == 0 ? 0 : tokens_.chunks(0); m <= chunks; ++m) {
      const Range some = tokens_.with_chunks({m, m + 1});
      if (some.first == some.last) continue;
      const Index last = queries[some.last - 1] + 1;
      for (Index row = queries[some.first], i = some.first; row < last; row += kRows) {
        const Index end = std::min(last, row + kRows);
        while (i < some.last && queries[i] < end) ++i;
        blocks.data()[count++] = {{row, end}, {m * kChunkKeys, tokens_.seen.data()[i - 1]}};
      }
    }
    auto* const runners = scratch.make<RecentRunner<T>>(context_.workers(), product_, scratch);
    context_.for_each(count, [&](Index b, int worker) { runners[worker].attend(tokens_, blocks.data()[b], rows_); });
  }

  /// out <- all rows; lse: their log-sums, or null.
  void finish(const ResultRows<T>& out, RowLog<T>* lse) const {
    constexpr Index kRows = 64;
    Scratch scratch = context_.scratch();
    const Index n = out.rows();
    T* const buffers = scratch.elements<T>(context_.workers() * (product_.in.q.cols() + out.cols()));
    context_.for_each((n + kRows - 1) / kRows, [&](Index block, int worker) {
      T* const buffer = buffers + worker * (product_.in.q.cols() + out.cols());
      for (Index i = block * kRows; i < std::min(n, (block + 1) * kRows); ++i) finish_row(i, out, lse, buffer);
    });
  }

  const Product<T>& product_;
  Context& context_;
  CausalTokens tokens_;
  CausalRows<T> rows_;

 private:
  /// A row without keys, or of a dropped query, whose sum is 0, becomes 0.
  void finish_row(Index i, const ResultRows<T>& out, RowLog<T>* lse, T* buffer) const {
    const T sum = rows_.sum[i], maximum = rows_.maximum[i];
    if (lse != nullptr) lse[i] = {row_log_sum(maximum, sum), T(0)};
    double of_kernel = 0;
    if (product_.rows == Rows::raw && sum != 0) {
      of_kernel = product_.kernel_maximum(maximum, static_cast<double>(-norm(i, buffer))) + product_.origin(i, T(0));
    }
    const RowScale<T> scale = row_scale(product_.rows, of_kernel, sum);
    T* const to = out.row(i, buffer + product_.in.q.cols());
    if (sum == 0) {
      std::fill_n(to, out.cols(), T(0));
    } else {
      scale_row(scale.first, row_of(rows_.weighted, i), to, out.cols());
    }
    if (scale.second != 1) scale_row(scale.second, to, to, out.cols());
    out.finish_row(i, to);
  }

  /// bias |q - center|^2.
  T norm(Index row, T* buffer) const {
    const LogKernel<T>& kernel = product_.kernel;
    if (kernel.bias == 0) return 0;
    const Index d = product_.in.q.cols();
    product_.in.q.copy_row(row, buffer);
    if (kernel.center != nullptr) add_row(T(-1), kernel.center, buffer, d);
    return kernel.bias * squared_norm(buffer, d);
  }
};

/// Clusters of so many neighbouring ones each.
inline ClusteredRows merged(const ClusteredRows& finest, Index together, Scratch& scratch) {
  const ClusteredRows made{finest.rows, scratch.array<Index>(finest.count() / together + 1)};
  for (Index c = 0; c <= made.count(); ++c) made.starts.data()[c] = finest.starts.data()[c * together];
  return made;
}

/// All queries of a causal product. counts(size): NodeCounts of nodes of so many chunks, of which clusters of larger
/// nodes are so many of smaller ones together, and branches are whole numbers of them.
template <class T, class Counts>
class CausalMultipole : public CausalAttention<T> {
  using Base = CausalAttention<T>;
  using Base::context_;
  using Base::product_;
  using Base::rows_;
  using Base::tokens_;

 public:
  CausalMultipole(const Product<T>& product, const Counts& counts, Context& context, Scratch& scratch)
      : Base(product, CausalTokens::make(product.in, product.limits, scratch), context, scratch), counts_(counts) {}

  /// out <- all rows; lse: their log-sums, or null.
  void attend(const ResultRows<T>& out, RowLog<T>* lse) {
    this->add_recent();
    if (this->has_nodes()) add_nodes();
    this->finish(out, lse);
  }

 private:
  void add_nodes() const {
    Scratch scratch = context_.scratch();
    const Index chunks = tokens_.most_chunks();
    const NodeCounts finest = counts_(1);
    LogKernel<T> kernel = product_.kernel;
    kernel.bias_origins.common = bias_origin();
    const auto shift = [&](Index row) {
      if (kernel.bias_origins.of_queries == nullptr) return T(0);
      return std::numbers::log2e_v<T> * (kernel.bias_origins.common - kernel.bias_origins.of(row));
    };
    const ClusteredRows cut =
        cut_chunks(product_.in, tokens_, {0, chunks}, finest.clusters, finest.clusters_in_a_branch, context_, scratch);
    const auto keys =
        KeyClusters<T>::make_tokens(product_.in, kernel, {cut, finest.clusters_in_a_branch}, context_, scratch);
    for (Index size = 1; size <= chunks;) {
      Scratch of_clusters = context_.scratch();
      const NodeCounts counts = counts_(size);
      const NestedRows tree{merged(cut, finest.clusters / counts.clusters, of_clusters), counts.clusters_in_a_branch};
      const KeyClusters<T> in_clusters = keys.in_clusters(tree, false, context_, of_clusters);
      for (; size <= chunks && counts_(size).same_clusters(counts); size *= 2) {
        Scratch of_level = context_.scratch();
        NodeLevel<T>(product_, tokens_, in_clusters, size, counts_(size), context_, of_level).attend(shift, rows_);
      }
    }
  }

  /// The largest finite bias in the first chunk: every query that sees a node sees that.
  T bias_origin() const {
    LargestBias<T> largest;
    for (Index j = 0; j < kChunkKeys && !product_.in.key_bias.empty(); ++j) {
      largest.add(product_.in.key_bias.data()[tokens_.keys.data()[j]]);
    }
    return largest.origin();
  }

  const Counts& counts_;
};

}  // namespace attn::detail
