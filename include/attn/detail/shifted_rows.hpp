/// What spectral shifting needs of Nystromformer's approximation N = F Z B beside N v: its diagonal, its row sums, and an estimate of the
/// exact diagonal.
#pragma once

#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/detail/gemm.hpp>
#include <attn/detail/kernel_matrix.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <span>

namespace attn::detail {

/// The m-sized side of N, over the n kept rows (their row numbers in rows).
template <class T>
struct ShiftFactors {
  ShiftFactors(const Inputs<T>& in, const SegmentMeans& landmarks, const SoftmaxKernel& kernel, int iterations, Context& context,
               Scratch& scratch)
      : scale(static_cast<T>(score_parameters(kernel, in.q.cols()).scale)),
        rows(list_kept(in, scratch)),
        q_land(landmarks.select<T>(in.q, [&](Index i) { return keeps_query(in, i); }, scratch)),
        k_land(landmarks.select<T>(in.k, [&](Index j) { return keeps_key(in, j); }, scratch)),
        variance(scratch.matrix<T>(landmarks.num_landmarks, in.k.cols())),
        a(scratch.matrix<T>(landmarks.num_landmarks, landmarks.num_landmarks)),
        z(scratch.matrix<T>(landmarks.num_landmarks, landmarks.num_landmarks)),
        values(scratch.matrix<T>(landmarks.num_landmarks, in.v.cols() + 1)),
        sums(scratch.matrix<T>(landmarks.num_landmarks, in.v.cols() + 1)),
        lse(scratch.array<T>(landmarks.num_landmarks)),
        log_length(scratch.array<T>(landmarks.num_landmarks)),
        log_others(scratch.array<T>(landmarks.num_landmarks)) {
    kernel_matmul(kernel, Inputs<T>{q_land, in.k, in.v, keys_only(in.mask)}, sums.leftCols(in.v.cols()), lse, context);
    sums.col(in.v.cols()).setOnes();  // B 1
    kernel_matrix<SoftmaxKernel, T>(kernel, q_land, k_land, a, context);
    IterativePinv{.iterations = iterations}.invert<T>(a, z, context);
    gemm<T>(1, z, sums, 0, values, context);
    set_variance(in);
    for (Index c = 0; c < variance.rows(); ++c) {
      const Range range = segment(static_cast<Index>(rows.size()), variance.rows(), c);
      log_length[static_cast<std::size_t>(c)] = std::log2(static_cast<T>(range.last - range.first));
      log_others[static_cast<std::size_t>(c)] = std::log2(static_cast<T>(range.last - range.first - 1));
    }
  }

  /// delta = tr((I - Z A) A) / tr(I - Z A), 0 where the divisor is, within [0, 1].
  T paper_shift(Context& context) const {
    const Index m = a.rows();
    Scratch scratch = context.scratch();
    MatrixRef<T> residual = scratch.matrix<T>(m, m);
    gemm<T>(-1, z, a, 0, residual, context);
    residual.diagonal().array() += T(1);
    T trace = 0, product = 0;
    for (Index i = 0; i < m; ++i) {
      trace += residual(i, i);
      for (Index j = 0; j < m; ++j) product += residual(i, j) * a(j, i);
    }
    return trace > T(1e-6) * static_cast<T>(m) ? std::clamp<T>(product / trace, 0, 1) : T(0);
  }

  /// values <- values - delta Z values.
  void subtract_twice_inverted(T delta, Context& context) const {
    Scratch scratch = context.scratch();
    MatrixRef<T> old = scratch.matrix<T>(values.rows(), values.cols());
    old = values;
    gemm<T>(-delta, z, old, 1, values, context);
  }

  T scale;
  std::span<const Index> rows;
  MatrixRef<T> q_land, k_land;  ///< segment means (m, d)
  MatrixRef<T> variance;        ///< of each segment's keys, per coordinate (m, d)
  MatrixRef<T> a, z;            ///< A and what stands for its inverse (m, m)
  MatrixRef<T> values;          ///< Z B [v 1] (m, d_v + 1)
  MatrixRef<T> sums;            ///< B [v 1] (m, d_v + 1)
  std::span<T> lse;             ///< log-sums of B's rows
  std::span<T> log_length;      ///< log2 of each segment's length
  std::span<T> log_others;      ///< log2 of one less, -infinity for a single token

 private:
  static std::span<const Index> list_kept(const Inputs<T>& in, Scratch& scratch) {
    const std::span<Index> kept = scratch.array<Index>(count_kept(in.k.rows(), [&](Index j) { return keeps_key(in, j); }));
    std::size_t rank = 0;
    for (Index j = 0; j < in.k.rows(); ++j) {
      if (keeps_key(in, j)) kept[rank++] = j;
    }
    return kept;
  }

