/// How far any result is from exact attention, from a few rows that are computed exactly.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/context.hpp>
#include <attn/detail/exact_rows.hpp>
#include <attn/detail/split_mix64.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/exact.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>

namespace attn {

/// Which rows an error is estimated from.
struct ErrorSample {
  Index num_rows = 64;     ///< at least 1; as many as there are kept queries, or more: the error itself
  std::uint64_t seed = 0;  ///< of the draw
};

/// An estimate of |out - exact|_F / |exact|_F.
struct ErrorEstimate {
  double error = 0;  ///< the estimate
  double lower = 0;  ///< about 19 in 20 times the true error lies from here
  double upper = 0;  ///< to here
  Index rows = 0;    ///< computed exactly
};

namespace detail {

/// A row of a sample: its number, how many rows it stands for, and |out_i - exact_i|^2, |exact_i|^2 and |out_i|^2.
struct SampledRow {
  Index row;
  double weight, difference = 0, exact = 0, result = 0;
};

/// A kept query and |out_i|^2.
struct ResultSquare {
  Index row;
  double square;
};

/// 1 - u, in (0, 1].
inline double uniform(SplitMix64& random) {
  return static_cast<double>((random() >> 11U) + 1) * 0x1p-53;
}

/// sample <- rows drawn from those of squares with probabilities 0.8 / n + 0.2 |out_i|^2 / total, one from each of as
/// many strata of equal probability as the sample has rows; all of them once if it has as many. Strata are of rows with
/// similar |out_i|, whose errors are more alike than others. Rows of squares are reordered; the sample is ascending.
inline void draw_rows(std::span<ResultSquare> squares, double total, std::uint64_t seed, std::span<SampledRow> sample) {
  constexpr double kBySize = 0.2;
  const auto n = static_cast<double>(squares.size()), count = static_cast<double>(sample.size());
  const double by_size = total > 0 && n > count ? kBySize / total : 0, alike = (by_size > 0 ? 1 - kBySize : 1) / n;
  sort_elements(squares.data(), static_cast<Index>(squares.size()), [](const ResultSquare& a, const ResultSquare& b) {
    return a.square < b.square || (a.square == b.square && a.row < b.row);
  });
  SplitMix64 random(seed);
  std::size_t at = 0;
  const auto probability = [&](std::size_t i) { return alike + by_size * squares.data()[i].square; };
  double below = probability(0), drawn = 0;
  for (SampledRow& row : sample) {
    const double place = (drawn++ + uniform(random)) / count;
    if (n == count) at = static_cast<std::size_t>(drawn) - 1;
    while (n > count && below < place && at + 1 < squares.size()) below += probability(++at);
    row = {squares.data()[at].row, 1 / (count * probability(at))};
  }
  sort_elements(sample.data(), static_cast<Index>(sample.size()),
                [](const SampledRow& a, const SampledRow& b) { return a.row < b.row; });
}

/// What n numbers add up to, and the variance of that if they are independent draws.
struct SumOfDraws {
  double sum = 0, variance = 0;

