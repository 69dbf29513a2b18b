/// Nodes of one size, and all queries that use them.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/detail/causal_fields.hpp>
#include <attn/detail/causal_layout.hpp>
#include <attn/detail/causal_nodes.hpp>
#include <attn/detail/cluster_summaries.hpp>
#include <attn/detail/field_choice.hpp>
#include <attn/detail/field_tokens.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/tile.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <memory>
#include <span>

namespace attn::detail {

/// A node, and which rows use it.
template <class T>
struct UsedNode {
  Range branches{0, 0};  ///< among those of all chunks
  NodeLandmarks<T> landmarks = NodeLandmarks<T>::none();
  Summaries<T> of_regions = Summaries<T>::none();  ///< of all its branches, as one region after another sees them
  std::span<Index> rows{};                         ///< row numbers, those of each landmark together
  std::span<Index> starts{};                       ///< of the rows of each landmark, and the end

  std::span<const Index> rows_of(Index landmark) const {
    const Index first = starts.data()[landmark];
    return part_of(std::span<const Index>(rows), first, starts.data()[landmark + 1] - first);
  }

  Summaries<T> of_region(Index region) const {
    const Index count = of_regions.tokens.rows() / landmarks.parts.sets();
    return of_regions.part(region * count, count);
  }
};

/// What a worker needs for nodes of one size; it turns to one after another.
template <class T>
struct NodeWorker {
  KeyClusters<T> node;
  NodeViewer<T> viewer;
  NodeRunner<T> runner;

  /// largest: the node of most keys.
  NodeWorker(const Product<T>& product, const KeyClusters<T>& largest, const FieldSizes& sizes, Scratch& scratch)
      : node(largest), viewer(product, node, sizes, scratch), runner(product, node, scratch) {}

  void turn_to(const KeyClusters<T>& keys, const UsedNode<T>& used) {
    std::construct_at(&node, keys.some_branches(used.branches));
  }
};

template <class T>
class NodeLevel {
 public:
  /// keys: of all chunks. size: chunks of a node.
  NodeLevel(const Product<T>& product, const CausalTokens& tokens, const KeyClusters<T>& keys,
            const ChunkQueries<T>& queries, Index size, const NodeCounts& counts, Context& context, Scratch& scratch)
      : product_(product),
        tokens_(tokens),
        keys_(keys),
        queries_(queries),
        context_(context),
        size_(size),
        branches_(size * counts.branches()),
        counts_(counts),
        count_(CausalNode::count(tokens.most_chunks(), size)),
        nodes_(scratch.make<UsedNode<T>>(count_)) {
    counts_.open = std::min(counts.open, branches_);
    counts_.near = std::min(counts.near, counts_.open * counts.clusters_in_a_branch);
    for (Index i = 0; i < count_; ++i) make_node(i, scratch);
    assign_rows(scratch);
  }

  /// shift(row): as in CausalRows::add.
  template <class Shift>
  void attend(const Shift& shift, const CausalRows<T>& to) const {
    Scratch scratch = context_.scratch();
    const KeyClusters<T> largest = keys_.some_branches(nodes_[count_ - 1].branches);
    const FieldSizes sizes{counts_.open, counts_.near};
    auto* const workers = scratch.make<NodeWorker<T>>(context_.workers(), product_, largest, sizes, scratch);
    if (counts_.open < branches_) {
      context_.for_each(count_ * branches_, [&](Index item, int worker) {
        workers[worker].turn_to(keys_, nodes_[item / branches_]);
        summarize(nodes_[item / branches_], item % branches_, workers[worker]);
      });
    }
    context_.for_each(count_ * counts_.landmarks, [&](Index item, int worker) {
      const UsedNode<T>& node = nodes_[item / counts_.landmarks];
      const Index landmark = item % counts_.landmarks;
      if (landmark >= node.landmarks.count() || node.rows_of(landmark).empty()) return;
      workers[worker].turn_to(keys_, node);
      attend(node, landmark, shift, to, workers[worker]);
    });
  }

