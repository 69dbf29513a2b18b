/// Nodes of the past, each built from its own tokens alone: clusters of keys, landmarks of queries, and what each
/// landmark sees of the node.
///
///   chunk: its keys in clusters by bisection, neighbours of them in branches
///   node:  the clusters and branches of its chunks; landmarks l at the means of groups of its last queries, themselves
///          in regions
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
  Index regions() const { return landmarks / landmarks_in_a_region; }

  /// What of that there is in nodes of so many branches.
  NodeCounts within(Index all_branches) const {
    NodeCounts counts = *this;
    counts.landmarks = std::min(landmarks, kFirstQueries);
    if (counts.landmarks % landmarks_in_a_region != 0) counts.landmarks_in_a_region = 1;
    counts.open = std::min(open, all_branches);
    counts.near = std::min(near, counts.open * clusters_in_a_branch);
    return counts;
  }

  bool same_clusters(const NodeCounts& other) const {
    return clusters == other.clusters && clusters_in_a_branch == other.clusters_in_a_branch;
  }
};

/// Row numbers of keys of some chunks in the order of clusters, those of each chunk by bisection: so many to a chunk,
/// of which so many make a branch. The first ones of all are before them, in no cluster.
template <class T>
ClusteredRows cut_chunks(const Sources<T>& in, const CausalTokens& tokens, Range chunks, Index clusters,
                         Index in_a_branch, Context& context, Scratch& scratch) {
  const Index count = chunks.last - chunks.first;
  const ClusteredRows all{scratch.array<Index>(count * kChunkKeys), scratch.array<Index>(count * clusters + 1)};
  if (chunks.first == 0) std::copy_n(tokens.keys.data(), kSinkKeys, all.rows.data());
  context.for_each_call(count, [&](Index c, Context& own) {
    const auto rows = tokens.keys_of_chunk(chunks.first + c);
    const Index first = (c + 1) * kChunkKeys - static_cast<Index>(rows.size());
    Scratch temporary = own.scratch();
    const ClusteredRows part{part_of(all.rows, first, static_cast<Index>(rows.size())),
                             temporary.array<Index>(clusters + 1)};
    cut_rows(in.k, rows, Axes::features, part, in_a_branch, own);
    for (Index i = 0; i < clusters; ++i) all.starts.data()[c * clusters + i] = first + part.starts.data()[i];
  });
  all.starts.back() = static_cast<Index>(all.rows.size());
  return all;
}

/// The queries that landmarks of some nodes of a size are means of: row numbers, so many landmarks for each, one node's
/// after another's. They are those that see a key of the node's last chunk as their last one, which are most like the
/// queries to come; or where these are few, the first queries of all, which see no node.
template <class T>
ClusteredRows cut_queries(const Sources<T>& in, const CausalTokens& tokens, Range some, Index size,
                          const NodeCounts& counts, Context& context, Scratch& scratch) {
  const Index nodes = some.last - some.first, landmarks = counts.landmarks;
  const std::span<Index> firsts = scratch.array<Index>(nodes + 1);
  const auto queries_of = [&](Index i) {
    const CausalNode node = CausalNode::of(some.first + i, size);
    const Range own = tokens.of_chunk(node.first + node.chunks - 1);
    return own.last - own.first < kFirstQueries ? Range{0, kFirstQueries} : own;
  };
  firsts.front() = 0;
  for (Index i = 0; i < nodes; ++i) firsts.data()[i + 1] = firsts.data()[i] + queries_of(i).last - queries_of(i).first;
  const ClusteredRows all{scratch.array<Index>(firsts.back()), scratch.array<Index>(nodes * landmarks + 1)};
  context.for_each_call(nodes, [&](Index i, Context& own) {
    const Range queries = queries_of(i);
    const Index n = queries.last - queries.first, first = firsts.data()[i];
    Scratch temporary = own.scratch();
    const ClusteredRows part{part_of(all.rows, first, n), temporary.array<Index>(landmarks + 1)};
    cut_rows(in.q, part_of(std::span<const Index>(tokens.queries), queries.first, n), Axes::features, part,
             counts.landmarks_in_a_region, own);
    for (Index l = 0; l < landmarks; ++l) all.starts.data()[i * landmarks + l] = first + part.starts.data()[l];
  });
  all.starts.back() = firsts.back();
  return all;
}

