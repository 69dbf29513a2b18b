/// Nodes that a cache keeps from call to call: those of causal multipole attention for the queries that come next.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/detail/causal_fields.hpp>
#include <attn/detail/causal_layout.hpp>
#include <attn/detail/causal_level.hpp>
#include <attn/detail/causal_multipole.hpp>
#include <attn/detail/causal_nodes.hpp>
#include <attn/detail/cluster_summaries.hpp>
#include <attn/detail/field_choice.hpp>
#include <attn/detail/field_tokens.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/tile.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace attn::detail {

/// A node in memory of its own, and the views that landmarks have had of it so far. The query heads that share its keys
/// have landmarks of their own.
template <class T>
class CachedNode {
 public:
  /// of_heads: of the cache's own queries and keys, for each query head. finest: counts of single chunks.
  CachedNode(std::span<const Product<T>* const> of_heads, const CausalTokens& tokens, const CausalNode& node,
             const NodeCounts& finest, const NodeCounts& counts, Context& context)
      : scratch_(memory_.scratch()),
        node_(node),
        branches_(node.chunks * counts.branches()),
        counts_(counts.within(branches_)),
        keys_(make_keys(*of_heads.front(), tokens, finest, context)) {
    for (const Product<T>* const product : of_heads) add_head(*product, tokens, context);
  }
  CachedNode(const CachedNode&) = delete;
  CachedNode& operator=(const CachedNode&) = delete;

  const CausalNode& place() const { return node_; }
  std::size_t bytes() const { return memory_.scratch_bytes(); }

  /// Adds the node to some rows of a product of new queries of head h. cached: that of the cache's own.
  void attend(std::size_t h, const Product<T>& cached, const Product<T>& product, std::span<const Index> rows,
              Context& context, const CausalRows<T>& to) {
    Scratch scratch = context.scratch();
    const Head& head = *heads_[h];
    const std::span<Index> sorted = scratch.array<Index>(static_cast<Index>(rows.size())),
                           starts = scratch.array<Index>(counts_.landmarks + 1),
                           seeing = scratch.array<Index>(counts_.landmarks);
    sort_rows(rows, nearest_landmarks(head.landmarks, product, rows, context, scratch), 0, sorted.data(), starts);
    Index count = 0;
    for (Index l = 0; l < counts_.landmarks; ++l) {
      if (starts.data()[l] < starts.data()[l + 1]) seeing.data()[count++] = l;
    }
    make_views(head, cached, seeing.first(static_cast<std::size_t>(count)), context);
    auto* const runners = scratch.make<NodeRunner<T>>(context.workers(), product, keys_, scratch);
    context.for_each(count, [&](Index i, int worker) {
      const Index l = seeing.data()[i], first = starts.data()[l];
      const auto of_landmark = part_of(std::span<const Index>(sorted), first, starts.data()[l + 1] - first);
      runners[worker].attend(
          *head.views[l], of_landmark, [](Index) { return T(0); }, to);
    });
  }

 private:
  struct Head {
    NodeLandmarks<T> landmarks;
    Summaries<T> of_regions;            ///< of all branches, as one region after another sees them
    std::optional<NodeView<T>>* views;  ///< of each landmark
  };

  FieldSizes field_sizes() const { return {counts_.open, counts_.near}; }
  bool all_open() const { return counts_.open == branches_; }
  Index far_count() const {
    return (all_open() ? 0 : branches_ - counts_.open) + counts_.open * counts_.clusters_in_a_branch - counts_.near;
  }

  KeyClusters<T> make_keys(const Product<T>& product, const CausalTokens& tokens, const NodeCounts& finest,
                           Context& context) {
    const ClusteredRows cut =
        cut_chunks(product.in, tokens, node_.range(), finest.clusters, finest.clusters_in_a_branch, context, scratch_);
    const auto made =
        KeyClusters<T>::make_tokens(product.in, product.kernel, {cut, finest.clusters_in_a_branch}, context, scratch_);
    const NestedRows tree{merged(cut, finest.clusters / counts_.clusters, scratch_), counts_.clusters_in_a_branch};
    return made.in_clusters(tree, false, context, scratch_);
  }

  void add_head(const Product<T>& product, const CausalTokens& tokens, Context& context) {
    const Index number = node_.number();
    const auto landmarks = NodeLandmarks<T>::make(
        product.in, product.kernel,
        cut_queries(product.in, tokens, {number, number + 1}, node_.chunks, counts_, context, scratch_),
        counts_.landmarks_in_a_region, context, scratch_);
    const std::optional<NodeView<T>> none{};
    const Index summaries = all_open() ? 0 : counts_.regions() * branches_;
    Head made{landmarks, Summaries<T>::make(summaries, keys_.tokens.cols(), scratch_),
              scratch_.make<std::optional<NodeView<T>>>(counts_.landmarks, none)};
    heads_.push_back(scratch_.make<Head>(1, made));
    Scratch scratch = context.scratch();
    const FieldSizes sizes = field_sizes();
    auto* const viewers = scratch.make<NodeViewer<T>>(context.workers(), product, keys_, sizes, scratch);
    context.for_each(all_open() ? 0 : branches_, [&](Index b, int worker) {
      for (Index r = 0; r < counts_.regions(); ++r) {
        viewers[worker].summarize(landmarks.of_region(r), b, made.of_regions, r * branches_ + b);
      }
    });
  }

