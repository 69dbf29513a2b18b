/// Multipole attention: near keys exactly, far keys by clusters.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/approximator.hpp>
#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/detail/causal_multipole.hpp>
#include <attn/detail/causal_nodes.hpp>
#include <attn/detail/multipole_backward.hpp>
#include <attn/detail/multipole_fields.hpp>
#include <attn/detail/saved.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/run.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <initializer_list>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace attn {

/// How Multipole cuts tokens; under a causal mask, how it cuts each node of the past, or each chunk, as
/// docs/multipole.md says. What is not set follows from the counts of kept tokens, n_q and n_k: see
/// docs/multipole.md. Where nothing is set and exact attention costs no more, as up to some 1000 tokens, Multipole is
/// exact attention.
struct Clusters {
  std::optional<Index> num_clusters{};  ///< of keys, at least 1; as many as keys is exact attention
  std::optional<Index> num_groups{};    ///< of queries, at least 1
  std::optional<Index> num_near{};      ///< clusters that each block of queries meets exactly, at least 0; all is exact
  /// Sets of neighbouring clusters, at least 1. A group of queries sees the clusters of num_open branches; the others
  /// are one cluster each. Not set beside num_clusters: as many as clusters.
  std::optional<Index> num_branches{};
  std::optional<Index> num_open{};  ///< branches that are open to each group, at least 1; all: no branch is one cluster

  /// Whether the options are the same.
  friend bool operator==(const Clusters&, const Clusters&) = default;

  /// Throws std::invalid_argument when an option is out of range.
  void check(std::string_view who) const {
    const auto check = [&](const char* name, const std::optional<Index>& option, int least) {
      if (option) detail::check_at_least(who, name, static_cast<double>(*option), least);
    };
    check("num_clusters", num_clusters, 1);
    check("num_groups", num_groups, 1);
    check("num_near", num_near, 0);
    check("num_branches", num_branches, 1);
    check("num_open", num_open, 1);
  }
};

namespace detail {

/// Counts of Multipole for so many kept tokens: clusters, of which some make a branch, groups, of which some make a
/// region. Where all branches are open, each is one cluster, and each region one group.
struct FieldCounts {
  static constexpr double kFilled = 1.2;   ///< rows of blocks for each query
  static constexpr double kOverhead = 70;  ///< keys that clustering a key or a query is worth, and choosing

  Index clusters = 0, clusters_in_a_branch = 1, groups = 0, groups_in_a_region = 1, open = 0, near = 0;

  static FieldCounts of(const Clusters& options, Index n_q, Index n_k) {
    constexpr Index kKeys = 8, kOpen = 24, kMoreOpen = 25000, kNear = 24, kMoreNear = 20000;
    FieldCounts counts{};
    if (n_q == 0 || n_k == 0) return counts;
    const Index usual_near = kNear + kMoreNear / n_k, near = std::max(usual_near, options.num_near.value_or(0)),
                usual_open = (kOpen + kMoreOpen / n_k) * std::min(near, n_k) / usual_near;
    const bool has_branches =
        options.num_branches.has_value() || options.num_open.has_value() || !options.num_clusters.has_value();
    counts.clusters = std::min(n_k, options.num_clusters.value_or(std::max<Index>(n_k / kKeys, 1)));
    counts.open = counts.clusters;
    if (has_branches) {
      const Index branches = std::min(counts.clusters, options.num_branches.value_or(2 * root(n_k)));
      counts.clusters_in_a_branch = counts.clusters / branches;
      counts.clusters = branches * counts.clusters_in_a_branch;
      counts.open = std::min(branches, options.num_open.value_or(usual_open));
      if (counts.open == branches) {
        counts.clusters_in_a_branch = 1;
        counts.open = counts.clusters;
      }
    }
    counts.near = std::min(counts.clusters, options.num_near.value_or(std::min(counts.clusters / 2, usual_near)));
    counts.set_groups(options, n_q);
    return counts;
  }

  bool all_open() const { return open * clusters_in_a_branch == clusters; }

  /// Summaries that a query meets.
  Index field() const { return open * clusters_in_a_branch + (all_open() ? 0 : clusters / clusters_in_a_branch); }

