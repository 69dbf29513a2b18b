/// Spectral shifting: Nystromformer plus a shifted identity, for spectra that decay slowly.
#pragma once

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/detail/checks.hpp>
#include <attn/detail/nystrom_factors.hpp>
#include <attn/detail/shifted_rows.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/narrow.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <span>
#include <string_view>
#include <vector>

namespace attn {

/// How the shift is chosen: paper, one delta from the landmarks' matrix alone; scalar, one delta from probed rows; row, one for each
/// row, gated by probed rows.
enum class ShiftMode { paper, scalar, row };

/// iterations as in IterativePinv; num_probes rows whose attention is computed exactly.
struct SpectralShift {
  ShiftMode mode = ShiftMode::row;
  int iterations = 6;
  int num_probes = 32;

  void check(std::string_view who) const {
    detail::check_at_least(who, "iterations", iterations, 1);
    detail::check_at_least(who, "num_probes", num_probes, 1);
  }
};

namespace detail {

/// Z - delta Z Z, Z that of IterativePinv: the core of the paper mode, and of the others where delta is 0. delta is a constant.
template <class T>
struct ShiftedPinv {
  int iterations;
  T delta;

  void apply(MatrixRef<T> a, MatrixRef<T> x, Context& context) const {
    Scratch scratch = context.scratch();
    MatrixRef<T> z = scratch.matrix<T>(a.rows(), a.rows()), once = scratch.matrix<T>(x.rows(), x.cols());
    IterativePinv{.iterations = iterations}.invert<T>(a, z, context);
    gemm<T>(1, z, x, 0, once, context);
    x = once;
    gemm<T>(-delta, z, once, 1, x, context);
  }

  /// For y = t - delta z t, t = z x: dt = dx - delta z^T dx, dz = dt x^T - delta dx t^T, dx <- z^T dt.
  void backward(MatrixRef<T> a, MatrixRef<T> x, MatrixRef<T> dx, MatrixRef<T> da, Context& context) const {
    Scratch scratch = context.scratch();
    MatrixRef<T> z = scratch.matrix<T>(a.rows(), a.rows()), dz = scratch.matrix<T>(a.rows(), a.rows());
    MatrixRef<T> once = scratch.matrix<T>(x.rows(), x.cols()), donce = scratch.matrix<T>(x.rows(), x.cols());
    const IterativePinv pinv{.iterations = iterations};
    pinv.invert<T>(a, z, context);
    gemm<T>(1, z, x, 0, once, context);
    donce = dx;
    gemm<T, Left::column_major>(-delta, z, dx, 1, donce, context);
    gemm<T, Left::row_major, Right::transposed>(1, donce, x, 0, dz, context);
    gemm<T, Left::row_major, Right::transposed>(-delta, dx, once, 1, dz, context);
    gemm<T, Left::column_major>(1, z, donce, 0, dx, context);
    pinv.invert_backward<T>(a, dz, da, context);
  }
};

}  // namespace detail

/// softmax(s q k^T) v ~ (N + shift) v with N = F Z B of Nystromformer, g_i = N_ii, rho_i = (N 1)_i, s_i = S_ii:
///   paper    F (Z - delta Z Z) (B v) + delta v, delta = tr((I - Z A) A) / tr(I - Z A): a reconstruction, no bound holds for it
///   scalar   (1 - delta) N v + delta v, delta = mean(s - g) / max(mean(rho - g), .05) over probed rows with exact s
///   row      (1 - t) N v + t R,  R_i = alpha_i ((N v)_i - g_i v_i) + s_i v_i,  alpha_i = (1 - s_i) / max(rho_i - g_i, .1) within [0, 2],
///            s_i estimated in O(m d), t the step that fits the probed rows best, less one standard error, within [0, 1]
/// In row mode t depends on v: the method is not linear in v. Where m reaches the number of kept tokens it is exact attention.
/// q, k (n, d), v (n, d_v), out (n, d_v). O(n m (m + d + d_v) + m^3) time, O(m (d + d_v + m)) memory and some rows at a time. Not causal, no
/// key bias, keep_query must equal keep_key. Throws std::invalid_argument otherwise, and when shapes disagree or are empty.
/// Verma 2021 (paper mode, recalled from its abstract); the other modes are this library's own.
template <class T, class Landmarks = SegmentMeans, ScoreKernel Kernel = SoftmaxKernel>
  requires std::same_as<Landmarks, SegmentMeans> && std::same_as<Kernel, SoftmaxKernel>
class ShiftedNystrom {
 public:
  using Scalar = T;
  static constexpr std::string_view kName = "shifted-nystrom";

  explicit constexpr ShiftedNystrom(Landmarks landmarks = {}, SpectralShift shift = {}, Kernel kernel = {})
      : landmarks_(landmarks), shift_(shift), kernel_(kernel) {}

  bool supports(const Inputs<T>& in) const {
    return in.mask.causal == Causal::none && in.key_bias.empty() && in.q.rows() == in.k.rows() && same_masks(in);
  }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    check(in, out);
    if (is_exact(in)) return kernel_matmul(kernel_, in, out, context);
    run(in, out, context, nullptr);
  }