  void set_variance(const Inputs<T>& in) {
    const auto n = static_cast<Index>(rows.size()), m = variance.rows();
    variance.setZero();
    for (Index c = 0; c < m; ++c) {
      const Range range = segment(n, m, c);
      for (Index i = range.first; i < range.last; ++i) {
        variance.row(c).array() += (in.k.row(rows[static_cast<std::size_t>(i)]) - k_land.row(c)).array().square();
      }
      variance.row(c) /= static_cast<T>(range.last - range.first);
    }
  }
};

/// Some rows of N and of its row-shifted form, given by their ranks among the kept ones. c rows:
template <class T>
struct ShiftedRows {
  ShiftedRows(const Inputs<T>& in, const ShiftFactors<T>& factors, std::span<const Index> ranks, Context& context, Scratch& scratch)
      : plain(scratch.matrix<T>(static_cast<Index>(ranks.size()), in.v.cols() + 1)),
        shifted(scratch.matrix<T>(static_cast<Index>(ranks.size()), in.v.cols())),
        own_score(scratch.array<T>(static_cast<Index>(ranks.size()))),
        diagonal(scratch.array<T>(static_cast<Index>(ranks.size()))),
        exact_diagonal(scratch.array<T>(static_cast<Index>(ranks.size()))),
        stretch(scratch.array<T>(static_cast<Index>(ranks.size()))),
        row_sum(scratch.array<T>(static_cast<Index>(ranks.size()))) {
    Scratch temporary = scratch.nested();
    const Index c = plain.rows(), m = factors.z.rows(), d = in.q.cols();
    MatrixRef<T> q = temporary.matrix<T>(c, d), k = temporary.matrix<T>(c, d), scores = temporary.matrix<T>(c, m);
    MatrixRef<T> f = temporary.matrix<T>(c, m), fz = temporary.matrix<T>(c, m), b = temporary.matrix<T>(c, m);
    for (Index i = 0; i < c; ++i) {
      const Index row = factors.rows[static_cast<std::size_t>(ranks[static_cast<std::size_t>(i)])];
      q.row(i) = in.q.row(row);
      k.row(i) = in.k.row(row);
    }
    const T log2e = std::numbers::log2e_v<T>, half_square = T(0.5) * factors.scale * factors.scale * log2e;
    gemm<T, Left::row_major, Right::transposed>(factors.scale * log2e, q, factors.k_land, 0, scores, context);
    gemm<T, Left::row_major, Right::transposed>(factors.scale * log2e, k, factors.q_land, 0, b, context);
    f = scores;
    for (Index i = 0; i < c; ++i) weigh_row(&f(i, 0), m, Rows::normalized);
    gemm<T>(1, f, factors.z, 0, fz, context);
    gemm<T>(1, f, factors.values, 0, plain, context);
    for (Index i = 0; i < c; ++i) {
      const auto at = static_cast<std::size_t>(i);
      T* const weights = &b(i, 0);
      // No weight is above 1 but for the rounding of large scores.
      for (Index j = 0; j < m; ++j) weights[j] = std::min(weights[j] - factors.lse[static_cast<std::size_t>(j)] * log2e, T(0));
      weigh_row(weights, m, Rows::raw);
      own_score[at] = factors.scale * dot_product(&q(i, 0), &k(i, 0), d);
      diagonal[at] = dot_product(&fz(i, 0), weights, m);
      row_sum[at] = plain(i, in.v.cols());
    }
    q = q.array().square();
    gemm<T, Left::row_major, Right::transposed>(half_square, q, factors.variance, 1, scores, context);
    estimate_diagonal(factors, ranks, scores);
    shift_rows(in, factors, ranks);
  }

  MatrixRef<T> plain;           ///< (N v)_i and (N 1)_i (c, d_v + 1)
  MatrixRef<T> shifted;         ///< R_i (c, d_v)
  std::span<T> own_score;       ///< s q_i.k_i
  std::span<T> diagonal;        ///< g_i = N_ii
  std::span<T> exact_diagonal;  ///< estimate of S_ii
  std::span<T> stretch;         ///< alpha_i
  std::span<T> row_sum;         ///< rho_i = (N 1)_i

 private:
  /// S_ii ~ e_i / (e_i + sum_c w_ic l_c exp(score_ic)): every segment of l_c keys stands for its mean and its variance, which scores hold
  /// (in units of log2), but for the token itself, which is exact: w_ic = (l_c - 1) / l_c for its own segment.
  void estimate_diagonal(const ShiftFactors<T>& factors, std::span<const Index> ranks, MatrixRef<T> scores) {
    const auto n = static_cast<Index>(factors.rows.size()), m = scores.cols();
    for (Index i = 0; i < scores.rows(); ++i) {
      const auto at = static_cast<std::size_t>(i);
      const T own = own_score[at] * std::numbers::log2e_v<T>;
      const Index owner = segment_of(n, m, ranks[at]);
      T* row = &scores(i, 0);
      const T of_owner = row[owner] + factors.log_others[static_cast<std::size_t>(owner)];
      for (Index c = 0; c < m; ++c) row[c] += factors.log_length[static_cast<std::size_t>(c)];
      row[owner] = of_owner;
      // The variance's term may overflow.
      for (Index c = 0; c < m; ++c) row[c] = std::min(row[c], std::numeric_limits<T>::max());
      const T top = std::max(own, row_maximum(row, m));
      for (Index c = 0; c < m; ++c) row[c] -= top;
      weigh_row(row, m, Rows::raw);
      const T mass = std::exp2(own - top);
      exact_diagonal[at] = mass / (mass + detail::row_sum(row, m));
    }
  }

  void shift_rows(const Inputs<T>& in, const ShiftFactors<T>& factors, std::span<const Index> ranks) {
    for (Index i = 0; i < shifted.rows(); ++i) {
      const auto at = static_cast<std::size_t>(i);
      const T s = exact_diagonal[at], g = diagonal[at];
      const T alpha = stretch[at] = std::clamp<T>((1 - s) / std::max<T>(row_sum[at] - g, T(0.1)), 0, 2);
      const auto v = in.v.row(factors.rows[static_cast<std::size_t>(ranks[at])]);
      shifted.row(i) = alpha * (plain.row(i).head(in.v.cols()) - g * v) + s * v;
    }
  }
};

}  // namespace attn::detail