 private:
  void make_node(Index i, Scratch& scratch) {
    const CausalNode node = CausalNode::of(i, size_);
    const Range queries = tokens_.with_chunks(node.users());
    const auto landmarks =
        NodeLandmarks<T>::make(queries_, queries_.groups_of(node.range()), counts_, context_, scratch);
    const Index summaries = counts_.open < branches_ ? landmarks.parts.sets() * branches_ : 0,
                first = node.first * counts_.branches();
    const UsedNode<T> made{{first, first + branches_},
                           landmarks,
                           Summaries<T>::make(summaries, keys_.tokens.cols(), scratch),
                           scratch.array<Index>(queries.last - queries.first),
                           scratch.array<Index>(landmarks.count() + 1)};
    std::construct_at(nodes_ + i, made);
  }

  /// Some rows of a node, at most a strip, from the given query on.
  struct Strip {
    Index node, first, count, query;
  };

  void assign_rows(Scratch& scratch) const {
    Scratch temporary = scratch.nested();
    Index most = 0;
    for (Index i = 0; i < count_; ++i) most += static_cast<Index>(nodes_[i].rows.size()) / kTileWidth<T> + 1;
    const std::span<Strip> strips = temporary.array<Strip>(most);
    const std::span<Index> nearest = temporary.array<Index>(tokens_.query_count());
    Index count = 0;
    for (Index i = 0; i < count_; ++i) {
      const Index n = static_cast<Index>(nodes_[i].rows.size()),
                  query = tokens_.with_chunks(CausalNode::of(i, size_).users()).first;
      for (Index first = 0; first < n; first += kTileWidth<T>) {
        strips.data()[count++] = {i, first, std::min(n - first, kTileWidth<T>), query + first};
      }
    }
    auto* const finders =
        temporary.make<NearestLandmarks<T>>(context_.workers(), product_, counts_.landmarks, temporary);
    context_.for_each(count, [&](Index s, int worker) {
      const Strip& strip = strips.data()[s];
      finders[worker].find(nodes_[strip.node].landmarks, tokens_.queries.data() + strip.query, strip.count,
                           nearest.data() + strip.query);
    });
    context_.for_each(count_, [&](Index i, int) {
      const Index query = tokens_.with_chunks(CausalNode::of(i, size_).users()).first;
      sort_rows(nodes_[i], tokens_.queries.data() + query, nearest.data() + query);
    });
  }

  /// The rows of a node, which are given in order, by their landmarks.
  static void sort_rows(const UsedNode<T>& node, const Index* rows, const Index* nearest) {
    const auto n = static_cast<Index>(node.rows.size());
    Index* const starts = node.starts.data();
    std::fill(node.starts.begin(), node.starts.end(), Index{0});
    for (Index i = 0; i < n; ++i) ++starts[nearest[i]];
    for (Index l = 0, before = 0; l <= node.landmarks.count(); ++l) {
      before += l < node.landmarks.count() ? starts[l] : 0;
      starts[l] = before;  // the end of each, for now
    }
    for (Index i = n; i-- > 0;) node.rows.data()[--starts[nearest[i]]] = rows[i];
  }

  void summarize(const UsedNode<T>& node, Index branch, NodeWorker<T>& worker) const {
    for (Index r = 0; r < node.landmarks.parts.sets(); ++r) {
      worker.viewer.summarize(row_of(node.landmarks.of_regions, r), branch, node.of_regions, r * branches_ + branch);
    }
  }

  template <class Shift>
  void attend(const UsedNode<T>& node, Index landmark, const Shift& shift, const CausalRows<T>& to,
              NodeWorker<T>& worker) const {
    Index sample[array_size(NodeViewer<T>::kSample)];
    const Index count = node.landmarks.sample(queries_, landmark, NodeViewer<T>::kSample, sample),
                region = landmark / node.landmarks.parts.parts_in_a_set;
    const NodeView<T> view = worker.viewer.view(node.of_region(region), row_of(node.landmarks.of_regions, region),
                                                row_of(node.landmarks.means.tokens, landmark), sample, count);
    worker.runner.attend(view, node.rows_of(landmark), shift, to);
  }

  const Product<T>& product_;
  const CausalTokens& tokens_;
  const KeyClusters<T>& keys_;
  const ChunkQueries<T>& queries_;
  Context& context_;
  Index size_, branches_;
  NodeCounts counts_;
  Index count_;
  UsedNode<T>* nodes_;
};

}  // namespace attn::detail
