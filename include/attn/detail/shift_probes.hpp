/// What spectral shifting learns from some rows whose attention it computes exactly.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/rows.hpp>
#include <attn/detail/shifted_rows.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>

namespace attn::detail {

/// Probed rows floor((2 j + 1) n / (2 r)) of the n kept ones, and the exact attention of each: its output and its
/// log-sum.
template <class T>
struct ShiftProbes {
  std::span<const Index> ranks;
  MatrixRef<T> exact;
  std::span<T> lse;

  /// S_ii of probed row j, found for it.
  T diagonal(const ShiftedRows<T>& found, std::size_t j) const { return std::exp(found.own_score[j] - lse[j]); }
};

template <class T>
ShiftProbes<T> probe_rows(const SoftmaxKernel& kernel, Index num_probes, const Sources<T>& in,
                          const ShiftFactors<T>& factors, Context& context, Scratch& scratch) {
  const auto n = static_cast<Index>(factors.rows.size()), r = std::min(num_probes, n);
  const std::span<Index> ranks = scratch.array<Index>(r);
  MatrixRef<T> queries = scratch.matrix<T>(r, in.q.cols());
  const ShiftProbes<T> probes{ranks, scratch.matrix<T>(r, in.v.cols()), scratch.array<T>(r)};
  for (Index j = 0; j < r; ++j) {
    const Index rank = (2 * j + 1) * n / (2 * r);
    ranks[static_cast<std::size_t>(j)] = rank;
    in.q.copy_row(factors.rows[static_cast<std::size_t>(rank)], queries.row(j).data());
  }
  multiply<SoftmaxKernel, T>(kernel, {queries, in.k, in.v, keys_only(in.mask)}, probes.exact, probes.lse.data(),
                             context);
  return probes;
}

/// delta of the scalar mode: mean(s - g) / max(mean(rho - g), .05) over the probed rows.
template <class T>
T probed_shift(const ShiftProbes<T>& probes, const Sources<T>& in, const ShiftFactors<T>& factors,
               const ShiftPanels<T>& panels, Context& context) {
  Scratch scratch = context.scratch();
  const ShiftedRows<T> found(in, factors, panels, probes.ranks, scratch);
  T wanted = 0, available = 0;
  for (Index j = 0; j < probes.exact.rows(); ++j) {
    const auto at = static_cast<std::size_t>(j);
    wanted += probes.diagonal(found, at) - found.diagonal[at];
    available += found.row_sum[at] - found.diagonal[at];
  }
  const T r = static_cast<T>(probes.exact.rows());
  return std::clamp<T>(wanted / r / std::max<T>(available / r, T(0.05)), 0, 1);
}

/// What the probed rows allow the others in row mode: the step t, and the largest move, in units of 1 / unit, a power
/// of two near the probed rows' largest magnitude: no result depends on the size of v.
template <class T>
struct ShiftGate {
  T step, largest, unit;

  /// t of a row whose full move is that long, in the same units: min(t, largest / length).
  T of(T length) const { return length * step > largest ? largest / length : step; }
};

/// The power of two that takes values of this magnitude to [1/2, 1), as far as T has it.
template <class T>
T unit_of(T magnitude) {
  if (!(magnitude > 0) || magnitude > std::numeric_limits<T>::max()) return 1;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  return std::ldexp(
      T(1), std::clamp(-exponent, std::numeric_limits<T>::min_exponent - 1, std::numeric_limits<T>::max_exponent - 1));
}

/// Of steps a_i and what is wanted, b_i: a_i.b_i and a_i.a_i.
struct StepSums {
  StepSums(Index n, Scratch& scratch) : along(scratch.array<double>(n)), size(scratch.array<double>(n)) {}

  /// sum a.b / sum a.a less one standard error, within [0, 1], over all rows but the given one; kNone leaves none out.
  double fit(std::size_t without = kNone) const {
    double total_along = 0, total_size = 0, squares = 0, r = 0;
    const auto for_each = [&](const auto& body) {
      for (std::size_t i = 0; i < along.size(); ++i) {
        if (i != without) body(along[i], size[i]);
      }
    };
    for_each([&](double x, double y) { total_along += x, total_size += y, r += 1; });
    if (!(total_size > 0)) return 0;
    const double t = total_along / total_size;
    for_each([&](double x, double y) { squares += (x - t * y) * (x - t * y); });
    return std::clamp(t - std::sqrt(squares * r / std::max(r - 1, 1.0)) / total_size, 0.0, 1.0);
  }

