/// The two fields of multipole attention, far and near, as blocks of queries meet them.
///
///   for each region of queries:       summaries of all branches for the region's landmark
///     for each group:                 the branches of the largest error terms are open:
///                                     summaries of their clusters for the group's landmark
///       for each block of queries:    of these clusters those of the largest error terms are near
///         score[c] = s q.k_c + e_c    far: branches that are not open, clusters that are not near, by their summary
///         score[j] = s q.k_j + a_j    keys of near clusters, as they are
///
/// An error term is root mean square of the queries' weights x spread of scores about the landmark's x spread of
/// values.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/detail/cluster_summaries.hpp>
#include <attn/detail/field_choice.hpp>
#include <attn/detail/field_tokens.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/query_strip.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/strip.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <span>
#include <type_traits>

namespace attn::detail {

/// What a forward pass keeps for a backward pass: open branches of each group, as many side by side as are open to
/// each; near clusters of each block, at most most_near side by side; log-sums of all queries. Numbers are ascending.
/// Null if nothing is wanted.
template <class T, class Count = Index>
struct FieldRecord {
  Count *open, *near, *near_count;
  Index most_near;
  std::conditional_t<std::is_const_v<Count>, const RowLog<T>, RowLog<T>>* lse;
};

/// to <- n elements, whole packets. A call of a library's copy would take as long as the copy.
template <class T>
inline void copy_packets(const T* from, Index n, T* to) {
  for (Index c = 0; c < n; c += kLanes<T>) store(to + c, load(from + c));
}

/// A group of queries: the branches that are open to it, the summaries of their clusters, and its strips.
template <class T>
struct GroupField {
  Index* open;
  Summaries<T> clusters;
  FieldStrip<T>* strips;

  GroupField(const KeyClusters<T>& keys, const FieldSizes& sizes, Index strip_count, Index branches, Scratch& scratch)
      : open(scratch.elements<Index>(sizes.open)),
        clusters(Summaries<T>::make(sizes.open * keys.tree.parts_in_a_set, keys.tokens.cols(), scratch)),
        strips(scratch.make<FieldStrip<T>>(strip_count, keys.d, keys.d_v, branches, scratch)) {}
};

/// Computes regions of queries. One for each worker.
template <class T>
class FieldRunner : FieldChoice<T> {
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
  using Base::weights_;

 public:
  FieldRunner(const Product<T>& product, const KeyClusters<T>& keys, const QueryGroups<T>& groups,
              const QueryBlocks& blocks, const FieldSizes& sizes, Scratch& scratch)
      : Base(keys, sizes, scratch),
        product_(product),
        groups_(groups),
        blocks_(blocks),
        kernel_(product.in, Maximum::running, nullptr, scratch),
        near_keys_(keys, scratch),
        values_(scratch.matrix<T>(std::max(branch_count_, cluster_count_), padded<T>(keys.d_v))),
        rows_(scratch.elements<T>(kLanes<T> * std::max(keys.d, keys.d_v))) {
    const Index strips = branch_count_ == 0 ? 1 : blocks.most();
    fields_ = scratch.make<GroupField<T>>(2, keys, sizes, strips, branch_count_, scratch);
  }

  /// Branch b as the landmarks of some regions see it, one region's summaries of all branches after another's.
  void summarize(Index b, Range regions, const Summaries<T>& to) {
    const auto view = [&](Index r) {
      return LandmarkView<T>{row_of(groups_.region_means, r), to, (r - regions.first) * branch_count_ + b};
    };
    Index r = regions.first;
    for (; r + 1 < regions.last; r += 2) summarizer_.summarize_branch(view(r), view(r + 1), b);
    if (r < regions.last) summarizer_.summarize_branch(view(r), b);
  }

  /// Rows of out of one of the region's groups, likewise.
  void attend_one(Index region, Index group, const Summaries<T>& branches, const ResultRows<T>& out) {
    std::construct_at(&branches_, branches);
    turn_to(0);
    choose_open(region, group);
    summarize_clusters({group, group + 1});
    attend_group(group, out, {});
  }