  /// Keys that all landmarks together sum up: all of them for a region, those of open branches for a group.
  Index summarized(Index n_k) const {
    return groups * open * clusters_in_a_branch * n_k / clusters + (all_open() ? 0 : groups / groups_in_a_region * n_k);
  }

  /// What it takes for each query, in units of a key that it meets: near keys and summaries, in blocks that are not
  /// quite full; keys that are summed up; and what clustering and choosing take, as measured.
  double cost(Index n_q, Index n_k) const {
    constexpr double kSummary = 6;
    const auto q = static_cast<double>(n_q), k = static_cast<double>(n_k);
    return kFilled * static_cast<double>(field() + near * n_k / clusters) +
           kSummary * static_cast<double>(summarized(n_k)) / q + kOverhead * (1 + k / q);
  }

  /// Whether exact attention is the same, or where options are not set costs no more.
  bool exact(const Clusters& options, Index n_q, Index n_k) const {
    if (n_q == 0 || clusters >= n_k || (all_open() && near >= clusters)) return true;
    return options == Clusters{} && cost(n_q, n_k) > 0.95 * static_cast<double>(n_k);
  }

 private:
  static Index root(Index n) { return static_cast<Index>(std::ceil(std::sqrt(static_cast<double>(n)))); }

  /// Where branches are not all open, no group has more than kMost queries.
  void set_groups(const Clusters& options, Index n_q) {
    constexpr Index kMost = 48, kFewest = 16;
    const Index enough = (n_q + kMost - 1) / kMost;
    groups = std::min(n_q, options.num_groups.value_or(std::max(kFewest, enough)));
    if (all_open()) return;
    const Index wanted = std::max(groups, enough), regions = std::clamp<Index>(root(n_q) / 8, 1, wanted);
    const auto made = [&](Index in_a_region) { return (wanted + in_a_region - 1) / in_a_region * in_a_region; };
    groups_in_a_region = wanted / regions;
    for (Index more = groups_in_a_region + 1; more <= 2 * wanted / regions; ++more) {
      if (made(more) < made(groups_in_a_region)) groups_in_a_region = more;
    }
    groups = made(groups_in_a_region);
    if (groups <= n_q) return;
    groups = wanted;
    groups_in_a_region = 1;
  }
};

/// Counts of Multipole for the nodes of causal attention. Those that are set count for each node, clusters and branches
/// for each chunk.
struct CausalCounts {
  const Clusters& options;

  /// size: chunks of a node.
  NodeCounts operator()(Index size) const {
    const bool has_branches =
        options.num_branches.has_value() || options.num_open.has_value() || !options.num_clusters.has_value();
    NodeCounts counts = usual(size);
    if (options.num_clusters || options.num_branches) {
      const Index clusters = std::min(options.num_clusters.value_or(kUsualClusters), kMostClusters),
                  branches =
                      std::min(clusters, options.num_branches.value_or(std::min<Index>(clusters, kUsualBranches)));
      counts.clusters_in_a_branch = clusters / branches;
      counts.clusters = branches * counts.clusters_in_a_branch;
    }
    if (options.num_groups) counts.landmarks = *options.num_groups;
    if (options.num_groups) counts.landmarks_in_a_region = 1;
    counts.open = has_branches ? options.num_open.value_or(counts.open) : size * counts.branches();
    counts.near = options.num_near.value_or(counts.near);
    return counts;
  }

  /// Whether every key is a cluster.
  bool exact() const { return options.num_clusters.value_or(0) >= kMostClusters; }

 private:
  static constexpr Index kUsualClusters = 64, kUsualBranches = 8, kMostClusters = kChunkKeys - kSinkKeys;

