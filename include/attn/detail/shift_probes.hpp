/// What spectral shifting learns from some rows whose attention it computes exactly.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/shifted_rows.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <span>

namespace attn::detail {

/// Probed rows floor((2 j + 1) n / (2 r)) of the n kept ones, and the exact attention of each: its output and its log-sum.
template <class T>
struct ShiftProbes {
  std::span<const Index> ranks;
  MatrixRef<T> exact;
  std::span<T> lse;
};

template <class T>
ShiftProbes<T> probe_rows(const SoftmaxKernel& kernel, Index num_probes, const Sources<T>& in, const ShiftFactors<T>& factors,
                          Context& context, Scratch& scratch) {
  const auto n = static_cast<Index>(factors.rows.size()), r = std::min(num_probes, n);
  const std::span<Index> ranks = scratch.array<Index>(r);
  MatrixRef<T> queries = scratch.matrix<T>(r, in.q.cols());
  const ShiftProbes<T> probes{ranks, scratch.matrix<T>(r, in.v.cols()), scratch.array<T>(r)};
  for (Index j = 0; j < r; ++j) {
    const Index rank = (2 * j + 1) * n / (2 * r);
    ranks[static_cast<std::size_t>(j)] = rank;
    in.q.copy_row(factors.rows[static_cast<std::size_t>(rank)], queries.row(j).data());
  }
  multiply<SoftmaxKernel, T>(kernel, {queries, in.k, in.v, keys_only(in.mask)}, probes.exact, probes.lse.data(), context);
  return probes;
}

/// delta of the scalar mode: mean(s - g) / max(mean(rho - g), .05) over the probed rows.
template <class T>
T probed_shift(const ShiftProbes<T>& probes, const Sources<T>& in, const ShiftFactors<T>& factors, const ShiftPanels<T>& panels,
               Context& context) {
  Scratch scratch = context.scratch();
  const ShiftedRows<T> found(in, factors, panels, probes.ranks, scratch);
  T wanted = 0, available = 0;
  for (Index j = 0; j < probes.exact.rows(); ++j) {
    const auto at = static_cast<std::size_t>(j);
    wanted += std::exp(found.own_score[at] - probes.lse[at]) - found.diagonal[at];
    available += found.row_sum[at] - found.diagonal[at];
  }
  const T r = static_cast<T>(probes.exact.rows());
  return std::clamp<T>(wanted / r / std::max<T>(available / r, T(0.05)), 0, 1);
}

/// t of the row mode: with a = R - N v and b = S v - N v on the probed rows, sum a.b / sum a.a less one standard error.
template <class T>
T fit_gate(const ShiftProbes<T>& probes, const Sources<T>& in, const ShiftFactors<T>& factors, const ShiftPanels<T>& panels,
           Context& context) {
  Scratch scratch = context.scratch();
  const ShiftedRows<T> found(in, factors, panels, probes.ranks, scratch);
  const Index r = probes.exact.rows();
  MatrixRef<T> plain = scratch.matrix<T>(r, in.v.cols());
  const T one = 1;
  found.multiply_values({&one, 0}, plain);
  T* buffer = scratch.elements<T>(in.v.cols());
  const std::span<T> along = scratch.array<T>(r), size = scratch.array<T>(r);
  T total_along = 0, total_size = 0, squares = 0;
  for (Index j = 0; j < r; ++j) {
    const auto at = static_cast<std::size_t>(j);
    const T* v = in.v.row(factors.rows[static_cast<std::size_t>(probes.ranks[at])], buffer);
    along[at] = size[at] = 0;
    for (Index c = 0; c < in.v.cols(); ++c) {
      const T step = (found.stretch[at] - 1) * plain(j, c) + found.added(at) * v[c];
      along[at] += step * (probes.exact(j, c) - plain(j, c));
      size[at] += step * step;
    }
    total_along += along[at];
    total_size += size[at];
  }
  if (!(total_size > 0)) return 0;
  const T t = total_along / total_size;
  for (std::size_t j = 0; j < along.size(); ++j) squares += (along[j] - t * size[j]) * (along[j] - t * size[j]);
  const T correction = static_cast<T>(r) / static_cast<T>(std::max<Index>(r - 1, 1));
  return std::clamp<T>(t - std::sqrt(squares * correction) / total_size, 0, 1);
}

}  // namespace attn::detail
