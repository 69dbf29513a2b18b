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
#include <cstddef>
#include <memory>
#include <span>

namespace attn::detail {

/// A node among those of its size.
struct UsedNode {
  Index number;
  Range branches;  ///< among those of all chunks
  Range queries;   ///< that use it, among those that masks keep
};

/// rows, from first on, <- the given ones by the landmark that is nearest to each, those of one in their order;
/// starts <- where those of each landmark begin, and the end.
inline void sort_rows(std::span<const Index> given, const Index* nearest, Index first, Index* rows,
                      std::span<Index> starts) {
  std::fill(starts.begin(), starts.end(), Index{0});
  for (std::size_t i = 0; i < given.size(); ++i) ++starts.data()[nearest[i]];
  Index end = first;
  for (Index& start : starts) start = end += start;
  for (std::size_t i = given.size(); i-- > 0;) rows[--starts.data()[nearest[i]]] = given.data()[i];
}

/// What a worker needs for nodes of one size; it turns to one after another.
template <class T>
struct NodeWorker {
  KeyClusters<T> node;
  NodeViewer<T> viewer;
  NodeRunner<T> runner;
  NearestLandmarks<T> finder;

  /// largest: the node of most keys.
  NodeWorker(const Product<T>& product, const KeyClusters<T>& largest, const FieldSizes& sizes, Index landmarks,
             Scratch& scratch)
      : node(largest),
        viewer(product, node, sizes, scratch),
        runner(product, node, scratch),
        finder(product, landmarks, scratch) {}

  void turn_to(const KeyClusters<T>& keys, const UsedNode& used) {
    std::construct_at(&node, keys.some_branches(used.branches));
  }
};

template <class T>
class NodeLevel {
 public:
  /// keys: of all chunks. size: chunks of a node.
  NodeLevel(const Product<T>& product, const CausalTokens& tokens, const KeyClusters<T>& keys, Index size,
            const NodeCounts& counts, Context& context, Scratch& scratch)
      : product_(product),
        tokens_(tokens),
        keys_(keys),
        context_(context),
        size_(size),
        branches_(size * counts.branches()),
        counts_(counts.within(branches_)),
        count_(CausalNode::count(tokens.most_chunks(), size)),
        landmarks_(NodeLandmarks<T>::make(product.in, product.kernel,
                                          cut_queries(product.in, tokens, {0, count_}, size, counts_, context, scratch),
                                          counts_.landmarks_in_a_region, context, scratch)),
        of_regions_(
            Summaries<T>::make(all_open() ? 0 : count_ * counts_.regions() * branches_, keys.tokens.cols(), scratch)),
        rows_(scratch.array<Index>(tokens.query_count())),
        starts_(scratch.array<Index>(count_ * (counts_.landmarks + 1))) {}

  /// Adds the nodes to the rows that use them. shift(row): as in CausalRows::add.
  template <class Shift>
  void attend(const Shift& shift, const CausalRows<T>& to) const {
    Scratch scratch = context_.scratch();
    const KeyClusters<T> largest = keys_.some_branches(node(count_ - 1).branches);
    const FieldSizes sizes{counts_.open, counts_.near};
    NodeWorker<T>* const workers =
        scratch.make<NodeWorker<T>>(context_.workers(), product_, largest, sizes, counts_.landmarks, scratch);
    assign_rows(workers, scratch);
    context_.for_each(of_regions_.tokens.rows() / counts_.regions(), [&](Index item, int worker) {
      summarize(node(item / branches_), item % branches_, workers[worker]);
    });
    context_.for_each(count_ * counts_.landmarks, [&](Index item, int worker) {
      attend(node(item / counts_.landmarks), item % counts_.landmarks, shift, to, workers[worker]);
    });
  }

 private:
  bool all_open() const { return counts_.open == branches_; }

  UsedNode node(Index i) const {
    const CausalNode node = CausalNode::of(i, size_);
    const Index first = node.first * counts_.branches();
    return {i, {first, first + branches_}, tokens_.with_chunks(node.users())};
  }

  Range landmarks_of(Index node) const { return {node * counts_.landmarks, (node + 1) * counts_.landmarks}; }

  /// Queries, at most a strip, that use a node.
  struct Strip {
    Index node;
    Range queries;
  };

  /// rows_ <- the row numbers of each node's queries, those of each landmark together, ascending; starts_ <- where each
  /// landmark's begin.
  void assign_rows(NodeWorker<T>* workers, Scratch& scratch) const {
    Scratch temporary = scratch.nested();
    const std::span<Index> nearest = temporary.array<Index>(tokens_.query_count());
    const std::span<Strip> strips = temporary.array<Strip>(tokens_.query_count() / kTileWidth<T> + count_);
    Index count = 0;
    for (Index i = 0; i < count_; ++i) {
      const Range queries = node(i).queries;
      for (Index first = queries.first; first < queries.last; first += kTileWidth<T>) {
        strips.data()[count++] = {i, {first, std::min(queries.last, first + kTileWidth<T>)}};
      }
    }
    context_.for_each(count, [&](Index s, int worker) {
      const Strip& strip = strips.data()[s];
      workers[worker].finder.find(landmarks_, landmarks_of(strip.node), tokens_.queries.data() + strip.queries.first,
                                  strip.queries.last - strip.queries.first, nearest.data() + strip.queries.first);
    });
    context_.for_each(count_, [&](Index i, int) {
      const Range some = node(i).queries;
      sort_rows(part_of(std::span<const Index>(tokens_.queries), some.first, some.last - some.first),
                nearest.data() + some.first, some.first, rows_.data(),
                part_of(starts_, i * (counts_.landmarks + 1), counts_.landmarks + 1));
    });
  }

  /// A branch as all regions of a node see it.
  void summarize(const UsedNode& node, Index branch, NodeWorker<T>& worker) const {
    worker.turn_to(keys_, node);
    for (Index r = node.number * counts_.regions(); r < (node.number + 1) * counts_.regions(); ++r) {
      worker.viewer.summarize(landmarks_.of_region(r), branch, of_regions_, r * branches_ + branch);
    }
  }

  template <class Shift>
  void attend(const UsedNode& node, Index landmark, const Shift& shift, const CausalRows<T>& to,
              NodeWorker<T>& worker) const {
    const Index* const starts = starts_.data() + node.number * (counts_.landmarks + 1) + landmark;
    if (starts[0] == starts[1]) return;
    worker.turn_to(keys_, node);
    const NodeView<T> view = view_of(landmarks_, landmarks_of(node.number).first + landmark, of_regions_, branches_,
                                     node.branches.first == 0, worker.viewer);
    worker.runner.attend(view, part_of(std::span<const Index>(rows_), starts[0], starts[1] - starts[0]), shift, to);
  }

  const Product<T>& product_;
  const CausalTokens& tokens_;
  const KeyClusters<T>& keys_;
  Context& context_;
  Index size_, branches_;
  NodeCounts counts_;
  Index count_;
  NodeLandmarks<T> landmarks_;
  Summaries<T> of_regions_;  ///< of all branches of each node, as one region after another sees them
  std::span<Index> rows_, starts_;
};

}  // namespace attn::detail