  static NodeCounts usual(Index size) {
    const Index in_a_branch = size < 32 ? 8 : size < 128 ? 16 : 32;
    return {.clusters = kUsualClusters,
            .clusters_in_a_branch = in_a_branch,
            .landmarks = size == 1 ? 8 : 16,
            .landmarks_in_a_region = size < 8 ? 1 : 4,
            .open = 8,
            .near = size == 1   ? 8
                    : size == 2 ? 12
                                : 16};
  }
};

/// What a backward pass needs of a forward pass: which tokens are in which cluster and group, which branches are open
/// to each group and which clusters are near to each block, at most most_near side by side, and the log-sums of the
/// rows (n_q). exact: the method was exact attention, and lse are its log-sums.
template <class T>
struct MultipoleState {
  std::vector<Index> keys{}, key_starts{}, queries{}, query_starts{}, open{}, near{}, near_count{};
  std::vector<RowLog<T>> lse{};
  Index clusters_in_a_branch = 1, groups_in_a_region = 1, most_open = 0, most_near = 0;
  bool exact = false;

  void keep(const NestedRows& clusters, const NestedRows& groups) {
    keys.assign(clusters.parts.rows.begin(), clusters.parts.rows.end());
    key_starts.assign(clusters.parts.starts.begin(), clusters.parts.starts.end());
    queries.assign(groups.parts.rows.begin(), groups.parts.rows.end());
    query_starts.assign(groups.parts.starts.begin(), groups.parts.starts.end());
    clusters_in_a_branch = clusters.parts_in_a_set;
    groups_in_a_region = groups.parts_in_a_set;
  }

  FieldRecord<T> record(Index groups, Index blocks, const FieldSizes& sizes) {
    most_open = sizes.open;
    most_near = sizes.near;
    open.resize(static_cast<std::size_t>(groups * most_open));
    near.resize(static_cast<std::size_t>(blocks * most_near));
    near_count.resize(static_cast<std::size_t>(blocks));
    return {open.data(), near.data(), near_count.data(), most_near, lse.data()};
  }
};

/// What a cluster weighs is not at most 1, though a key may be.
template <class Kernel, class T>
Product<T> field_product(const Kernel& kernel, const Sources<T>& in, Scratch& scratch) {
  Product<T> product = make_product(kernel, in, Maximum::running, 1, scratch);
  product.bounded = false;
  return product;
}

template <class T, class Kernel>
using MultipoleSaved = Saved<MultipoleState<Arithmetic<T>>, ForwardPass<Kernel, Clusters, Clusters>>;

}  // namespace detail

/// [kappa] v, of which queries see near keys as they are and the others by clusters. For a group of queries with mean l
/// a cluster c of keys is one key, one value and one log-weight, exact at q = l:
///   r_j = softmax_{j in c}(s l.k_j + a_j)    k_c = sum r_j k_j    v_c = sum r_j v_j
///   e_c = log sum_{j in c} exp(s l.k_j + a_j) - s l.k_c
///   out(q) = sum_far exp(s q.k_c + e_c) v_c + sum_near exp(s q.k_j + a_j) v_j, divided by the same sums without v
/// with a_j the key bias, and less b |k_j|^2 for a kernel of bias b; raw rows are not divided. Near are, for each block
/// of at most some dozens of queries of a group, the clusters of largest error term: weight (root mean square over the
/// queries) x spread of scores x spread of values. Branches of clusters that are not open to a group, for their error
/// terms are small, are one far cluster each, summed up at the mean of a region of groups.
/// Clusters and groups come of balanced bisection along principal directions. All weights are positive: a row of out
/// lies within the range of the values.
/// Under a causal mask the same fields come of nodes of the past, each built from its own tokens alone, and recent keys
/// are seen as they are: see docs/multipole.md, and causal_multipole.hpp. No row depends on what comes after it.
/// With the default counts O((sqrt n_k + sqrt n_q) (n_q + n_k) (d + d_v)) time; O(n_k (d + d_v)) memory,
/// for keys and values in the order of their clusters, and 16 regions' summaries of all branches. The backward pass
/// takes clusters, groups, open branches and near clusters as constants.
template <class T, ScoreKernel Kernel = SoftmaxKernel>
class Multipole : public MethodBase<Multipole<T, Kernel>, T, detail::MultipoleSaved<T, Kernel>> {
 public:
  using Saved = detail::MultipoleSaved<T, Kernel>;                                ///< what backward needs
  static constexpr std::string_view kName = "multipole";                          ///< in tables and error messages
  static constexpr detail::MaskSupport kMasks{.causal = true, .key_bias = true};  ///< which it takes