  template <class Get>
  static SumOfDraws of(std::span<const SampledRow> rows, const Get& get) {
    const auto n = static_cast<double>(rows.size());
    SumOfDraws made;
    for (const SampledRow& row : rows) made.sum += row.weight * get(row);
    for (const SampledRow& row : rows) {
      const double apart = row.weight * get(row) - made.sum / n;
      made.variance += apart * apart;
    }
    made.variance = n < 2 ? std::numeric_limits<double>::infinity() : made.variance * n / (n - 1);
    return made;
  }
};

/// The interval of an estimate E is E exp(-c) to E exp(3 c / 2), c the coefficient of variation of the sum of squares
/// of differences behind it, twice that of E: such squares have a heavy tail, of which a sample rather misses a part.
inline ErrorEstimate interval(double error, double spread, Index rows) {
  return {error, error * std::exp(-spread), error * std::exp(1.5 * spread), rows};
}

/// The error by sampled rows of weights w_i. What all |exact_i|^2 add up to is about the sum of w_i |exact_i|^2, or
/// total, the sum of all |out_i|^2, plus that of w_i (|exact_i|^2 - |out_i|^2): whichever varies less. total: infinite
/// where it is not known.
inline ErrorEstimate estimate_by(std::span<const SampledRow> rows, double total) {
  const auto differences = SumOfDraws::of(rows, [](const SampledRow& row) { return row.difference; }),
             sizes = SumOfDraws::of(rows, [](const SampledRow& row) { return row.exact; }),
             changes = SumOfDraws::of(rows, [](const SampledRow& row) { return row.exact - row.result; });
  const bool by_changes = total + changes.sum > 0 && is_finite(total) && changes.variance < sizes.variance;
  const double size = by_changes ? total + changes.sum : sizes.sum;
  const double error = differences.sum == 0 ? 0 : std::sqrt(differences.sum / size);
  const double spread = differences.sum == 0 ? 0 : std::sqrt(differences.variance) / differences.sum;
  return interval(error, spread, static_cast<Index>(rows.size()));
}

/// rows <- the squares of what result(row number) is, a row of out or a copy of it, and exact rows, in the order of the
/// sample.
template <class T, class Result>
void set_squares(std::span<SampledRow> rows, const ConstMatrixRef<T>& exact, const Result& result) {
  for (std::size_t i = 0; i < rows.size(); ++i) {
    SampledRow& row = rows.data()[i];
    const T *const is = result(row.row), *const should_be = row_of(exact, static_cast<Index>(i));
    row.difference = row.exact = row.result = 0;
    for (Index c = 0; c < exact.cols(); ++c) {
      const auto x = static_cast<double>(is[c]), y = static_cast<double>(should_be[c]);
      row.difference += (x - y) * (x - y);
      row.exact += y * y;
      row.result += x * x;
    }
  }
}

/// squares <- |out_i|^2 of the kept queries, in their order. Returns what they add up to.
template <class T, class Keeps>
double set_result_squares(const TokenRows<T>& out, const Keeps& keeps, T* buffer, std::span<ResultSquare> squares) {
  double total = 0;
  std::size_t at = 0;
  for (Index i = 0; i < out.rows(); ++i) {
    if (!keeps(i)) continue;
    const T* const row = out.row(i, buffer);
    double square = 0;  // in double, for those of large floats overflow
    for (Index c = 0; c < out.cols(); ++c) square += static_cast<double>(row[c]) * static_cast<double>(row[c]);
    squares.data()[at++] = {i, square};
    total += square;
  }
  return total;
}

/// estimate_error, once its arguments are checked.
template <ScoreKernel Kernel, class T>
ErrorEstimate estimate_error_of(const Kernel& kernel, const Sources<T>& in, const TokenRows<T>& out,
                                const ErrorSample& options, Context& context) {
  Scratch scratch = context.scratch();
  const Index kept = count_kept(in.q.rows(), kept_queries(in)), count = std::min(kept, options.num_rows);
  if (kept == 0) return {};
  const std::span<ResultSquare> squares = scratch.array<ResultSquare>(kept);
  T* const buffer = scratch.elements<T>(out.cols());
  double total = set_result_squares(out, kept_queries(in), buffer, squares);
  if (!is_finite(total)) return {total, total, total, 0};
  const std::span<SampledRow> rows = scratch.array<SampledRow>(count);
  draw_rows(squares, total, options.seed, rows);
  const std::span<Index> numbers = scratch.array<Index>(count);
  std::transform(rows.begin(), rows.end(), numbers.begin(), [](const SampledRow& row) { return row.row; });
  const MatrixRef<T> exact = scratch.matrix<T>(count, out.cols());
  exact_rows(kernel, in, numbers, exact, context);
  set_squares<T>(rows, exact, [&](Index i) { return out.row(i, buffer); });
  ErrorEstimate estimate = estimate_by(rows, total);
  if (count == kept) estimate.lower = estimate.upper = estimate.error;
  return estimate;
}

}  // namespace detail

/// About |out - exact|_F / |exact|_F of any method's out (n_q, d_v), exact being attention with this kernel of the
/// same inputs, masks included. A few rows are computed exactly, drawn at random from the kept queries and independent
/// of how out was made; |out_i| of all rows is used to draw more wisely, and for the size of the others. The same seed
/// draws the same rows for the same out. A row of a narrow type counts with its rounding. NaN, or infinite, if out is
/// in a kept query. Throws std::invalid_argument when shapes disagree or are empty, or for no rows. Time as of exact
/// attention of so many queries, for a causal mask some more; O(n_q + rows (d + d_v)) memory.
template <ScoreKernel Kernel, class T>
ErrorEstimate estimate_error(const Kernel& kernel, const Inputs<T>& in, std::type_identity_t<ConstMatrixRef<T>> out,
                             const ErrorSample& options, Context& context) {
  constexpr std::string_view kName = "estimate_error";
  using Wide = detail::Arithmetic<T>;
  detail::check_inputs(kName, in);
  detail::check_shape(kName, "out", out, in.q.rows(), in.v.cols());
  detail::check_at_least(kName, "num_rows", static_cast<double>(options.num_rows), 1);
  detail::check_kernel<Wide>(kName, kernel, in.q.cols());
  Scratch scratch = context.scratch();
  return detail::estimate_error_of<Kernel, Wide>(kernel, detail::arithmetic_sources(in, scratch),
                                                 detail::TokenRows<Wide>(out), options, context);
}

/// The same against an exact method.
template <class T, ScoreKernel Kernel>
ErrorEstimate estimate_error(const ExactAttention<T, Kernel>& exact, const std::type_identity_t<Inputs<T>>& in,
                             std::type_identity_t<ConstMatrixRef<T>> out, const ErrorSample& options,
                             Context& context) {
  return estimate_error(exact.kernel(), in, out, options, context);
}

}  // namespace attn