  /// The least of these fits that leave one row out.
  double worst_fit() const {
    double least = 1;
    for (std::size_t i = 0; i < along.size(); ++i) least = std::min(least, fit(i));
    return least;
  }

  static constexpr std::size_t kNone = std::numeric_limits<std::size_t>::max();
  std::span<double> along, size;
};

/// On the probed rows, of the steps a = R - N v and what is wanted, b = S v - N v: the sums, and the largest |b|, for
/// values times unit. In double, since they are squares of squares of values.
template <class T>
double set_row_sums(const ShiftedRows<T>& found, const ConstMatrixRef<T>& plain, const ConstMatrixRef<T>& exact,
                    const ConstMatrixRef<T>& v, T unit, const StepSums& sums) {
  double largest = 0;
  for (Index j = 0; j < plain.rows(); ++j) {
    const auto at = static_cast<std::size_t>(j);
    const auto gain = static_cast<double>(found.stretch[at] - 1), added = static_cast<double>(found.added[at]);
    double squared_error = 0;
    sums.along[at] = sums.size[at] = 0;
    for (Index c = 0; c < plain.cols(); ++c) {
      const auto y = static_cast<double>(unit * plain(j, c)), error = static_cast<double>(unit * exact(j, c)) - y,
                 step = gain * y + added * static_cast<double>(unit * v(j, c));
      sums.along[at] += step * error;
      sums.size[at] += step * step;
      squared_error += error * error;
    }
    largest = std::max(largest, squared_error);
  }
  return std::sqrt(largest);
}

/// The same sums of the diagonal alone, a = s - g and b = S_ii - g, which do not depend on v.
template <class T>
void set_diagonal_sums(const ShiftProbes<T>& probes, const ShiftedRows<T>& found, const StepSums& sums) {
  for (std::size_t j = 0; j < sums.size.size(); ++j) {
    const auto g = static_cast<double>(found.diagonal[j]), step = static_cast<double>(found.exact_diagonal[j]) - g;
    sums.along[j] = step * (static_cast<double>(probes.diagonal(found, j)) - g);
    sums.size[j] = step * step;
  }
}

/// The gate of the row mode: t = sum a.b / sum a.a over the probed rows, less one standard error; at most kAlone times
/// what is left of it without any one of them, and at most kDiagonal times the same of the diagonal. No row moves by
/// more than kReach times the largest |b|: what the probed rows do not show is not moved further than what they show.
template <class T>
ShiftGate<T> fit_gate(const ShiftProbes<T>& probes, const Sources<T>& in, const ShiftFactors<T>& factors,
                      const ShiftPanels<T>& panels, Context& context) {
  constexpr double kAlone = 2, kDiagonal = 1.5, kReach = 2;
  Scratch scratch = context.scratch();
  const ShiftedRows<T> found(in, factors, panels, probes.ranks, scratch);
  const Index r = probes.exact.rows();
  MatrixRef<T> plain = scratch.matrix<T>(r, in.v.cols()), v = scratch.matrix<T>(r, in.v.cols());
  const T one = 1;
  found.multiply_values({&one, 0}, plain);
  for (Index j = 0; j < r; ++j) {
    in.v.copy_row(factors.rows[static_cast<std::size_t>(probes.ranks[static_cast<std::size_t>(j)])], &v(j, 0));
  }
  const T unit =
      unit_of(std::max({largest_magnitude<T>(plain), largest_magnitude<T>(probes.exact), largest_magnitude<T>(v)}));
  const StepSums rows(r, scratch), diagonal(r, scratch);
  const double largest = set_row_sums<T>(found, plain, probes.exact, v, unit, rows);
  set_diagonal_sums(probes, found, diagonal);
  const double t = std::min({rows.fit(), kAlone * rows.worst_fit(), kDiagonal * diagonal.fit()});
  return {static_cast<T>(t), static_cast<T>(kReach * largest), unit};
}

}  // namespace attn::detail