  /// How tokens are cut, and the kernel.
  explicit constexpr Multipole(Clusters clusters = {},  // write {{.num_near = 64}}
                               Kernel kernel = {})
      : clusters_(clusters), kernel_(kernel) {}
  Multipole(std::initializer_list<detail::NoOption>) = delete;

  /// @{ As MethodBase says.
  void check(const detail::Sources<T>& in) const {
    detail::check_kernel<T>(kName, kernel_, in.q.cols());
    clusters_.check(kName);
  }

  void attend(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context, Saved* saved) const {
    if (in.heads > 1) return attend_heads(in, out, context);
    if (in.mask.causal != Causal::none) return attend_causal(in, out, context, saved);
    const Index n_q = detail::count_kept(in.q.rows(), detail::kept_queries(in));
    const Index n_k = detail::count_kept(in.k.rows(), detail::kept_keys(in));
    const auto counts = detail::FieldCounts::of(clusters_, n_q, n_k);
    const bool exact = counts.exact(clusters_, n_q, n_k);
    if (saved != nullptr) {
      saved->exact = exact;
      saved->lse.resize(static_cast<std::size_t>(in.q.rows()));
    }
    if (!exact) return attend_fields(in, counts, out, context, saved);
    attend_exactly(in, out, context, saved);
  }

  /// Whether heads that share keys share their clusters: see PreparesKeys.
  bool prepares_keys(Index n_q, Index n_k) const {
    return !detail::FieldCounts::of(clusters_, n_q, n_k).exact(clusters_, n_q, n_k);
  }

  auto pass(const detail::Sources<T>& in) const {
    return detail::ForwardPass<Kernel, Clusters, Clusters>::of(kernel_, in, clusters_, clusters_);
  }

  void differentiate(const Inputs<T>& in, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                     const Saved& saved, const Gradients<T>& gradients, Context& context) const {
    if (saved.exact) return detail::multiply_backward<Kernel, T>(kernel_, in, out, saved.lse, dout, gradients, context);
    using namespace detail;
    Scratch scratch = context.scratch();
    const Sources<T> from = sources(in);
    multipole_backward<T>(product_of(from, scratch), saved, out, dout, gradients, context);
  }

  constexpr auto wide() const
    requires NarrowScalar<T>
  {
    return Multipole<float, Kernel>(clusters_, kernel_);
  }
  /// @}

 private:
  template <class>
  friend struct detail::Distributed;

  static constexpr Index kWave = 16;  ///< regions whose summaries of all branches are kept at once

  detail::Product<T> product_of(const detail::Sources<T>& in, Scratch& scratch) const {
    return detail::field_product(kernel_, in, scratch);
  }

  void attend_exactly(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context,
                      Saved* saved) const {
    detail::multiply<Kernel, T>(kernel_, in, out, {nullptr, saved == nullptr ? nullptr : saved->lse.data()}, context);
  }

  /// Exact attention where nothing is set and no query has a complete chunk before it. Without complete chunks the
  /// result is that of exact attention anyway, and so are gradients.
  void attend_causal(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context,
                     Saved* saved) const {
    using namespace detail;
    Scratch scratch = context.scratch();
    Product<T> product = product_of(in, scratch);
    if (product.kernel.center != nullptr) product.kernel.center = early_center(in, scratch);
    const CausalCounts counts{clusters_};
    CausalMultipole<T, CausalCounts> method(product, counts, context, scratch);
    const bool exact = counts.exact() || (clusters_ == Clusters{} && !method.has_nodes());
    if (saved != nullptr) {
      if (!exact && method.has_nodes()) {
        refuse(kName, "under causal masks there is no backward pass for more than %td keys", kChunkKeys + kRecentKeys);
      }
      saved->exact = true;
      saved->lse.resize(static_cast<std::size_t>(in.q.rows()));
    }
    if (exact) return attend_exactly(in, out, context, saved);
    method.attend(out, saved == nullptr ? nullptr : saved->lse.data());
  }

