/// Spectral shifting: Nystromformer plus a shifted identity, for spectra that decay slowly.
#pragma once

#include <attn/approximator.hpp>
#include <attn/engine/checks.hpp>
#include <attn/detail/saved.hpp>
#include <attn/detail/shift_probes.hpp>
#include <attn/detail/shifted_product.hpp>
#include <attn/detail/shifted_rows.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/narrow.hpp>

#include <cmath>
#include <concepts>
#include <span>
#include <string_view>

namespace attn {

/// How the shift is chosen: paper, one delta from the landmarks' matrix alone; scalar, one delta from probed rows; row,
/// one for each row, gated by probed rows.
enum class ShiftMode { paper, scalar, row };

/// iterations as in IterativePinv; num_probes rows whose attention is computed exactly.
struct SpectralShift {
  ShiftMode mode = ShiftMode::row;  ///< how the shift is chosen
  int iterations = 6;               ///< at least 1
  int num_probes = 32;              ///< at least 1; from a single one the mode row learns nothing, and is Nystrom

  /// Whether the options are the same.
  friend bool operator==(const SpectralShift&, const SpectralShift&) = default;

  /// Throws std::invalid_argument when an option is out of range.
  void check(std::string_view who) const {
    detail::check_at_least(who, "iterations", iterations, 1);
    detail::check_at_least(who, "num_probes", num_probes, 1);
  }
};

/// softmax(s q k^T) v ~ (N + shift) v with N = F Z B of Nystromformer, g_i = N_ii, rho_i = (N 1)_i, s_i = S_ii:
///   paper    F (Z - delta Z Z) (B v) + delta v, delta = tr((I - Z A) A) / tr(I - Z A): recalled, without a bound
///   scalar   (1 - delta) N v + delta v, delta = mean(s - g) / max(mean(rho - g), .05) over probed rows with exact s
///   row      N v + t_i a_i, a_i = w_i (alpha_i ((N v)_i - g_i v_i) + s_i v_i - (N v)_i), alpha_i = (1 - s_i) /
///            (rho_i - g_i), s_i estimated in O(m d): the part w_i of the way to a row of weight s_i on itself and of
///            sum 1. w_i = min(1, (rho_i - g_i) / .1) times 1 / (alpha_i - 1) where alpha_i is above 2, 0 where rho_i
///            is at most g_i. With b = S v - N v on the probed rows, t is the step that fits them best, sum a.b /
///            sum a.a, less one standard error, within [0, 1]; at most twice the same without any one of them,
///            and at most 3/2 of the same for their diagonals, s_i - g_i and S_ii - g_i.
///            t_i = min(t, 2 max |b| / |a_i|).
/// In row mode t depends on v: the method is not linear in v. Each row's error is at most Nystrom's and twice the
/// largest of Nystrom's on the probed rows; where all rows of v are the same it is at most Nystrom's. Where m reaches
/// the number of kept tokens it is exact attention.
/// q, k (n, d), v (n, d_v), out (n, d_v). O(n m (m + d + d_v) + m^3) time, O(m (d + d_v + m)) memory and some rows at a
/// time. Not causal, no key bias, keep_query must equal keep_key. Throws std::invalid_argument otherwise, and when
/// shapes disagree or are empty. Verma 2021 (paper mode, recalled from its abstract); the other modes are this
/// library's own.
template <class T, class Landmarks = SegmentMeans, ScoreKernel Kernel = SoftmaxKernel>
  requires std::same_as<Landmarks, SegmentMeans> && std::same_as<Kernel, SoftmaxKernel>
class ShiftedNystrom {
 public:
  /// @{ As Approximator says.
  using Scalar = T;
  static constexpr std::string_view kName = "shifted-nystrom";

  /// How many landmarks, how the shift is chosen, and the kernel.
  explicit constexpr ShiftedNystrom(Landmarks landmarks = {}, SpectralShift shift = {}, Kernel kernel = {})
      : landmarks_(landmarks), shift_(shift), kernel_(kernel) {}

  template <class Stored = T>
  bool supports(const Inputs<Stored>& in) const {
    return in.mask.causal == Causal::none && in.key_bias.empty() && in.q.rows() == in.k.rows() &&
           detail::same_masks(in);
  }

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context) const {
    detail::check(kName, in, out);
    run(detail::sources(in), out, context, nullptr);
  }