  /// Beside what Nystrom saves (but lse): the method as out_i = scale_i (N v)_i + shift_i v_i, and delta of the paper mode.
  struct Saved {
    detail::NystromSaved<T> nystrom{};
    std::vector<T> scale{}, shift{};
    T delta = 0;
  };

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    check(in, out);
    const auto n = static_cast<std::size_t>(in.q.rows());
    saved.nystrom.lse.resize(n);
    saved.nystrom.exact = is_exact(in);
    if (saved.nystrom.exact) return kernel_matmul(kernel_, in, out, saved.nystrom.lse, context);
    saved.scale.assign(n, T(0));
    saved.shift.assign(n, T(0));
    run(in, out, context, &saved);
  }

  /// delta, s, alpha, g and t count as constants: the gradients are those of scale_i (N v)_i + shift_i v_i.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved, const Gradients<T>& gradients,
                Context& context) const {
    detail::check_backward(kName, in, out, dout, gradients);
    saved.nystrom.check(kName, in);
    if (saved.nystrom.exact) return kernel_matmul_backward(kernel_, in, out, saved.nystrom.lse, dout, gradients, context);
    Scratch scratch = context.scratch();
    MatrixRef<T> plain = scratch.matrix<T>(out.rows(), out.cols()), dplain = scratch.matrix<T>(out.rows(), out.cols());
    MatrixRef<T> values = scratch.matrix<T>(saved.nystrom.sums.rows(), out.cols());
    const std::span<T> lse = scratch.array<T>(out.rows());
    const detail::ShiftedPinv<T> inverse{shift_.iterations, saved.delta};
    detail::landmark_values<SoftmaxKernel, T>(kernel_, inverse, saved.nystrom, values, context);
    kernel_matmul(kernel_, Inputs<T>{in.q, saved.nystrom.k_land, values, queries_only(in.mask)}, plain, lse, context);
    for (Index i = 0; i < out.rows(); ++i) {
      if (detail::keeps_query(in, i)) dplain.row(i) = saved.scale[static_cast<std::size_t>(i)] * dout.row(i);
    }
    detail::nystrom_backward<SoftmaxKernel, T>(kernel_, landmarks_, inverse, in, saved.nystrom, plain, lse, dplain, gradients, context);
    for (Index i = 0; i < out.rows(); ++i) {
      if (detail::keeps_query(in, i)) MatrixRef<T>(gradients.dv).row(i) += saved.shift[static_cast<std::size_t>(i)] * dout.row(i);
    }
  }

 private:
  bool is_exact(const Inputs<T>& in) const { return detail::covers(landmarks_.num_landmarks, in); }

  void run(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved* saved) const {
    Scratch scratch = context.scratch();
    detail::ShiftFactors<T> factors(in, landmarks_, kernel_, shift_.iterations, context, scratch);
    if (saved != nullptr) saved->nystrom.keep({factors.q_land, factors.k_land, factors.sums.leftCols(out.cols()), factors.lse});
    if (shift_.mode == ShiftMode::row) return add_row_shift(in, factors, out, context, saved);
    const bool paper = shift_.mode == ShiftMode::paper;
    const T delta = paper ? factors.paper_shift(context) : probed_shift(in, factors, context, scratch);
    if (paper) {
      factors.subtract_twice_inverted(delta, context);
    } else {
      factors.values *= 1 - delta;
    }
    kernel_matmul(kernel_, Inputs<T>{in.q, factors.k_land, factors.values.leftCols(out.cols()), queries_only(in.mask)}, out, context);
    for (const Index row : factors.rows) {
      out.row(row) += delta * in.v.row(row);
      if (saved != nullptr) save(*saved, row, paper ? T(1) : 1 - delta, delta);
    }
    if (saved != nullptr) saved->delta = paper ? delta : T(0);
  }

  static void save(Saved& saved, Index row, T scale, T shift) {
    saved.scale[static_cast<std::size_t>(row)] = scale;
    saved.shift[static_cast<std::size_t>(row)] = shift;
  }

  static bool same_masks(const Inputs<T>& in) {
    for (Index i = 0; i < in.q.rows(); ++i) {
      if (detail::keeps_query(in, i) != detail::keeps_key(in, i)) return false;
    }
    return true;
  }

  void check(const Inputs<T>& in, const MatrixRef<T>& out) const {
    detail::check(kName, in, out);
    detail::check_not_causal(kName, in);
    detail::check_no_bias(kName, in);
    if (in.q.rows() != in.k.rows()) detail::refuse(kName, "q has ", in.q.rows(), " rows, k has ", in.k.rows(), ", should be as many");
    if (!same_masks(in)) detail::refuse(kName, "keep_query and keep_key differ, should be equal");
    detail::check_kernel(kName, kernel_);
    detail::check_landmarks(kName, landmarks_);
    shift_.check(kName);
  }

  /// Probed rows floor((2 j + 1) n / (2 r)) of the n kept ones, and the exact attention of each: its output and its log-sum.
  struct Probes {
    std::span<const Index> ranks;
    MatrixRef<T> exact;
    std::span<T> lse;
  };

  Probes probe(const Inputs<T>& in, const detail::ShiftFactors<T>& factors, Context& context, Scratch& scratch) const {
    const auto n = static_cast<Index>(factors.rows.size()), r = std::min<Index>(shift_.num_probes, n);
    const std::span<Index> ranks = scratch.array<Index>(r);
    MatrixRef<T> queries = scratch.matrix<T>(r, in.q.cols());
    const Probes probes{ranks, scratch.matrix<T>(r, in.v.cols()), scratch.array<T>(r)};
    for (Index j = 0; j < r; ++j) {
      const Index rank = (2 * j + 1) * n / (2 * r);
      ranks[static_cast<std::size_t>(j)] = rank;
      queries.row(j) = in.q.row(factors.rows[static_cast<std::size_t>(rank)]);
    }
    kernel_matmul(kernel_, Inputs<T>{queries, in.k, in.v, keys_only(in.mask)}, probes.exact, probes.lse, context);
    return probes;
  }

  T probed_shift(const Inputs<T>& in, const detail::ShiftFactors<T>& factors, Context& context, Scratch& scratch) const {
    const Probes probes = probe(in, factors, context, scratch);
    const detail::ShiftedRows<T> found(in, factors, probes.ranks, context, scratch);
    T wanted = 0, available = 0;
    for (Index j = 0; j < probes.exact.rows(); ++j) {
      const auto at = static_cast<std::size_t>(j);
      wanted += std::exp(found.own_score[at] - probes.lse[at]) - found.diagonal[at];
      available += found.row_sum[at] - found.diagonal[at];
    }
    const T r = static_cast<T>(probes.exact.rows());
    return std::clamp<T>(wanted / r / std::max<T>(available / r, T(0.05)), 0, 1);
  }

  void add_row_shift(const Inputs<T>& in, const detail::ShiftFactors<T>& factors, MatrixRef<T> out, Context& context,
                     Saved* saved) const {
    constexpr Index kRows = 256;
    if (saved != nullptr) saved->delta = 0;
    const T gate = fit_gate(in, factors, context);
    out.setZero();
    const auto n = static_cast<Index>(factors.rows.size());
    context.for_each_call((n + kRows - 1) / kRows, [&](Index chunk, Context& of_worker) {
      Scratch scratch = of_worker.scratch();
      const Index first = chunk * kRows;
      const std::span<Index> some = scratch.array<Index>(std::min(kRows, n - first));
      for (std::size_t i = 0; i < some.size(); ++i) some[i] = first + static_cast<Index>(i);
      detail::ShiftedRows<T> rows(in, factors, some, of_worker, scratch);
      for (std::size_t i = 0; i < some.size(); ++i) {
        const auto r = static_cast<Index>(i), row = factors.rows[static_cast<std::size_t>(some[i])];
        out.row(row) = (1 - gate) * rows.plain.row(r).head(out.cols()) + gate * rows.shifted.row(r);
        const T alpha = rows.stretch[i];
        if (saved != nullptr) save(*saved, row, 1 - gate + gate * alpha, gate * (rows.exact_diagonal[i] - alpha * rows.diagonal[i]));
      }
    });
  }

  /// t of the row mode: with a = R - N v and b = S v - N v on the probed rows, sum a.b / sum a.a less one standard error.
  T fit_gate(const Inputs<T>& in, const detail::ShiftFactors<T>& factors, Context& context) const {
    Scratch scratch = context.scratch();
    const Probes probes = probe(in, factors, context, scratch);
    detail::ShiftedRows<T> found(in, factors, probes.ranks, context, scratch);
    const Index r = probes.exact.rows();
    const std::span<T> along = scratch.array<T>(r), size = scratch.array<T>(r);
    T total_along = 0, total_size = 0, squares = 0;
    for (Index j = 0; j < r; ++j) {
      const auto at = static_cast<std::size_t>(j);
      along[at] = size[at] = 0;
      for (Index c = 0; c < in.v.cols(); ++c) {
        const T step = found.shifted(j, c) - found.plain(j, c);
        along[at] += step * (probes.exact(j, c) - found.plain(j, c));
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

  Landmarks landmarks_;
  SpectralShift shift_;
  Kernel kernel_;
};

/// With narrow types in memory.
template <NarrowScalar T, class Landmarks, ScoreKernel Kernel>
  requires std::same_as<Landmarks, SegmentMeans> && std::same_as<Kernel, SoftmaxKernel>
class ShiftedNystrom<T, Landmarks, Kernel> : public detail::Widened<T, ShiftedNystrom<float, Landmarks, Kernel>> {
  using Wide = ShiftedNystrom<float, Landmarks, Kernel>;

 public:
  explicit constexpr ShiftedNystrom(Landmarks landmarks = {}, SpectralShift shift = {}, Kernel kernel = {})
      : detail::Widened<T, Wide>(Wide(landmarks, shift, kernel)) {}
};

static_assert(Approximator<ShiftedNystrom<float>> && Approximator<ShiftedNystrom<Eigen::half>>);

}  // namespace attn
