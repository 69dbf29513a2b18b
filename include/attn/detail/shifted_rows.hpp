/// What spectral shifting needs of Nystromformer's approximation N = F Z B beside N v: its diagonal, its row sums, and
/// an estimate of the exact diagonal.
#pragma once

#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/few_keys.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/landmarks.hpp>
#include <attn/matrix.hpp>
#include <attn/nystrom.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numbers>
#include <span>

namespace attn::detail {

/// The row numbers of the kept keys.
template <class T>
std::span<const Index> list_kept_keys(const Sources<T>& in, Scratch& scratch) {
  const std::span<Index> kept = scratch.array<Index>(count_kept(in.k.rows(), kept_keys(in)));
  std::size_t rank = 0;
  for (Index j = 0; j < in.k.rows(); ++j) {
    if (keeps_key(in, j)) kept[rank++] = j;
  }
  return kept;
}

/// Kept rows of a matrix: their numbers, in ascending order, and the ranks that they have among all kept ones, which
/// are count: first, first + 1, ... or those given.
struct RankedRows {
  std::span<const Index> numbers;
  Index count, first = 0;
  std::span<const Index> ranks{};

  Index rank(Index place) const { return ranks.empty() ? first + place : ranks[static_cast<std::size_t>(place)]; }

  /// Those of consecutive ranks whose ranks are within a range, as places.
  Range within(Range of_ranks) const {
    const auto n = static_cast<Index>(numbers.size());
    return {std::clamp<Index>(of_ranks.first - first, 0, n), std::clamp<Index>(of_ranks.last - first, 0, n)};
  }
};

template <class T>
RankedRows all_kept_keys(const Sources<T>& in, Scratch& scratch) {
  const std::span<const Index> numbers = list_kept_keys(in, scratch);
  return {numbers, static_cast<Index>(numbers.size())};
}

/// variance (m, d) <- what the listed rows add to that of each segment's keys, per coordinate.
template <class T>
void set_variance(const TokenRows<T>& k, const RankedRows& rows, const ConstMatrixRef<T>& means,
                  const MatrixRef<T>& variance, Context& context) {
  Scratch scratch = context.scratch();
  const Index m = variance.rows(), d = variance.cols();
  const std::span<T> buffers = scratch.array<T>(context.workers() * d);
  const LongSums<T> chains(rows.count / m + 1, d, context.workers(), scratch);
  set_zero(variance);
  context.for_each(m, [&](Index c, int worker) {
    const Range all = segment(rows.count, m, c), range = rows.within(all);
    T* const sum = variance.data() + c * d;
    chains.add(range.last - range.first, worker, sum, [&, i = range.first](Index some, T* to) mutable {
      for (const Index last = i + some; i < last; ++i) {
        const T* row = k.row(rows.numbers[static_cast<std::size_t>(i)], buffers.data() + worker * d);
        add_squared_difference(row, row_of(means, c), to, d);
      }
    });
    for (Index a = 0; a < d; ++a) sum[a] /= static_cast<T>(all.last - all.first);
  });
}

/// The m-sized side of N over the n kept rows.
template <class T>
struct ShiftFactors {
  ShiftFactors(const Sources<T>& in, const SoftmaxKernel& kernel, const NystromFactors<T>& f, int iterations,
               Context& context, Scratch& scratch)
      : ShiftFactors(in, all_kept_keys(in, scratch), scratch.matrix<T>(f.bv.rows(), in.k.cols()), kernel, f, iterations,
                     context, scratch) {}

  /// Of some of all rows, and the variance of all rows' segments.
  ShiftFactors(const RankedRows& listed, const MatrixRef<T>& variance, const SoftmaxKernel& kernel,
               const NystromFactors<T>& f, int iterations, Context& context, Scratch& scratch)
      : m(f.bv.rows()),
        scale(static_cast<T>(score_parameters(kernel, f.k_land.cols()).scale)),
        log2_scale(scale * std::numbers::log2e_v<T>),
        half_square(log2_scale * scale / 2),
        rows(listed),
        zbv(scratch.matrix<T>(m, f.bv.cols())),
        ones(scratch.array<T>(m)),
        log_length(scratch.array<T>(m)),
        log_others(scratch.array<T>(m)),
        lse(scratch.array<T>(m)) {
    const MatrixRef<T> a = scratch.matrix<T>(m, m), z = scratch.matrix<T>(m, m);
    kernel_matrix<SoftmaxKernel, T>(kernel, f.q_land, f.k_land, a, context);
    IterativePinv{.iterations = iterations}.invert<T>(a, z, context);
    gemm<T>(1, z, f.bv, 0, zbv, context);
    for (Index c = 0; c < m; ++c) {
      const auto at = static_cast<std::size_t>(c);
      const Range range = segment(rows.count, m, c);
      ones[at] = row_sum(z.data() + c * m, m);
      log_length[at] = std::log2(static_cast<T>(range.last - range.first));
      log_others[at] = std::log2(static_cast<T>(range.last - range.first - 1));
      lse[at] = f.lse_land[at].value * std::numbers::log2e_v<T>;
    }
    packed = {Panels<T>::pack(transposed(f.k_land), scratch), Panels<T>::pack(transposed(f.q_land), scratch),
              Panels<T>::pack(transposed(variance), scratch), Panels<T>::pack(z, scratch),
              Panels<T>::pack(zbv, scratch)};
  }