/// The landmarks of nodes of one size.
template <class T>
struct NodeLandmarks {
  QueryGroups<T> groups;  ///< landmarks in regions, relative to the center, times the kernel's scale
  T* bias;                ///< -|l|^2 / 2 of each: with it, the largest score is that of the nearest landmark

  static NodeLandmarks make(const Sources<T>& in, const LogKernel<T>& kernel, const ClusteredRows& queries,
                            Index in_a_region, Context& context, Scratch& scratch) {
    const auto groups = QueryGroups<T>::make(in, kernel, {queries, in_a_region}, context, scratch);
    const NodeLandmarks made{groups, scratch.elements<T>(queries.count())};
    for (Index l = 0; l < queries.count(); ++l)
      made.bias[l] = -squared_norm(row_of(groups.means, l), groups.means.cols()) / 2;
    return made;
  }

  const T* landmark(Index l) const { return row_of(groups.means, l); }
  Index region(Index l) const { return l / groups.tree.parts_in_a_set; }
  const T* of_region(Index r) const { return row_of(groups.region_means, r); }

  /// Some landmarks as keys.
  KeyTile<T> tile(Range some) const { return Summaries<T>{groups.means, bias}.tile(some, 0); }

  /// Up to most row numbers of queries of a landmark, evenly spaced. Returns how many.
  Index sample(Index l, Index most, Index* rows) const {
    const Range range = groups.tree.parts.range(l);
    const Index n = range.last - range.first, count = std::min(n, most);
    for (Index i = 0; i < count; ++i) {
      rows[i] = groups.tree.parts.rows.data()[range.first + (2 * i + 1) * n / (2 * count)];
    }
    return count;
  }
};

/// What a landmark sees of its node: summaries of what is far, the numbers of clusters that are near, and in the order
/// of clusters other keys that are seen as they are.
template <class T>
struct NodeView {
  Summaries<T> far;
  std::span<const Index> near;
  Range others;
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
    summarizer_.summarize_branch({landmark, to, i}, b);
  }

  /// branches: those of the landmark's region. sinks: whether the first keys of all go with the node. Good until the
  /// next one.
  NodeView<T> view(const Summaries<T>& branches, const T* region, const T* landmark, const Index* sample, Index count,
                   bool sinks) {
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
    summarizer_.summarize_clusters({landmark, clusters_, 0}, numbers(open_, sizes_.open));
    T *const total = lanes_ + kTileWidth<T>, *const correction = total + kTileWidth<T>;
    this->weigh_clusters(sample_, correction, total);
    const Index near = this->choose_near(sample_, landmark, total);
    const Index far =
        collect(clusters_, cluster_count_, numbers(near_, near),
                collect(branches_, branch_count_, numbers(open_, branch_count_ == 0 ? 0 : sizes_.open), 0));
    for (Index i = 0; i < near; ++i) near_[i] = this->cluster(near_[i]);
    return {far_.part(0, far), numbers(near_, near), {0, sinks ? kSinkKeys : 0}};
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

/// What a landmark sees, good until the viewer's next one. of_regions: the node's branches as each region sees them,
/// none where all are open. sinks: as in view.
template <class T>
NodeView<T> view_of(const NodeLandmarks<T>& landmarks, Index landmark, const Summaries<T>& of_regions, Index branches,
                    bool sinks, NodeViewer<T>& viewer) {
  const Index region = landmarks.region(landmark);
  Index sample[array_size(NodeViewer<T>::kSample)];
  const Index count = landmarks.sample(landmark, NodeViewer<T>::kSample, sample);
  return viewer.view(of_regions.tokens.rows() == 0 ? of_regions : of_regions.part(region * branches, branches),
                     landmarks.of_region(region), landmarks.landmark(landmark), sample, count, sinks);
}

}  // namespace attn::detail
