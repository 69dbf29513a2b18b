/// Multipole attention of tokens that are spread over ranks: the keys of each rank are clustered by themselves,
/// wherever they arrive, and what queries make of them is merged.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/landmark_sums.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/run.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>
#include <attn/mpi/exact.hpp>
#include <attn/mpi/ranks.hpp>
#include <attn/mpi/shares.hpp>
#include <attn/multipole.hpp>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numbers>
#include <optional>
#include <span>
#include <string_view>

namespace attn::detail {

inline SoftmaxKernel with_rows(const SoftmaxKernel& kernel, Rows) {
  return kernel;
}

/// states <- those of rows divided by their sums, weighted, whose log-sums are given: log sum_j kappa_ij.
template <class T>
void set_states(const RowStates<T>& states, std::span<const double> lse) {
  for (std::size_t i = 0; i < lse.size(); ++i) {
    const double log_sum = std::numbers::log2e * lse[i];
    const bool sees_any = !is_negative_infinity(lse[i]);
    states.maximum[i] = sees_any ? static_cast<T>(log_sum) : kNoMaximum<T>;
    states.sum[i] = sees_any ? static_cast<T>(std::exp2(log_sum - static_cast<double>(states.maximum[i]))) : T(0);
    T* const row = row_of(states.weighted, static_cast<Index>(i));
    scale_row(states.sum[i], row, row, states.weighted.cols());
  }
}

template <class T, ScoreKernel Kernel>
  requires std::same_as<Kernel, SoftmaxKernel> || std::same_as<Kernel, GaussianKernel>
struct Distributed<Multipole<T, Kernel>> {
  using Method = Multipole<T, Kernel>;
  using Wide = Arithmetic<T>;
  struct Saved {};

  static void add_options(const Method& method, Index d, Fingerprint& to) {
    to.add(score_parameters(method.kernel_, d));
    const Clusters& c = method.clusters_;
    for (const auto& option : {c.num_clusters, c.num_groups, c.num_near, c.num_branches, c.num_open})
      to.add(static_cast<std::uint64_t>(option.value_or(-1)));
  }

  static void forward(const Method& method, const Inputs<T>& in, const MatrixRef<T>& out, const Shares& shares,
                      Agreement& agreement, Context& context, const Saved*) {
    const Multipole<Wide, Kernel> divided(method.clusters_, with_rows(method.kernel_, Rows::normalized));
    typename Multipole<Wide, Kernel>::Saved rows;
    constexpr Index kAllQueries = std::numeric_limits<Index>::max();  // at once: keys are clustered for each part
    attend_ring(
        method.kernel_, in, out, shares, agreement, context, nullptr,
        [&](const Inputs<T>& some, const RowStates<Wide>& to) { set_partial(divided, some, rows, to, context); },
        kAllQueries);
  }

 private:
  /// to <- the states of queries and keys of some; rows: memory for what the method saves.
  static void set_partial(const Multipole<Wide, Kernel>& divided, const Inputs<T>& some,
                          typename Multipole<Wide, Kernel>::Saved& rows, const RowStates<Wide>& to, Context& context) {
    Scratch scratch = context.scratch();
    const Sources<Wide> from = arithmetic_sources<RowMask>(some, scratch);
    divided.attend(from, ResultRows<Wide>(to.weighted), context, &rows);
    const std::span<double> lse = scratch.array<double>(from.q.rows());
    Scratch temporary = scratch.nested();
    const std::span<const double> origins = log_origins(with_rows(divided.kernel_, Rows::normalized), from, temporary);
    for (std::size_t i = 0; i < lse.size(); ++i) {
      const RowLog<Wide>& relative = rows.lse[i];
      lse[i] =
          static_cast<double>(relative.value) + std::numbers::ln2 * static_cast<double>(relative.base) + origins[i];
      if (!keeps_query(from, static_cast<Index>(i))) lse[i] = -std::numeric_limits<double>::infinity();
    }
    set_states(to, lse);
  }
};

}  // namespace attn::detail