  Index m;
  T scale;                    ///< s
  T log2_scale, half_square;  ///< s and s^2 / 2 in units of log2, as all scores are here
  RankedRows rows;            ///< the kept tokens
  MatrixRef<T> zbv;           ///< Z B v (m, d_v)
  std::span<T> ones;          ///< Z B 1, which is Z 1
  std::span<T> log_length;    ///< log2 of each segment's length
  std::span<T> log_others;    ///< log2 of one less, -infinity for a single token
  std::span<T> lse;           ///< log-sums of B's rows

  /// The number of a listed row.
  Index row(Index place) const { return rows.numbers[static_cast<std::size_t>(place)]; }

  /// What rows are multiplied by, packed once for all of them. variance: of each segment's keys, per coordinate (m, d).
  struct {
    Panels<T> k_land, q_land, variance, z, zbv;
  } packed;

 private:
  /// variance: memory for it.
  ShiftFactors(const Sources<T>& in, const RankedRows& listed, const MatrixRef<T>& variance,
               const SoftmaxKernel& kernel, const NystromFactors<T>& f, int iterations, Context& context,
               Scratch& scratch)
      : ShiftFactors(listed, (set_variance<T>(in.k, listed, f.k_land, variance, context), variance), kernel, f,
                     iterations, context, scratch) {}
};

/// The listed rows of m, in ascending order: in place where they follow one another, else a copy.
template <class T>
ConstMatrixRef<T> listed_rows(const TokenRows<T>& m, std::span<const Index> list, Scratch& scratch) {
  const auto count = static_cast<Index>(list.size());
  if (m.in_place() && list.back() - list.front() + 1 == count) return m.matrix().middleRows(list.front(), count);
  const MatrixRef<T> copy = scratch.matrix<T>(count, m.cols());
  for (Index i = 0; i < count; ++i) m.copy_row(list[static_cast<std::size_t>(i)], row_of(copy, i));
  return copy;
}

/// Some rows of F, given by their places among the listed ones, and what the shift needs of the same rows of N.
template <class T>
class ShiftedRows {
 public:
  ShiftedRows(const Sources<T>& in, const ShiftFactors<T>& factors, std::span<const Index> places, Scratch& scratch)
      : f(scratch.matrix<T>(static_cast<Index>(places.size()), factors.m)), factors_(factors), places_(places) {
    for (std::span<T>* row : {&own_score, &diagonal, &row_sum, &exact_diagonal, &stretch, &added}) {
      *row = scratch.array<T>(static_cast<Index>(places.size()));
    }
    Scratch temporary = scratch.nested();
    const std::span<Index> rows = temporary.array<Index>(f.rows());
    std::transform(places.begin(), places.end(), rows.begin(), [&](Index place) { return factors.row(place); });
    const ConstMatrixRef<T> q = listed_rows<T>(in.q, rows, temporary), k = listed_rows<T>(in.k, rows, temporary);
    MatrixRef<T> scores = temporary.matrix<T>(f.rows(), f.cols());
    factors.packed.k_land.multiply({&factors.log2_scale, 0}, q, 0, scores, {});
    set_rows_of_f(scores);
    set_diagonal(q, k, temporary);
    estimate_diagonal(q, scores, temporary);
    for (std::size_t i = 0; i < stretch.size(); ++i) set_row(i);
  }

  /// to (c, d_v) <- the rows of N v.
  void multiply_values(const MatrixRef<T>& to) const {
    const T one = 1;
    factors_.packed.zbv.multiply({&one, 0}, f, 0, to, {});
  }

  MatrixRef<T> f;               ///< (c, m)
  std::span<T> own_score;       ///< s q_i.k_i
  std::span<T> diagonal;        ///< g_i = N_ii
  std::span<T> row_sum;         ///< rho_i = (N 1)_i
  std::span<T> exact_diagonal;  ///< estimate of S_ii
  std::span<T> stretch, added;  ///< R_i = stretch_i (N v)_i + added_i v_i

