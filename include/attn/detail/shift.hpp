/// Spectral shifting: its core, how shifts are chosen from some rows whose attention is computed exactly, and how it
/// ends, out_i = scale_i (N v)_i + shift_i v_i over the kept rows.
#pragma once

#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/detail/shifted_rows.hpp>
#include <attn/detail/wide_copies.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>
#include <attn/nystrom.hpp>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

namespace attn::detail {

/// Z - delta Z Z, Z that of IterativePinv: the core of the paper mode, and of the others where delta is 0. delta is a
/// constant. In double but where delta is 0: Z Z takes the rounding of Z, and delta divides by tr(I - Z A), which may
/// be as small as what float rounds away. Its members are templates of that one type, so that only programs that call
/// them compile the kernels for it.
struct ShiftedPinv {
  int iterations;
  double delta;

  /// x <- (Z - delta Z Z) x with delta = tr((I - Z A) A) / tr(I - Z A), 0 where the divisor is at most 1e-6 m, within
  /// [0, 1].
  template <class T>
  static ShiftedPinv of_paper(const MatrixRef<T>& a, const MatrixRef<T>& x, int iterations, Context& context) {
    Scratch scratch = context.scratch();
    const MatrixRef<DoubleWith<T>> wide_a = in_type<double>(a, scratch, context), z = like(wide_a, scratch),
                                   wide_x = in_type<double>(x, scratch, context);
    ShiftedPinv core{iterations, 0};
    core.pinv().invert<double>(wide_a, z, context);
    core.delta = delta_of(wide_a, z, context);
    core.multiply(z, wide_x, context);
    set_converted(x, wide_x, context);
    return core;
  }

  /// @{ As Core says.
  void check(std::string_view who) const { pinv().check(who); }

  template <class T>
  void apply(MatrixRef<T> a, MatrixRef<T> x, Context& context) const {
    if (delta == 0) return pinv().apply<T>(a, x, context);
    Scratch scratch = context.scratch();
    const MatrixRef<DoubleWith<T>> wide_a = in_type<double>(a, scratch, context), z = like(wide_a, scratch),
                                   wide_x = in_type<double>(x, scratch, context);
    pinv().invert<double>(wide_a, z, context);
    multiply(z, wide_x, context);
    set_converted(x, wide_x, context);
  }

  template <class T>
  void backward(MatrixRef<T> a, MatrixRef<T> x, MatrixRef<T> dx, MatrixRef<T> da, Context& context) const {
    if (delta == 0) return pinv().backward<T>(a, x, dx, da, context);
    Scratch scratch = context.scratch();
    const MatrixRef<DoubleWith<T>> wide_dx = in_type<double>(dx, scratch, context),
                                   wide_da = result_in_type<double>(da, scratch);
    differentiate(in_type<double>(a, scratch, context), in_type<double>(x, scratch, context), wide_dx, wide_da,
                  context);
    set_converted(dx, wide_dx, context);
    set_converted(da, wide_da, context);
  }
  /// @}

 private:
  IterativePinv pinv() const { return {.iterations = iterations}; }

  template <class T>
  static MatrixRef<T> like(const MatrixRef<T>& m, Scratch& scratch) {
    return scratch.matrix<T>(m.rows(), m.cols());
  }

  template <std::same_as<double> T>
  static T delta_of(const MatrixRef<T>& a, const MatrixRef<T>& z, Context& context) {
    constexpr T kLeastTrace = 1e-6;
    Scratch scratch = context.scratch();
    const MatrixRef<T> residual = like(a, scratch);
    gemm<T>(-1, z, a, 0, residual, context);
    add_to_diagonal(residual, 1);
    T trace = 0, product = 0;
    for (Index i = 0; i < a.rows(); ++i) {
      trace += residual(i, i);
      for (Index j = 0; j < a.rows(); ++j) product += residual(i, j) * a(j, i);
    }
    return trace > kLeastTrace * static_cast<T>(a.rows()) ? std::clamp<T>(product / trace, 0, 1) : 0;
  }

