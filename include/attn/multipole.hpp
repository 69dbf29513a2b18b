/// Multipole attention: near keys exactly, far keys by clusters.
#pragma once

#include <attn/approximator.hpp>
#include <attn/context.hpp>
#include <attn/detail/bisection.hpp>
#include <attn/detail/multipole_backward.hpp>
#include <attn/detail/multipole_fields.hpp>
#include <attn/detail/saved.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/problem.hpp>
#include <attn/engine/run.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <optional>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

namespace attn {

/// How Multipole cuts tokens. Counts that are not set follow from those of the kept tokens: n_k keys are cut into
/// 4 sqrt n_k clusters of nearly equal size, n_q queries into sqrt n_q groups, rounded up to a multiple of 16 and at
/// least 48, and 20 clusters, but
/// at most a quarter of all, are near: 20 n_k / (4 sqrt n_k) keys. Where nothing is set and exact attention costs no
/// more, as up to some 1000 tokens, Multipole is exact attention.
struct Clusters {
  std::optional<Index> num_clusters{};  ///< of keys, at least 1; as many as keys is exact attention
  std::optional<Index> num_groups{};    ///< of queries, at least 1
  std::optional<Index> num_near{};      ///< clusters that each block of queries meets exactly, at least 0; all is exact

  /// Whether the options are the same.
  friend bool operator==(const Clusters&, const Clusters&) = default;

  /// Throws std::invalid_argument when an option is out of range.
  void check(std::string_view who) const {
    if (num_clusters) detail::check_at_least(who, "num_clusters", static_cast<double>(*num_clusters), 1);
    if (num_groups) detail::check_at_least(who, "num_groups", static_cast<double>(*num_groups), 1);
    if (num_near) detail::check_at_least(who, "num_near", static_cast<double>(*num_near), 0);
  }
};

namespace detail {

/// Counts of Multipole for so many kept tokens.
struct FieldCounts {
  Index clusters, groups, near;

  static FieldCounts of(const Clusters& options, Index n_q, Index n_k) {
    constexpr Index kNear = 20, kFewestGroups = 48, kGroupStep = 16;
    const auto root = [](Index n) { return static_cast<Index>(std::ceil(std::sqrt(static_cast<double>(n)))); };
    const Index groups = std::max(kFewestGroups, (root(n_q) + kGroupStep - 1) / kGroupStep * kGroupStep);
    FieldCounts counts{};
    counts.clusters = std::min(n_k, options.num_clusters.value_or(4 * root(n_k)));
    counts.groups = std::min(n_q, options.num_groups.value_or(groups));
    counts.near = std::min(options.num_near.value_or(std::min(kNear, counts.clusters / 4)), counts.clusters);
    return counts;
  }

  /// Whether exact attention is the same, or where options are not set costs no more. In units of a key that a query
  /// meets: near keys and clusters, in blocks that are not quite full; every group's summaries of all keys; and what
  /// clustering and choosing take, as measured.
  bool exact(const Clusters& options, Index n_q, Index n_k) const {
    constexpr double kFilled = 1.2, kSummary = 1.5, kOverhead = 280;
    if (n_q == 0 || clusters >= n_k || near >= clusters) return true;
    if (options != Clusters{}) return false;
    const auto keys_a_query = static_cast<double>(n_k) / static_cast<double>(n_q);
    const double cost = kFilled * static_cast<double>(near * n_k / clusters + clusters) +
                        kSummary * static_cast<double>(groups) * keys_a_query + kOverhead * (1 + keys_a_query);
    return cost > 0.95 * static_cast<double>(n_k);
  }
};

/// What a backward pass needs of a forward pass: which tokens are in which cluster and group, which clusters are near
/// to each block, at most most_near side by side, and the log-sums of the rows (n_q). exact: the method was exact
/// attention, and lse are its log-sums.
template <class T>
struct MultipoleState {
  std::vector<Index> keys{}, key_starts{}, queries{}, query_starts{}, near{}, near_count{};
  std::vector<RowLog<T>> lse{};
  Index most_near = 0;
  bool exact = false;

  void keep(const ClusteredRows& clusters, const ClusteredRows& groups) {
    keys.assign(clusters.rows.begin(), clusters.rows.end());
    key_starts.assign(clusters.starts.begin(), clusters.starts.end());
    queries.assign(groups.rows.begin(), groups.rows.end());
    query_starts.assign(groups.starts.begin(), groups.starts.end());
  }

