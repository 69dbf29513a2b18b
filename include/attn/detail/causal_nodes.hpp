/// Nodes of the past, each built from its own tokens alone: clusters of keys, landmarks of queries, and what each
/// landmark sees of the node.
///
///   chunk: its keys in clusters by bisection, neighbours of them in branches; its queries in small groups
///   node:  the clusters and branches of its chunks; landmarks l at the means of neighbouring groups, themselves in
///          regions
///     for each region:     summaries of all branches
///       for each landmark: the branches of the largest error terms, for a sample of its queries, are open; of the
///                          clusters in these those of the largest error terms are near:  the landmark's view
#pragma once

#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/detail/causal_layout.hpp>
#include <attn/detail/cluster_summaries.hpp>
#include <attn/detail/field_choice.hpp>
#include <attn/detail/field_tokens.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <memory>
#include <span>

namespace attn::detail {

/// Clusters and branches of so many keys' worth, landmarks, regions, open branches and near clusters of a node.
struct NodeCounts {
  Index clusters, clusters_in_a_branch;  ///< of each chunk
  Index landmarks, landmarks_in_a_region, open, near;

  Index branches() const { return clusters / clusters_in_a_branch; }
  bool same_clusters(const NodeCounts& other) const {
    return clusters == other.clusters && clusters_in_a_branch == other.clusters_in_a_branch;
  }
};

/// Row numbers of keys in the order of clusters, those of each chunk by bisection: so many to a chunk, of which so many
/// make a branch.
template <class T>
ClusteredRows cut_chunks(const Sources<T>& in, const CausalTokens& tokens, Index chunks, Index clusters,
                         Index in_a_branch, Context& context, Scratch& scratch) {
  const ClusteredRows all{scratch.array<Index>(chunks * kChunkKeys - kSinkKeys),
                          scratch.array<Index>(chunks * clusters + 1)};
  context.for_each_call(chunks, [&](Index c, Context& own) {
    const auto rows = tokens.keys_of_chunk(c);
    const Index first = std::max<Index>(0, c * kChunkKeys - kSinkKeys);
    Scratch temporary = own.scratch();
    const ClusteredRows part{part_of(all.rows, first, static_cast<Index>(rows.size())),
                             temporary.array<Index>(clusters + 1)};
    cut_rows(in.k, rows, Axes::features, part, in_a_branch, own);
    for (Index i = 0; i < clusters; ++i) all.starts.data()[c * clusters + i] = first + part.starts.data()[i];
  });
  all.starts.back() = static_cast<Index>(all.rows.size());
  return all;
}

/// Small groups of queries, cut by bisection: those of the first queries of all, then those of each chunk. Chunks with
/// few queries have none.
template <class T>
struct ChunkQueries {
  static constexpr Index kGroup = 64, kFirstGroups = 32;

  QueryGroups<T> groups;
  std::span<Index> starts;  ///< the first group of each chunk, and the end

  /// The groups of a node: its own, or the first ones.
  Range groups_of(Range chunks) const {
    const Range own{starts.data()[chunks.first], starts.data()[chunks.last]};
    return own.first < own.last ? own : Range{0, kFirstGroups};
  }

  static ChunkQueries make(const Sources<T>& in, const LogKernel<T>& kernel, const CausalTokens& tokens, Index chunks,
                           Context& context, Scratch& scratch) {
    const std::span<Index> starts = scratch.array<Index>(chunks + 1), firsts = scratch.array<Index>(chunks + 1);
    Index count = kFirstGroups, rows = kFirstQueries;
    for (Index c = 0; c < chunks; ++c) {
      const Range own = tokens.of_chunk(c);
      const Index n = own.last - own.first < kFirstQueries ? 0 : own.last - own.first;
      starts.data()[c] = count;
      firsts.data()[c] = rows;
      count += n / kGroup;
      rows += n;
    }
    starts.back() = count;
    firsts.back() = rows;
    const ClusteredRows all{scratch.array<Index>(rows), scratch.array<Index>(count + 1)};
    context.for_each_call(chunks + 1, [&](Index item, Context& own) {
      if (item == 0) return cut(in.q, tokens, {0, kFirstQueries}, 0, {0, kFirstGroups}, all, own);
      const Index c = item - 1;
      cut(in.q, tokens, tokens.of_chunk(c), firsts.data()[c], {starts.data()[c], starts.data()[c + 1]}, all, own);
    });
    all.starts.back() = rows;
    return {QueryGroups<T>::make(in, kernel, {all, 1}, context, scratch), starts};
  }

