/// Spectral shifting: Nystromformer plus a shifted identity, for spectra that decay slowly.
#pragma once

#include <attn/approximator.hpp>
#include <attn/core.hpp>
#include <attn/detail/checks.hpp>
#include <attn/detail/nystrom_factors.hpp>
#include <attn/detail/shift_probes.hpp>
#include <attn/detail/shifted_pinv.hpp>
#include <attn/detail/shifted_rows.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/narrow.hpp>

#include <algorithm>
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
    dplain.setZero();
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
    const T delta = paper ? factors.paper_shift(context)
                          : detail::probed_shift(probe(in, factors, context, scratch), in, factors, context);
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

  detail::ShiftProbes<T> probe(const Inputs<T>& in, const detail::ShiftFactors<T>& factors, Context& context, Scratch& scratch) const {
    return detail::probe_rows<T>(kernel_, shift_.num_probes, in, factors, context, scratch);
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

  void add_row_shift(const Inputs<T>& in, const detail::ShiftFactors<T>& factors, MatrixRef<T> out, Context& context,
                     Saved* saved) const {
    constexpr Index kRows = 256;
    if (saved != nullptr) saved->delta = 0;
    Scratch probing = context.scratch();
    const T gate = detail::fit_gate(probe(in, factors, context, probing), in, factors, context);
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