  /// Rows of out of the region's queries. branches: what its landmark knows of all branches; not used if all are open.
  /// Two groups at a time, which have most open branches in common.
  void attend(Index region, const Summaries<T>& branches, const ResultRows<T>& out, const FieldRecord<T>& record) {
    std::construct_at(&branches_, branches);
    const Range groups = groups_.tree.parts_of(region);
    for (Range some{groups.first, groups.first}; some.first < groups.last; some.first = some.last) {
      some.last = std::min(groups.last, some.first + 2);
      for (Index group = some.first; group < some.last; ++group) {
        turn_to(group - some.first);
        choose_open(region, group);
      }
      summarize_clusters(some);
      for (Index group = some.first; group < some.last; ++group) {
        turn_to(group - some.first);
        attend_group(group, out, record);
      }
    }
  }

 private:
  void turn_to(Index i) {
    open_ = fields_[i].open;
    strips_ = fields_[i].strips;
    std::construct_at(&clusters_, fields_[i].clusters);
  }

  /// Of one group, or of two.
  void summarize_clusters(Range groups) {
    const auto view = [&](Index i) {
      return LandmarkView<T>{row_of(groups_.means, groups.first + i), fields_[i].clusters, 0};
    };
    const auto open = [&](Index i) { return numbers(fields_[i].open, sizes_.open); };
    if (groups.last - groups.first == 2) {
      summarizer_.summarize_clusters(view(0), open(0), view(1), open(1));
    } else {
      summarizer_.summarize_clusters(view(0), open(0));
    }
  }

  /// Fetches what a group's queries will read or write.
  void fetch_rows(const MemoryRows& rows, Index group) const {
    const Range queries = groups_.tree.parts.range(group);
    for (Index i = queries.first; i < queries.last; ++i) fetch_row(rows, groups_.tree.parts.rows.data()[i]);
  }

  void attend_group(Index group, const ResultRows<T>& out, const FieldRecord<T>& record) {
    fetch_rows(out.memory(), group);
    if (record.open != nullptr) std::copy_n(open_, sizes_.open, record.open + group * sizes_.open);
    for (Index b = 0; b < blocks_.count(group); ++b) {
      FieldStrip<T>& strip = strips_[branch_count_ == 0 ? 0 : b];
      if (branch_count_ == 0) load_queries(strip, blocks_.block(group, b));
      attend_strip(strip, group, out, record);
    }
  }

  void load_queries(FieldStrip<T>& strip, const QueryBlock& block) const {
    strip.block = block;
    strip.load(product_, groups_.tree.parts.rows.data() + block.queries.first, block.queries.last - block.queries.first,
               rows_);
  }

  Index query(const FieldStrip<T>& strip, Index i) const {
    return groups_.tree.parts.rows.data()[strip.block.queries.first + i];
  }

  /// open_ <- the branches that are open to a group, whose strips get what weights all branches have for them.
  void choose_open(Index region, Index group) {
    if (branch_count_ == 0) return this->open_all();
    fetch_rows(product_.in.q.memory(), std::min(group + 1, groups_.tree.parts.count() - 1));
    this->begin_terms(branch_count_);
    for (Index b = 0; b < blocks_.count(group); ++b) {
      FieldStrip<T>& strip = strips_[b];
      load_queries(strip, blocks_.block(group, b));
      strip.clear(keys_.d_v);
      this->weigh_branches(strip, row_of(groups_.region_means, region));
    }
    this->choose_branches();
  }

  void attend_strip(FieldStrip<T>& strip, Index group, const ResultRows<T>& out, const FieldRecord<T>& record) {
    if (branch_count_ == 0) {
      strip.clear(keys_.d_v);
    } else {
      add_branches(strip);
    }
    T *const total = lanes_ + kTileWidth<T>, *const correction = total + kTileWidth<T>;
    this->weigh_clusters(strip, correction, total);
    const Index count = this->choose_near(strip, row_of(groups_.means, group), total);
    add_clusters(strip, count, correction);
    add_near(strip, count);
    write(strip, out);
    if (record.lse == nullptr) return;
    record.near_count[strip.block.number] = count;
    std::copy_n(near_, count, record.near + strip.block.number * record.most_near);
    for (Index i = 0; i < strip.queries.count; ++i) {
      record.lse[query(strip, i)] = {row_log_sum(strip.state.maximum[i], strip.state.sum[i]), T(0)};
    }
  }