  /// What backward needs, and of which inputs and options it is.
  struct Saved : detail::ShiftSaved<T> {
    detail::ForwardPass<Landmarks, SpectralShift> pass{};  ///< checked by backward
  };

  void forward(const Inputs<T>& in, MatrixRef<T> out, Context& context, Saved& saved) const {
    detail::check(kName, in, out);
    run(detail::sources(in), out, context, &saved);
  }
  /// @}

  /// delta, s, alpha, g and t count as constants: the gradients are those of scale_i (N v)_i + shift_i v_i.
  void backward(const Inputs<T>& in, ConstMatrixRef<T> out, ConstMatrixRef<T> dout, const Saved& saved,
                const Gradients<T>& gradients, Context& context) const {
    detail::check_backward(kName, in, out, dout, gradients);
    saved.pass.check(kName, kernel_, in, landmarks_, shift_);
    if (saved.nystrom.exact)
      return detail::multiply_backward<Kernel, T>(kernel_, in, out, saved.nystrom.lse, dout, gradients, context);
    detail::shifted_backward<T>(kernel_, landmarks_, shift_.iterations, in, saved, out, dout, gradients, context);
  }

 private:
  template <NarrowScalar, class>
  friend class detail::Widened;

  /// saved may be null.
  void run(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context, Saved* saved) const {
    check(in);
    const bool exact = detail::covers(landmarks_.num_landmarks, in);
    if (saved != nullptr) {
      saved->pass = {};
      saved->reset(in.q.rows(), exact);
    }
    if (exact) {
      detail::multiply<Kernel, T>(kernel_, in, out, {nullptr, saved != nullptr ? saved->nystrom.lse.data() : nullptr},
                                  context);
    } else {
      shift(in, out, context, saved);
    }
    if (saved != nullptr) saved->pass.keep(kernel_, in, landmarks_, shift_);
  }

  void shift(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context, Saved* saved) const {
    Scratch scratch = context.scratch();
    if (shift_.mode == ShiftMode::paper) {
      const detail::ShiftLandmarks<T> factors(in, landmarks_, kernel_, context, scratch);
      keep(factors, saved);
      const double delta = detail::set_paper_values(factors, shift_.iterations, context);
      if (saved != nullptr) saved->delta = delta;
      return detail::add_one_shift(kernel_, in, factors, T(1), static_cast<T>(delta), out, saved, context);
    }
    detail::ShiftFactors<T> factors(in, landmarks_, kernel_, shift_.iterations, context, scratch);
    keep(factors, saved);
    const detail::ShiftPanels<T> panels(factors, scratch);
    const auto probes = detail::probe_rows<T>(kernel_, shift_.num_probes, in, factors, context, scratch);
    if (shift_.mode == ShiftMode::row) {
      return detail::add_row_shift(detail::fit_gate(probes, in, factors, panels, context), in, factors, panels, out,
                                   saved, context);
    }
    const T delta = detail::probed_shift(probes, in, factors, panels, context);
    factors.values *= 1 - delta;
    detail::add_one_shift<T>(kernel_, in, factors, 1 - delta, delta, out, saved, context);
  }

  static void keep(const detail::ShiftLandmarks<T>& factors, Saved* saved) {
    if (saved != nullptr) saved->nystrom.keep({factors.q_land, factors.k_land, factors.sums, factors.lse.data()});
  }

  void check(const detail::Sources<T>& in) const {
    detail::check_not_causal(kName, in);
    detail::check_no_bias(kName, in);
    if (in.q.rows() != in.k.rows())
      detail::refuse(kName, "q has %td rows, k has %td, should be as many", in.q.rows(), in.k.rows());
    if (!detail::same_masks(in)) detail::refuse(kName, "keep_query and keep_key differ, should be equal");
    detail::check_kernel<T>(kName, kernel_, in.q.cols());
    const double scale = score_parameters(kernel_, in.q.cols()).scale;
    if (shift_.mode == ShiftMode::row)
      detail::check_held<T>(kName, "scale", scale, std::sqrt(2 * detail::kMostScore<T>));  // s^2 / 2
    detail::check_landmarks(kName, landmarks_);
    shift_.check(kName);
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
  /// As for float.
  explicit constexpr ShiftedNystrom(Landmarks landmarks = {}, SpectralShift shift = {}, Kernel kernel = {})
      : detail::Widened<T, Wide>(Wide(landmarks, shift, kernel)) {}
};

}  // namespace attn