 private:
  static void cut(const TokenRows<T>& q, const CausalTokens& tokens, Range queries, Index first, Range groups,
                  const ClusteredRows& all, Context& context) {
    const Index count = groups.last - groups.first, n = queries.last - queries.first;
    if (count == 0) return;
    Scratch scratch = context.scratch();
    const ClusteredRows part{part_of(all.rows, first, n), scratch.array<Index>(count + 1)};
    cut_rows(q, part_of(std::span<const Index>(tokens.queries), queries.first, n), Axes::features, part, 1, context);
    for (Index i = 0; i < count; ++i) all.starts.data()[groups.first + i] = first + part.starts.data()[i];
  }
};

/// The landmarks of a node: groups in parts, and means, relative to the center, times the kernel's scale.
template <class T>
struct NodeLandmarks {
  NestedRows parts;    ///< groups of each landmark, landmarks in regions
  Summaries<T> means;  ///< l in tokens, -|l|^2 / 2 as the bias: the largest score is that of the nearest landmark
  MatrixRef<T> of_regions;

  Index count() const { return parts.parts.count(); }

  static NodeLandmarks none() { return {{{}, 1}, Summaries<T>::none(), {nullptr, 0, 0, 0}}; }

  static NodeLandmarks make(const ChunkQueries<T>& queries, Range groups, const NodeCounts& counts, Context& context,
                            Scratch& scratch) {
    const Index n = groups.last - groups.first, count = std::min(n, counts.landmarks), d = queries.groups.means.cols();
    const Index in_a_region = count % counts.landmarks_in_a_region == 0 ? counts.landmarks_in_a_region : 1;
    const NodeLandmarks made{{{scratch.array<Index>(n), scratch.array<Index>(count + 1)}, in_a_region},
                             Summaries<T>::make(count, d, scratch),
                             scratch.matrix<T>(count / in_a_region, d)};
    Scratch temporary = context.scratch();
    const std::span<Index> rows = temporary.array<Index>(n);
    for (Index i = 0; i < n; ++i) rows.data()[i] = groups.first + i;
    cut_rows(TokenRows<T>(queries.groups.means), std::span<const Index>(rows), Axes::features, made.parts.parts,
             in_a_region, context);
    for (Index l = 0; l < count; ++l) {
      T* const mean = row_of(made.means.tokens, l);
      set_mean(queries, made.parts.parts, made.parts.parts.range(l), mean);
      made.means.bias[l] = -squared_norm(mean, d) / 2;
    }
    for (Index r = 0; r < made.parts.sets(); ++r) {
      set_mean(queries, made.parts.parts, made.parts.range(r), row_of(made.of_regions, r));
    }
    return made;
  }

  /// Up to most row numbers of queries of a landmark, evenly spaced. Returns how many.
  Index sample(const ChunkQueries<T>& queries, Index landmark, Index most, Index* rows) const {
    const ClusteredRows& of = queries.groups.tree.parts;
    const Range groups = parts.parts.range(landmark);
    const auto size = [&](Index i) {
      const Range range = of.range(parts.parts.rows.data()[i]);
      return range.last - range.first;
    };
    Index n = 0, before = 0, group = groups.first;
    for (Index i = groups.first; i < groups.last; ++i) n += size(i);
    const Index count = std::min(n, most);
    for (Index i = 0; i < count; ++i) {
      const Index at = (2 * i + 1) * n / (2 * count);
      while (at - before >= size(group)) before += size(group++);
      rows[i] = of.rows.data()[of.range(parts.parts.rows.data()[group]).first + at - before];
    }
    return count;
  }