  FieldRecord<T> record(Index blocks, Index num_near) {
    most_near = num_near;
    near.resize(static_cast<std::size_t>(blocks * num_near));
    near_count.resize(static_cast<std::size_t>(blocks));
    return {near.data(), near_count.data(), num_near, lse.data()};
  }
};

template <class T, class Kernel>
using MultipoleSaved = Saved<MultipoleState<Arithmetic<T>>, ForwardPass<Kernel, Clusters, Clusters>>;

}  // namespace detail

/// [kappa] v, of which queries see near keys as they are and the others by clusters. For a group of queries with mean l
/// a cluster c of keys is one key, one value and one log-weight, exact at q = l:
///   r_j = softmax_{j in c}(s l.k_j + a_j)    k_c = sum r_j k_j    v_c = sum r_j v_j
///   e_c = log sum_{j in c} exp(s l.k_j + a_j) - s l.k_c
///   out(q) = sum_far exp(s q.k_c + e_c) v_c + sum_near exp(s q.k_j + a_j) v_j, divided by the same sums without v
/// with a_j the key bias, and less b |k_j|^2 for a kernel of bias b; raw rows are not divided. Near are, for each block
/// of at most some dozens of queries of a group, the clusters of largest weight x spread of scores x spread of values.
/// Clusters and groups come of balanced bisection along principal directions. All weights are positive: a row of out
/// lies within the range of the values.
/// Not causal. With the default counts O((sqrt n_k + sqrt n_q) (n_q + n_k) (d + d_v)) time; O(n_k (d + d_v)) memory,
/// for keys and values in the order of their clusters, and 48 groups' summaries of all clusters. The backward pass
/// takes clusters, groups and near clusters as constants.
template <class T, ScoreKernel Kernel = SoftmaxKernel>
class Multipole : public MethodBase<Multipole<T, Kernel>, T, detail::MultipoleSaved<T, Kernel>> {
 public:
  using Saved = detail::MultipoleSaved<T, Kernel>;                ///< what backward needs
  static constexpr std::string_view kName = "multipole";          ///< in tables and error messages
  static constexpr detail::MaskSupport kMasks{.key_bias = true};  ///< which it takes

  /// How tokens are cut, and the kernel.
  explicit constexpr Multipole(Clusters clusters = {}, Kernel kernel = {}) : clusters_(clusters), kernel_(kernel) {}

  /// @{ As MethodBase says.
  void check(const detail::Sources<T>& in) const {
    detail::check_kernel<T>(kName, kernel_, in.q.cols());
    clusters_.check(kName);
  }

  void attend(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context, Saved* saved) const {
    const Index n_q = detail::count_kept(in.q.rows(), detail::kept_queries(in));
    const Index n_k = detail::count_kept(in.k.rows(), detail::kept_keys(in));
    const auto counts = detail::FieldCounts::of(clusters_, n_q, n_k);
    const bool exact = counts.exact(clusters_, n_q, n_k);
    if (saved != nullptr) {
      saved->exact = exact;
      saved->lse.resize(static_cast<std::size_t>(in.q.rows()));
    }
    if (!exact) return attend_fields(in, counts, out, context, saved);
    detail::multiply<Kernel, T>(kernel_, in, out, {nullptr, saved == nullptr ? nullptr : saved->lse.data()}, context);
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
  /// What a cluster weighs is not at most 1, though a key may be.
  detail::Product<T> product_of(const detail::Sources<T>& in, Scratch& scratch) const {
    detail::Product<T> product = detail::make_product(kernel_, in, detail::Maximum::running, 1, scratch);
    product.bounded = false;
    return product;
  }

  void attend_fields(const detail::Sources<T>& in, const detail::FieldCounts& counts, const detail::ResultRows<T>& out,
                     Context& context, Saved* saved) const {
    using namespace detail;
    Scratch scratch = context.scratch();
    const Product<T> product = product_of(in, scratch);
    const ClusteredRows clusters = cluster_rows(in.k, kept_keys(in), counts.clusters, context, scratch),
                        groups = cluster_rows(in.q, kept_queries(in), counts.groups, context, scratch);
    const QueryBlocks blocks(groups, kTileWidth<T>, scratch);
    FieldRecord<T> record{};
    if (saved != nullptr) {
      saved->keep(clusters, groups);
      record = saved->record(blocks.count(), counts.near);
    }
    if (static_cast<Index>(groups.rows.size()) < out.rows()) out.set_zero();
    const auto keys = KeyClusters<T>::make(in, product.kernel, clusters, context, scratch);
    const auto queries = QueryGroups<T>::make(in, product.kernel, groups, context, scratch);
    const Index waves = (groups.count() + kTileWidth<T> - 1) / kTileWidth<T>, workers = context.workers();
    const Index wave = (groups.count() + waves - 1) / waves;
    auto summaries = Summaries<T>::make(wave, keys, scratch);
    auto* const summers = scratch.make<ClusterRunner<T>>(workers, in, keys, scratch);
    auto* const fields = scratch.make<FieldRunner<T>>(workers, product, keys, queries, counts.near, scratch);
    for (Index first = 0; first < groups.count(); first += wave) {
      const Range some{first, std::min(first + wave, groups.count())};
      summaries.look_from(queries, some, product.kernel.scale);
      context.for_each(keys.clusters.count(), [&](Index c, int worker) { summers[worker].summarize(c, summaries); });
      context.for_each(some.last - some.first, [&](Index lane, int worker) {
        for (Index b = 0; b < blocks.count(first + lane); ++b) {
          fields[worker].attend(blocks.block(first + lane, b, lane), summaries, out, record);
        }
      });
    }
  }

  Clusters clusters_;
  Kernel kernel_;
};

}  // namespace attn