  const Index* nearest_landmarks(const NodeLandmarks<T>& landmarks, const Product<T>& product,
                                 std::span<const Index> rows, Context& context, Scratch& scratch) const {
    const auto n = static_cast<Index>(rows.size());
    const Index count = counts_.landmarks;
    Index* const nearest = scratch.elements<Index>(n);
    auto* const finders = scratch.make<NearestLandmarks<T>>(context.workers(), product, count, scratch);
    context.for_each((n + kTileWidth<T> - 1) / kTileWidth<T>, [&](Index strip, int worker) {
      const Index first = strip * kTileWidth<T>;
      finders[worker].find(landmarks, {0, count}, rows.data() + first, std::min(n - first, kTileWidth<T>),
                           nearest + first);
    });
    return nearest;
  }

  /// The views of some landmarks, where they have none yet.
  void make_views(const Head& head, const Product<T>& cached, std::span<const Index> landmarks, Context& context) {
    Scratch scratch = context.scratch();
    struct Room {
      Index landmark;
      Summaries<T> far;
      Index* near;
    };
    Room** const rooms = scratch.elements<Room*>(static_cast<Index>(landmarks.size()));
    Index count = 0;
    for (const Index l : landmarks) {
      if (head.views[l].has_value()) continue;
      Room made{l, Summaries<T>::make(far_count(), keys_.tokens.cols(), scratch_),
                scratch_.elements<Index>(counts_.near)};
      rooms[count++] = scratch.make<Room>(1, made);
    }
    if (count == 0) return;
    const FieldSizes sizes = field_sizes();
    auto* const viewers = scratch.make<NodeViewer<T>>(context.workers(), cached, keys_, sizes, scratch);
    context.for_each(count, [&](Index i, int worker) {
      const NodeView<T> view =
          view_of(head.landmarks, rooms[i]->landmark, head.of_regions, branches_, node_.first == 0, viewers[worker]);
      std::copy_n(view.far.tokens.data(), far_count() * keys_.tokens.cols(), rooms[i]->far.tokens.data());
      std::copy_n(view.far.bias, far_count(), rooms[i]->far.bias);
      std::copy(view.near.begin(), view.near.end(), rooms[i]->near);
    });
    for (Index i = 0; i < count; ++i) {
      head.views[rooms[i]->landmark].emplace(
          NodeView<T>{rooms[i]->far, numbers(rooms[i]->near, counts_.near), {0, node_.first == 0 ? kSinkKeys : 0}});
    }
  }

  Context memory_;
  Scratch scratch_;
  CausalNode node_;
  Index branches_;
  NodeCounts counts_;
  KeyClusters<T> keys_;
  std::vector<Head*> heads_;
};

/// The nodes of a key head: those of a query after so many complete chunks, the first one first.
template <class T>
class CachedNodes {
 public:
  /// Turns to the nodes of queries after so many chunks; make(node) gives one that is not kept.
  template <class Make>
  void turn_to(Index chunks, const Make& make) {
    std::size_t kept = 0;
    Index size = 1;
    while (2 * size <= chunks) size *= 2;
    for (Index first = 0; first < chunks; size /= 2) {
      if (first + size > chunks) continue;
      const CausalNode node{first, size};
      if (kept == nodes_.size() || !(nodes_[kept]->place() == node)) {
        nodes_.resize(kept);
        nodes_.push_back(make(node));
      }
      ++kept;
      first += size;
    }
    nodes_.resize(kept);
  }

  /// Forgets what has keys or queries from the given token on.
  void truncate(Index length) {
    while (!nodes_.empty() && nodes_.back()->place().range().last * kChunkKeys > length) nodes_.pop_back();
  }

  std::size_t bytes() const {
    std::size_t total = 0;
    for (const auto& node : nodes_) total += node->bytes();
    return total;
  }

  /// The nodes, small ones first.
  auto begin() const { return nodes_.rbegin(); }
  auto end() const { return nodes_.rend(); }

 private:
  std::vector<std::unique_ptr<CachedNode<T>>> nodes_;
};

/// New queries of one head, which end with the cache's last token.
template <class T>
class CachedQueries : public CausalAttention<T> {
  using Base = CausalAttention<T>;

 public:
  /// cached: the product of the cache's own queries and keys. product: of the new queries; tokens: of these.
  CachedQueries(const Product<T>& cached, const Product<T>& product, const CausalTokens& tokens, Context& context,
                Scratch& scratch)
      : Base(product, tokens, context, scratch), cached_(cached) {
    this->add_recent();
  }

  const Product<T>& cached() const { return cached_; }

  /// Adds the nodes of the queries after so many chunks to these, as query head h of the nodes.
  void add_nodes(const CachedNodes<T>& nodes, Index chunks, std::size_t h) {
    const Range some = this->tokens_.with_chunks({chunks, chunks + 1});
    const auto rows = part_of(std::span<const Index>(this->tokens_.queries), some.first, some.last - some.first);
    for (const auto& node : nodes) node->attend(h, cached_, this->product_, rows, this->context_, this->rows_);
  }

  using Base::finish;

 private:
  const Product<T>& cached_;
};

}  // namespace attn::detail