  /// x <- z x - delta z z x.
  template <std::same_as<double> T>
  void multiply(const MatrixRef<T>& z, const MatrixRef<T>& x, Context& context) const {
    Scratch scratch = context.scratch();
    const MatrixRef<T> once = like(x, scratch);
    gemm<T>(1, z, x, 0, once, context);
    set_scaled(x, 1, once);
    gemm<T>(-delta, z, once, 1, x, context);
  }

  /// For y = t - delta z t, t = z x: dt = dx - delta z^T dx, dz = dt x^T - delta dx t^T, dx <- z^T dt.
  template <std::same_as<double> T>
  void differentiate(const MatrixRef<T>& a, const MatrixRef<T>& x, const MatrixRef<T>& dx, const MatrixRef<T>& da,
                     Context& context) const {
    Scratch scratch = context.scratch();
    const MatrixRef<T> z = like(a, scratch), dz = like(a, scratch), once = like(x, scratch), donce = like(x, scratch);
    pinv().invert<T>(a, z, context);
    gemm<T>(1, z, x, 0, once, context);
    set_scaled(donce, 1, dx);
    gemm<T>(-delta, transposed(z), dx, 1, donce, context);
    gemm<T>(1, donce, transposed(x), 0, dz, context);
    gemm<T>(-delta, dx, transposed(once), 1, dz, context);
    gemm<T>(1, transposed(z), donce, 0, dx, context);
    pinv().invert_backward<T>(a, dz, da, context);
  }
};

/// Beside what Nystrom saves (but lse): scale and shift of each row, 0 where it is dropped, and delta, N's core being Z
/// - delta Z Z.
template <class T>
struct ShiftState {
  NystromState<T> nystrom{};
  std::vector<T> scale{}, shift{};
  double delta = 0;

  /// For a forward pass of n queries; returns where lse is to be written if the method is exact.
  RowLog<T>* reset(Index n, bool exact) {
    for (std::vector<T>* rows : {&scale, &shift}) rows->assign(exact ? 0 : static_cast<std::size_t>(n), T(0));
    delta = 0;
    return nystrom.reset(n, exact);
  }

  void set(Index row, T row_scale, T row_shift) {
    scale[static_cast<std::size_t>(row)] = row_scale;
    shift[static_cast<std::size_t>(row)] = row_shift;
  }
};

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
  const Index n = factors.rows.count, r = std::min(num_probes, n);
  const std::span<Index> ranks = scratch.array<Index>(r);
  MatrixRef<T> queries = scratch.matrix<T>(r, in.q.cols());
  const ShiftProbes<T> probes{ranks, scratch.matrix<T>(r, in.v.cols()), scratch.array<T>(r)};
  for (Index j = 0; j < r; ++j) {
    const Index rank = (2 * j + 1) * n / (2 * r);
    ranks[static_cast<std::size_t>(j)] = rank;
    in.q.copy_row(factors.row(rank), queries.row(j).data());
  }
  multiply<SoftmaxKernel, T>(kernel, {queries, in.k, in.v, keys_only(in.mask)}, probes.exact, probes.lse.data(),
                             context);
  return probes;
}

