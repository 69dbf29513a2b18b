/// Spectral shifting: Nystromformer plus a shifted identity, for spectra that decay slowly.
#pragma once

#include <attn/engine/requirements.hpp>

#include <attn/approximator.hpp>
#include <attn/detail/saved.hpp>
#include <attn/detail/shift.hpp>
#include <attn/detail/shifted_rows.hpp>
#include <attn/engine/checks.hpp>
#include <attn/engine/few_keys.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/landmarks.hpp>
#include <attn/nystrom.hpp>

#include <cmath>
#include <concepts>
#include <cstddef>
#include <initializer_list>
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

namespace detail {

/// Whether the same tokens are kept as queries and as keys, of which there are as many.
template <class In>
bool same_masks(const In& in) {
  for (Index i = 0; i < in.q.rows(); ++i) {
    if (keeps_query(in, i) != keeps_key(in, i)) return false;
  }
  return true;
}

template <class T>
using ShiftSaved = Saved<ShiftState<Arithmetic<T>>, ForwardPass<SoftmaxKernel, SegmentMeans, SpectralShift>>;

}  // namespace detail

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
/// As many queries as keys; not causal, no key bias, keep_query must equal keep_key. O(n m (m + d + d_v) + m^3) time,
/// O(m (d + d_v + m)) memory and some rows at a time. Verma 2021 (paper mode, recalled from its abstract); the other
/// modes are this library's own. The backward pass takes delta, s, alpha, g and t as constants: its gradients are those
/// of scale_i (N v)_i + shift_i v_i.
template <class T, class Landmarks = SegmentMeans, ScoreKernel Kernel = SoftmaxKernel>
  requires std::same_as<Landmarks, SegmentMeans> && std::same_as<Kernel, SoftmaxKernel>
class ShiftedNystrom : public MethodBase<ShiftedNystrom<T, Landmarks, Kernel>, T, detail::ShiftSaved<T>> {
 public:
  using Saved = detail::ShiftSaved<T>;                          ///< what backward needs
  static constexpr std::string_view kName = "shifted-nystrom";  ///< in tables and error messages
  static constexpr detail::MaskSupport kMasks{};                ///< which it takes

  /// How many landmarks, how the shift is chosen, and the kernel.
  explicit constexpr ShiftedNystrom(Landmarks landmarks = {},  // write {{.num_landmarks = 64}}
                                    SpectralShift shift = {}, Kernel kernel = {})
      : landmarks_(landmarks), shift_(shift), kernel_(kernel) {}
  ShiftedNystrom(std::initializer_list<detail::NoOption>) = delete;

  /// As Approximator says.
  bool supports(const Inputs<T>& in) const {
    return kMasks.lacks(in) == nullptr && in.q.rows() == in.k.rows() && detail::same_masks(in);
  }

  /// @{ As MethodBase says.
  void check(const detail::Sources<T>& in) const {
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

  void attend(const detail::Sources<T>& in, const detail::ResultRows<T>& out, Context& context, Saved* saved) const {
    const bool exact = detail::covers(landmarks_.num_landmarks, in);
    detail::RowLog<T>* const lse = saved != nullptr ? saved->reset(in.q.rows(), exact) : nullptr;
    if (exact) return detail::multiply<Kernel, T>(kernel_, in, out, {nullptr, lse}, context);
    Scratch scratch = context.scratch();
    const auto f = detail::NystromFactors<T>::of(kName, landmarks_, kernel_, in, scratch, context);
    if (saved != nullptr) saved->nystrom.copy(f);
    if (shift_.mode == ShiftMode::paper) return shift_by_trace(in, f, out, saved, context);
    detail::ShiftFactors<T> factors(in, kernel_, f, shift_.iterations, context, scratch);
    const auto probes = detail::probe_rows<T>(kernel_, shift_.num_probes, in, factors, context, scratch);
    if (shift_.mode == ShiftMode::row)
      return detail::add_row_shift<T>(detail::fit_gate(probes, in, factors, context), in, factors, out, saved, context);
    const T delta = detail::probed_shift(probes, in, factors, context);
    detail::set_scaled(factors.zbv, 1 - delta, factors.zbv);
    detail::add_one_shift<T>(kernel_, in, f.k_land, factors.zbv, factors.rows.numbers, 1 - delta, delta, out, saved,
                             context);
  }

  auto pass(const detail::Sources<T>& in) const {
    return detail::ForwardPass<Kernel, Landmarks, SpectralShift>::of(kernel_, in, landmarks_, shift_);
  }

  void differentiate(const Inputs<T>& in, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                     const Saved& saved, const Gradients<T>& gradients, Context& context) const {
    if (saved.nystrom.exact)
      return detail::multiply_backward<Kernel, T>(kernel_, in, out, saved.nystrom.lse, dout, gradients, context);
    const detail::ShiftedPinv core{shift_.iterations, saved.delta};
    const Nystrom<T, Landmarks, detail::ShiftedPinv, Kernel> nystrom(landmarks_, core, kernel_);
    Scratch scratch = context.scratch();
    MatrixRef<T> nv = scratch.matrix<T>(out.rows(), out.cols()), dnv = scratch.matrix<T>(out.rows(), out.cols());
    const std::span<detail::RowLog<T>> lse = scratch.array<detail::RowLog<T>>(out.rows());
    nystrom.multiply(detail::sources(in), saved.nystrom, nv, lse.data(), context);
    detail::set_zero(dnv);
    for_each_kept(in, [&](Index i, std::size_t at) { dnv.row(i) = saved.scale[at] * dout.row(i); });
    nystrom.differentiate_product(in, nv, lse, dnv, saved.nystrom, gradients, context);
    MatrixRef<T> dv = gradients.dv;
    for_each_kept(in, [&](Index i, std::size_t at) { dv.row(i) += saved.shift[at] * dout.row(i); });
  }

  constexpr auto wide() const
    requires NarrowScalar<T>
  {
    return ShiftedNystrom<float, Landmarks, Kernel>(landmarks_, shift_, kernel_);
  }
  /// @}

 private:
  template <class>
  friend struct detail::Distributed;

  /// The paper mode: out <- F (Z - delta Z Z) (B v) + delta v.
  void shift_by_trace(const detail::Sources<T>& in, const detail::NystromFactors<T>& f,
                      const detail::ResultRows<T>& out, detail::ShiftState<T>* saved, Context& context) const {
    Scratch scratch = context.scratch();
    const MatrixRef<T> a = scratch.matrix<T>(f.bv.rows(), f.bv.rows());
    detail::kernel_matrix<Kernel, T>(kernel_, f.q_land, f.k_land, a, context);
    const double delta = detail::ShiftedPinv::of_paper(a, f.bv, shift_.iterations, context).delta;
    if (saved != nullptr) saved->delta = delta;
    detail::add_one_shift<T>(kernel_, in, f.k_land, f.bv, detail::list_kept_keys(in, scratch), 1, static_cast<T>(delta),
                             out, saved, context);
  }

  /// body(i, i as an index of vectors) for the kept queries.
  template <class Body>
  static void for_each_kept(const Inputs<T>& in, const Body& body) {
    for (Index i = 0; i < in.q.rows(); ++i) {
      if (detail::keeps_query(in, i)) body(i, static_cast<std::size_t>(i));
    }
  }

  Landmarks landmarks_;
  SpectralShift shift_;
  Kernel kernel_;
};

}  // namespace attn