  /// Queries of several heads, one head's after another's, bitwise as head by head: keys are clustered once.
  void attend_heads(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context) const {
    using namespace detail;
    const Index n_q = in.q.rows() / in.heads;
    const auto head = [&](Index h) {
      Sources<T> one = in;
      one.heads = 1;
      one.q = in.q.middle_rows(h * n_q, n_q);
      if (!in.mask.keep_query.empty()) one.mask.keep_query = part_of(in.mask.keep_query, h * n_q, n_q);
      return one;
    };
    const Sources<T> first = head(0);
    const Index kept_q = count_kept(n_q, kept_queries(first)), kept_k = count_kept(in.k.rows(), kept_keys(first));
    const auto counts = FieldCounts::of(clusters_, kept_q, kept_k);
    if (in.mask.causal != Causal::none || counts.exact(clusters_, kept_q, kept_k)) {
      for (Index h = 0; h < in.heads; ++h) attend(head(h), out.middle_rows(h * n_q, n_q), context, nullptr);
      return;
    }
    Scratch scratch = context.scratch();
    const auto keys = clusters_of(product_of(first, scratch), counts, context, scratch);
    for (Index h = 0; h < in.heads; ++h) {
      attend_clusters(head(h), keys, counts, out.middle_rows(h * n_q, n_q), context, nullptr);
    }
  }

  /// Keys in clusters. They depend on no query.
  detail::KeyClusters<T> clusters_of(const detail::Product<T>& product, const detail::FieldCounts& counts,
                                     Context& context, Scratch& scratch) const {
    using namespace detail;
    const Sources<T>& in = product.in;
    const NestedRows clusters =
        cluster_rows(in.k, kept_keys(in), counts.clusters, counts.clusters_in_a_branch, context, scratch);
    return KeyClusters<T>::make(in, product.kernel, clusters, counts.all_open(), context, scratch);
  }

  void attend_fields(const detail::Sources<T>& in, const detail::FieldCounts& counts, const detail::ResultRows<T>& out,
                     Context& context, Saved* saved) const {
    Scratch scratch = context.scratch();
    const auto keys = clusters_of(product_of(in, scratch), counts, context, scratch);
    attend_clusters(in, keys, counts, out, context, saved);
  }

  void attend_clusters(const detail::Sources<T>& in, const detail::KeyClusters<T>& keys,
                       const detail::FieldCounts& counts, const detail::ResultRows<T>& out, Context& context,
                       Saved* saved) const {
    using namespace detail;
    Scratch scratch = context.scratch();
    const Product<T> product = product_of(in, scratch);
    const NestedRows& clusters = keys.tree;
    const NestedRows groups =
        cluster_rows(in.q, kept_queries(in), counts.groups, counts.groups_in_a_region, context, scratch);
    const QueryBlocks blocks(groups.parts, kTileWidth<T>, scratch);
    const FieldSizes sizes{counts.open, counts.near};
    FieldRecord<T> record{};
    if (saved != nullptr) {
      saved->keep(clusters, groups);
      record = saved->record(groups.parts.count(), blocks.count(), sizes);
    }
    if (static_cast<Index>(groups.parts.rows.size()) < out.rows()) out.set_zero();
    const auto queries = QueryGroups<T>::make(in, product.kernel, groups, context, scratch);
    auto* const runners =
        scratch.make<FieldRunner<T>>(context.workers(), product, keys, queries, blocks, sizes, scratch);
    const Index wave = std::min(groups.sets(), counts.all_open() ? groups.sets() : kWave),
                branches = counts.all_open() ? 0 : clusters.sets();
    const auto summaries = Summaries<T>::make(wave * branches, keys.tokens.cols(), scratch);
    for (Range some{0, 0}; some.first < groups.sets(); some.first = some.last) {
      some.last = std::min(groups.sets(), some.first + wave);
      context.for_each(branches, [&](Index b, int worker) { runners[worker].summarize(b, some, summaries); });
      context.for_each(some.last - some.first, [&](Index r, int worker) {
        runners[worker].attend(some.first + r, summaries.part(r * branches, branches), out, record);
      });
    }
  }

  Clusters clusters_;
  Kernel kernel_;
};

}  // namespace attn
