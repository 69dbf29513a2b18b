/// How spectral shifting ends, whatever chose the shifts: out_i = scale_i (N v)_i + shift_i v_i over the kept rows; and
/// its gradients.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/key_tiles.hpp>
#include <attn/detail/nystrom_factors.hpp>
#include <attn/engine/rows.hpp>
#include <attn/detail/shift_probes.hpp>
#include <attn/detail/shifted_pinv.hpp>
#include <attn/detail/shifted_rows.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <vector>

namespace attn::detail {

/// Whether the same tokens are kept as queries and as keys, of which there are as many.
template <class In>
bool same_masks(const In& in) {
  for (Index i = 0; i < in.q.rows(); ++i) {
    if (keeps_query(in, i) != keeps_key(in, i)) return false;
  }
  return true;
}

/// Beside what Nystrom saves (but lse): scale and shift of each row, 0 where it is dropped, and delta, N's core being Z
/// - delta Z Z.
template <class T>
struct ShiftSaved {
  NystromSaved<T> nystrom{};
  std::vector<T> scale{}, shift{};
  double delta = 0;

  void reset(Index n, bool exact) {
    nystrom.reset(n, exact);
    for (std::vector<T>* rows : {&scale, &shift}) rows->assign(exact ? 0 : nystrom.lse.size(), T(0));
    delta = 0;
  }

  void set(Index row, T row_scale, T row_shift) {
    scale[static_cast<std::size_t>(row)] = row_scale;
    shift[static_cast<std::size_t>(row)] = row_shift;
  }
};

/// values <- (Z - delta Z Z) B v, delta that of the paper mode, which it returns.
template <class T>
double set_paper_values(const ShiftLandmarks<T>& factors, int iterations, Context& context) {
  Scratch scratch = context.scratch();
  const MatrixRef<double> values = in_double<T>(factors.sums, scratch);
  const ShiftedPinv core = ShiftedPinv::of_paper(in_double<T>(factors.a, scratch), values, iterations, context);
  set_rounded<T>(factors.values, values);
  return core.delta;
}

/// out <- F values + delta v, where values are scale times those of N. saved may be null.
template <class T>
void add_one_shift(const SoftmaxKernel& kernel, const Sources<T>& in, const ShiftLandmarks<T>& factors, T scale,
                   T delta, const ResultRows<T>& out, ShiftSaved<T>* saved, Context& context) {
  Scratch scratch = context.scratch();
  MatrixRef<T> product = out.in_place() ? out.matrix() : scratch.matrix<T>(out.rows(), out.cols());
  T* buffer = scratch.elements<T>(in.v.cols());
  multiply<SoftmaxKernel, T>(kernel, {in.q, factors.k_land, factors.values, queries_only(in.mask)}, product, nullptr,
                             context);
  for (const Index row : factors.rows) {
    add_row(delta, in.v.row(row, buffer), product.row(row).data(), product.cols());
    if (saved != nullptr) saved->set(row, scale, delta);
  }
  for (Index i = 0; i < out.rows(); ++i) out.finish_row(i, product.row(i).data());
}

/// step <- gain y + added v, rows of length d. Returns |unit step|.
template <class T>
[[gnu::noinline]] T set_step(T gain, const T* y, T added, const T* v, T* step, Index d, T unit) {
  auto squares = broadcast(T(0));
  for (Index c = 0; c < d; c += kLanes<T>) {
    const auto x = multiply_add(broadcast(gain), load_row(y, c, d), broadcast(added) * load_row(v, c, d));
    const auto scaled = broadcast(unit) * x;
    squares = multiply_add(scaled, scaled, squares);
    store_row(step, c, d, x);
  }
  return std::sqrt(sum(squares));
}

/// to <- y + t step, rows of length d; y where t is 0, whatever step holds.
template <class T>
[[gnu::noinline]] void set_moved(const T* y, T t, const T* step, T* to, Index d) {
  if (!(t > 0)) {
    std::copy_n(y, d, to);
    return;
  }
  for (Index c = 0; c < d; c += kLanes<T>) {
    store_row(to, c, d, multiply_add(broadcast(t), load_row(step, c, d), load_row(y, c, d)));
  }
}

/// out <- N v + t_i (R - N v), t_i row i's part of the gate. saved may be null.
template <class T>
void add_row_shift(const ShiftGate<T>& gate, const Sources<T>& in, const ShiftFactors<T>& factors,
                   const ShiftPanels<T>& panels, const ResultRows<T>& out, ShiftSaved<T>* saved, Context& context) {
  constexpr Index kRows = 128;
  const auto n = static_cast<Index>(factors.rows.size());
  if (n < out.rows()) out.set_zero();
  context.for_each_call((n + kRows - 1) / kRows, [&](Index chunk, Context& of_worker) {
    Scratch scratch = of_worker.scratch();
    const Index first = chunk * kRows;
    const std::span<Index> ranks = scratch.array<Index>(std::min(kRows, n - first));
    std::iota(ranks.begin(), ranks.end(), first);
    const ShiftedRows<T> rows(in, factors, panels, ranks, scratch);
    MatrixRef<T> product = scratch.matrix<T>(rows.f.rows(), out.cols());
    const T one = 1;
    rows.multiply_values({&one, 0}, product);
    T *const buffer = scratch.elements<T>(out.cols()), *const step = scratch.elements<T>(out.cols());
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      const Index row = factors.rows[static_cast<std::size_t>(ranks[i])];
      const T* const y = product.row(static_cast<Index>(i)).data();
      const T gain = rows.stretch[i] - 1, added = rows.added[i];
      const T t = gate.of(set_step(gain, y, added, in.v.row(row, buffer), step, out.cols(), gate.unit));
      T* const to = out.row(row, buffer);
      set_moved(y, t, step, to, out.cols());
      out.finish_row(row, to);
      if (saved != nullptr) saved->set(row, 1 + t * gain, t * added);
    }
  });
}

/// gradients <- those of scale_i (N v)_i + shift_i v_i, scales and shifts being constants.
template <class T, class Landmarks>
void shifted_backward(const SoftmaxKernel& kernel, const Landmarks& landmarks, int iterations, const Inputs<T>& in,
                      const ShiftSaved<T>& saved, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                      const Gradients<T>& gradients, Context& context) {
  Scratch scratch = context.scratch();
  MatrixRef<T> plain = scratch.matrix<T>(out.rows(), out.cols()), dplain = scratch.matrix<T>(out.rows(), out.cols());
  MatrixRef<T> values = scratch.matrix<T>(saved.nystrom.sums.rows(), out.cols());
  const std::span<RowLog<T>> lse = scratch.array<RowLog<T>>(out.rows());
  const ShiftedPinv inverse{iterations, saved.delta};
  landmark_values<SoftmaxKernel, T>(kernel, inverse, saved.nystrom, values, context);
  multiply<SoftmaxKernel, T>(kernel, {in.q, saved.nystrom.k_land, values, queries_only(in.mask)}, plain,
                             {nullptr, lse.data()}, context);
  dplain.setZero();
  for (Index i = 0; i < out.rows(); ++i) {
    if (keeps_query(in, i)) dplain.row(i) = saved.scale[static_cast<std::size_t>(i)] * dout.row(i);
  }
  nystrom_backward<SoftmaxKernel, T>(kernel, landmarks, inverse, in, saved.nystrom, plain, lse, dplain, gradients,
                                     context);
  for (Index i = 0; i < out.rows(); ++i) {
    if (keeps_query(in, i)) MatrixRef<T>(gradients.dv).row(i) += saved.shift[static_cast<std::size_t>(i)] * dout.row(i);
  }
}

}  // namespace attn::detail