/// delta of the scalar mode: mean(s - g) / max(mean(rho - g), .05) over the probed rows.
template <class T>
T probed_shift(const ShiftProbes<T>& probes, const Sources<T>& in, const ShiftFactors<T>& factors, Context& context) {
  Scratch scratch = context.scratch();
  const ShiftedRows<T> found(in, factors, probes.ranks, scratch);
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
                      Context& context) {
  constexpr double kAlone = 2, kDiagonal = 1.5, kReach = 2;
  Scratch scratch = context.scratch();
  const ShiftedRows<T> found(in, factors, probes.ranks, scratch);
  const Index r = probes.exact.rows();
  MatrixRef<T> plain = scratch.matrix<T>(r, in.v.cols()), v = scratch.matrix<T>(r, in.v.cols());
  found.multiply_values(plain);
  for (Index j = 0; j < r; ++j) {
    in.v.copy_row(factors.row(probes.ranks[static_cast<std::size_t>(j)]), &v(j, 0));
  }
  const T unit =
      unit_of(std::max({largest_magnitude<T>(plain), largest_magnitude<T>(probes.exact), largest_magnitude<T>(v)}));
  const StepSums rows(r, scratch), diagonal(r, scratch);
  const double largest = set_row_sums<T>(found, plain, probes.exact, v, unit, rows);
  set_diagonal_sums(probes, found, diagonal);
  const double t = std::min({rows.fit(), kAlone * rows.worst_fit(), kDiagonal * diagonal.fit()});
  return {static_cast<T>(t), static_cast<T>(kReach * largest), unit};
}

/// out <- F zbv + delta v, where zbv are scale times those of N, over the kept rows. saved may be null.
template <class T>
void add_one_shift(const SoftmaxKernel& kernel, const Sources<T>& in, const ConstMatrixRef<T>& k_land,
                   const ConstMatrixRef<T>& zbv, std::span<const Index> rows, T scale, T delta,
                   const ResultRows<T>& out, ShiftState<T>* saved, Context& context) {
  Scratch scratch = context.scratch();
  const MatrixRef<T> product = out.in_place() ? out.matrix() : scratch.matrix<T>(out.rows(), out.cols());
  T* const buffer = scratch.elements<T>(in.v.cols());
  multiply<SoftmaxKernel, T>(kernel, {in.q, k_land, zbv, queries_only(in.mask)}, product, nullptr, context);
  for (const Index row : rows) {
    add_row(delta, in.v.row(row, buffer), row_of(product, row), product.cols());
    if (saved != nullptr) saved->set(row, scale, delta);
  }
  for (Index i = 0; i < out.rows(); ++i) out.finish_row(i, row_of(product, i));
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

/// out <- N v + t_i (R - N v), t_i row i's part of the gate. saved may be null.
template <class T>
void add_row_shift(const ShiftGate<T>& gate, const Sources<T>& in, const ShiftFactors<T>& factors,
                   const ResultRows<T>& out, ShiftState<T>* saved, Context& context) {
  constexpr Index kRows = 128;
  const auto n = static_cast<Index>(factors.rows.numbers.size());
  if (n < out.rows()) out.set_zero();
  context.for_each_call((n + kRows - 1) / kRows, [&](Index chunk, Context& of_worker) {
    Scratch scratch = of_worker.scratch();
    const Index first = chunk * kRows;
    const std::span<Index> ranks = scratch.array<Index>(std::min(kRows, n - first));
    for (std::size_t i = 0; i < ranks.size(); ++i) ranks[i] = first + static_cast<Index>(i);
    const ShiftedRows<T> rows(in, factors, ranks, scratch);
    const MatrixRef<T> product = scratch.matrix<T>(rows.f.rows(), out.cols());
    rows.multiply_values(product);
    T *const buffer = scratch.elements<T>(out.cols()), *const step = scratch.elements<T>(out.cols());
    for (std::size_t i = 0; i < ranks.size(); ++i) {
      const Index row = factors.row(ranks[i]);
      const T* const y = row_of(product, static_cast<Index>(i));
      const T gain = rows.stretch[i] - 1, added = rows.added[i];
      const T t = gate.of(set_step(gain, y, added, in.v.row(row, buffer), step, out.cols(), gate.unit));
      T* const to = out.row(row, buffer);
      std::copy_n(y, out.cols(), to);
      if (t > 0) add_row(t, step, to, out.cols());  // else step may hold anything
      out.finish_row(row, to);
      if (saved != nullptr) saved->set(row, 1 + t * gain, t * added);
    }
  });
}

}  // namespace attn::detail