  /// The state <- the branches that are not open, by their weights.
  void add_branches(const FieldStrip<T>& strip) const {
    const LaneState<T>& state = strip.state;
    std::fill_n(state.sum, strip.lanes(), T(0));
    std::fill_n(lanes_, strip.lanes(), T(1));
    add_others(strip, branches_, branch_count_, numbers(open_, sizes_.open), strip.weights, lanes_);
    for (Index i = 0; i < strip.lanes(); ++i) {
      if (state.sum[i] == 0) state.maximum[i] = kNoMaximum<T>;
    }
  }

  /// The state's weighted <- correction weighted + the values of count summaries but for some, by their weights, which
  /// are moved up; its sum follows.
  void add_others(const FieldStrip<T>& strip, const Summaries<T>& summaries, Index count, std::span<const Index> some,
                  T* weights, T* correction) const {
    const Index lanes = strip.lanes();
    Index others = 0;
    for (Index c = 0; c < count; ++c) {
      if (!some.empty() && some.front() == c) {
        some = some.subspan(1);
        continue;
      }
      copy_packets(row_of(summaries.tokens, c) + keys_.value_offset(), values_.cols(), row_of(values_, others));
      if (others < c) copy_packets(weights + c * lanes, lanes, weights + others * lanes);
      ++others;
    }
    add_sums(strip, others, weights);
    Index first = 0;
    do {  // once even where there are none: for the correction
      with_packets<kTilePackets>(strip.queries.packets, [&](auto packets) {
        add_values<packets>(row_of(values_, first), values_.cols(), keys_.d_v, weights + first * lanes,
                            std::min(others - first, kTileKeys<T>), correction, strip.state.weighted, {});
      });
      std::fill_n(correction, lanes, T(1));
      first += kTileKeys<T>;
    } while (first < others);
  }

  void add_sums(const FieldStrip<T>& strip, Index count, const T* weights) const {
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      auto total = broadcast(T(0));
      for (Index c = 0; c < count; ++c) total = total + load(weights + c * strip.lanes() + p);
      store(strip.state.sum + p, load(strip.state.sum + p) + total);
    }
  }

  /// The clusters in open branches that are far.
  void add_clusters(const FieldStrip<T>& strip, Index near_count, T* correction) const {
    add_others(strip, clusters_, cluster_count_, numbers(near_, near_count), weights_, correction);
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      store(strip.state.sum + p, load(strip.state.sum + p) + load(strip.silent + p));
    }
  }

  void add_near(const FieldStrip<T>& strip, Index count) const {
    for (Index i = 0; i < count; ++i) near_[i] = this->cluster(near_[i]);
    near_keys_.for_each_tile(numbers(near_, count), [&](const KeyTile<T>& tile) {
      kernel_.add(strip.queries, strip.state, tile, CausalLimits::kNone, {});
    });
  }

  void write(const FieldStrip<T>& strip, const ResultRows<T>& out) const {
    RowScales<T> scales;
    product_.set_scales(0, strip.state, strip.queries.norm, strip.lanes(), &scales);
    for (Index p = 0; p < strip.lanes(); p += kLanes<T>) {
      T* rows[kLanes<T>];
      for (Index i = 0; i < kLanes<T>; ++i) {
        rows[i] = p + i < strip.queries.count ? out.row(query(strip, p + i), rows_ + i * keys_.d_v) : nullptr;
      }
      unpack_rows(strip.state.weighted + p, strip.lanes(), keys_.d_v, load(scales.first + p), rows);
      for (Index i = 0; i < kLanes<T>; ++i) {
        if (rows[i] == nullptr) continue;
        if (scales.twice) scale_row(scales.second[p + i], rows[i], rows[i], keys_.d_v);
        out.finish_row(query(strip, p + i), rows[i]);
      }
    }
  }

  const Product<T>& product_;
  const QueryGroups<T>& groups_;
  const QueryBlocks& blocks_;
  StripKernel<T> kernel_;
  NearKeys<T> near_keys_;
  MatrixRef<T> values_;  ///< of far summaries
  T* rows_;
  GroupField<T>* fields_;  ///< two, of groups that are computed together
  FieldStrip<T>* strips_;
};

}  // namespace attn::detail