 private:
  /// R_i = (N v)_i + w (alpha ((N v)_i - g v_i) + s v_i - (N v)_i), alpha = (1 - s) / (rho - g): the part w of the way
  /// to a row whose own weight is s and whose sum is 1, so that no row's sum is further from 1 than N's. w = 1 but
  /// where N has less than .1 beside its diagonal to stretch, or alpha is above 2; there w falls to 0 with rho - g, and
  /// the part of N v in R_i stays at most 2.
  void set_row(std::size_t i) {
    constexpr T kLeast = T(0.1), kMost = 2;
    const T s = exact_diagonal[i], others = row_sum[i] - diagonal[i], wanted = 1 - s;
    stretch[i] = 1;
    added[i] = 0;
    if (!(others > 0)) return;
    T part = std::min<T>(others / kLeast, 1);
    if (wanted > kMost * others) part *= (kMost - 1) * others / (wanted - others);
    const T alpha = part * (wanted / others);
    stretch[i] = alpha + (1 - part);
    added[i] = part * s - alpha * diagonal[i];
  }

  /// scores: F's, in units of log2.
  void set_rows_of_f(const ConstMatrixRef<T>& scores) {
    f = scores;
    for (Index i = 0; i < f.rows(); ++i) {
      weigh_row(&f(i, 0), f.cols(), Rows::normalized);
      row_sum[static_cast<std::size_t>(i)] = dot_product(&f(i, 0), factors_.ones.data(), f.cols());
    }
  }

  void set_diagonal(const ConstMatrixRef<T>& q, const ConstMatrixRef<T>& k, Scratch& temporary) {
    const Index m = f.cols();
    MatrixRef<T> fz = temporary.matrix<T>(f.rows(), m), b = temporary.matrix<T>(f.rows(), m);
    const T one = 1;
    factors_.packed.z.multiply({&one, 0}, f, 0, fz, {});
    factors_.packed.q_land.multiply({&factors_.log2_scale, 0}, k, 0, b, {});
    for (Index i = 0; i < f.rows(); ++i) {
      auto total = broadcast(T(0));
      for (Index j = 0; j < m; j += kLanes<T>) {
        // No weight is above 1 but for the rounding of large scores.
        const auto weight =
            exp2_bounded(min(load_row(&b(i, 0), j, m) - load_row(factors_.lse.data(), j, m), broadcast(T(0))));
        total = multiply_add(load_row(&fz(i, 0), j, m), weight, total);
      }
      diagonal[static_cast<std::size_t>(i)] = sum(total);
      own_score[static_cast<std::size_t>(i)] = factors_.scale * dot_product(q.row(i).data(), k.row(i).data(), q.cols());
    }
  }

  /// S_ii ~ e_i / (e_i + sum_c w_ic l_c exp(score_ic)): every segment of l_c keys stands for its mean and its variance,
  /// which scores hold (in units of log2), but for the token itself, which is exact: w_ic = (l_c - 1) / l_c for its own
  /// segment.
  void estimate_diagonal(const ConstMatrixRef<T>& q, MatrixRef<T> scores, Scratch& temporary) {
    MatrixRef<T> squares = temporary.matrix<T>(q.rows(), q.cols());
    squares = q.array().square();
    factors_.packed.variance.multiply({&factors_.half_square, 0}, squares, 1, scores, {});
    const Index m = scores.cols();
    for (std::size_t i = 0; i < places_.size(); ++i) {
      T* row = &scores(static_cast<Index>(i), 0);
      const auto owner = static_cast<std::size_t>(segment_of(factors_.rows.count, m, factors_.rows.rank(places_[i])));
      row[owner] += factors_.log_others[owner] - factors_.log_length[owner];
      const T own = own_score[i] * std::numbers::log2e_v<T>, top = std::max(own, add_lengths(row, m)),
              mass = exp2_scalar(own - top);
      exact_diagonal[i] = mass / (mass + exponentiate(row, m, top));
    }
  }

  /// row <- row + log_length, as far as it is finite: the variance's term may overflow. Returns the maximum.
  T add_lengths(T* row, Index m) const {
    auto top = broadcast(std::numeric_limits<T>::lowest());
    for (Index c = 0; c < m; c += kLanes<T>) {
      const auto sum =
          load_row(row, c, m, std::numeric_limits<T>::lowest()) + load_row(factors_.log_length.data(), c, m);
      const auto x = min(sum, broadcast(std::numeric_limits<T>::max()));
      top = max(top, x);
      store_row(row, c, m, x);
    }
    return largest(top);
  }

  const ShiftFactors<T>& factors_;
  std::span<const Index> places_;
};

}  // namespace attn::detail