 private:
  static void set_mean(const ChunkQueries<T>& queries, const ClusteredRows& parts, Range groups, T* mean) {
    const MatrixRef<T>& means = queries.groups.means;
    const T share = 1 / static_cast<T>(groups.last - groups.first);
    std::fill_n(mean, means.cols(), T(0));
    for (Index i = groups.first; i < groups.last; ++i)
      add_row(share, row_of(means, parts.rows.data()[i]), mean, means.cols());
  }
};

/// What a landmark sees of its node: summaries of what is far, and the numbers of clusters that are near.
template <class T>
struct NodeView {
  Summaries<T> far;
  std::span<const Index> near;
};

/// Makes views of nodes of one size. One for each worker.
template <class T>
class NodeViewer : public FieldChoice<T> {
  using Base = FieldChoice<T>;
  using Base::branch_count_;
  using Base::branches_;
  using Base::cluster_count_;
  using Base::clusters_;
  using Base::keys_;
  using Base::lanes_;
  using Base::near_;
  using Base::open_;
  using Base::sizes_;
  using Base::summarizer_;

 public:
  /// Queries of a sample.
  static constexpr Index kSample = std::min<Index>(32, kTileWidth<T>);

  /// node: the largest one; another's keys may take its place.
  NodeViewer(const Product<T>& product, const KeyClusters<T>& node, const FieldSizes& sizes, Scratch& scratch)
      : Base(node, sizes, scratch),
        product_(product),
        far_(Summaries<T>::make(branch_count_ + cluster_count_, node.tokens.cols(), scratch)),
        sample_(node.d, node.d_v, branch_count_, scratch),
        rows_(scratch.elements<T>(kLanes<T> * node.d)) {}

  /// Branch b as a landmark sees it. landmark: s l.
  void summarize(const T* landmark, Index b, const Summaries<T>& to, Index i) {
    summarizer_.summarize_branch(landmark, b, to, i);
  }

  /// branches: those of the landmark's region. Good until the next one.
  NodeView<T> view(const Summaries<T>& branches, const T* region, const T* landmark, const Index* sample, Index count) {
    std::construct_at(&branches_, branches);
    sample_.load(product_, sample, count, rows_);
    sample_.clear(keys_.d_v);
    if (branch_count_ == 0) {
      this->open_all();
    } else {
      this->begin_terms(branch_count_);
      this->weigh_branches(sample_, region);
      this->choose_branches();
      sum_closed();
    }
    summarizer_.summarize_clusters(landmark, numbers(open_, sizes_.open), clusters_);
    T *const total = lanes_ + kTileWidth<T>, *const correction = total + kTileWidth<T>;
    this->weigh_clusters(sample_, correction, total);
    const Index near = this->choose_near(sample_, landmark, total);
    const Index far =
        collect(clusters_, cluster_count_, numbers(near_, near),
                collect(branches_, branch_count_, numbers(open_, branch_count_ == 0 ? 0 : sizes_.open), 0));
    for (Index i = 0; i < near; ++i) near_[i] = this->cluster(near_[i]);
    return {far_.part(0, far), numbers(near_, near)};
  }

 private:
  /// The sample's sums <- those of the weights of branches that are not open.
  void sum_closed() {
    const LaneState<T>& state = sample_.state;
    std::fill_n(state.sum, sample_.lanes(), T(0));
    for (Index b = 0, i = 0; b < branch_count_; ++b) {
      if (i < sizes_.open && open_[i] == b) {
        ++i;
        continue;
      }
      for (Index lane = 0; lane < sample_.lanes(); ++lane)
        state.sum[lane] += sample_.weights[b * sample_.lanes() + lane];
    }
    for (Index lane = 0; lane < sample_.lanes(); ++lane) {
      if (state.sum[lane] == 0) state.maximum[lane] = kNoMaximum<T>;
    }
  }

  /// far_ <- far_, of which there are so many, and all summaries but some. Returns how many there are then.
  Index collect(const Summaries<T>& from, Index count, std::span<const Index> some, Index far) const {
    for (Index c = 0; c < count; ++c) {
      if (!some.empty() && some.front() == c) {
        some = some.subspan(1);
        continue;
      }
      std::copy_n(row_of(from.tokens, c), far_.tokens.cols(), row_of(far_.tokens, far));
      far_.bias[far++] = from.bias[c];
    }
    return far;
  }

  const Product<T>& product_;
  Summaries<T> far_;
  FieldStrip<T> sample_;
  T* rows_;
};

}  // namespace attn::detail
