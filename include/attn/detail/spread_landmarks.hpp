/// Skyformer where the landmarks' sums over the keys are further apart than T's exponents reach, as those of tokens far
/// from one another are: what is between landmarks is then computed in double, and each landmark's values have an
/// exponent of their own, which is its key bias as a key of the queries. Slower, and of the same result where T's
/// exponents reach.
#pragma once

#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/detail/divided_rows.hpp>
#include <attn/engine/rows.hpp>
#include <attn/engine/simd.hpp>
#include <attn/engine/packed.hpp>
#include <attn/engine/few_keys.hpp>
#include <attn/detail/landmark_sums.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numbers>
#include <span>
#include <type_traits>

namespace attn::detail {

/// The type of what is between landmarks: double, unless a core of the user's takes T alone.
template <class T, class Inverse>
using WideScalar = std::conditional_t<Core<Inverse, double>, double, T>;

template <class M>
auto row_of(const M& m, Index i) {
  return m.data() + i * m.outerStride();
}

/// to <- factor from, n elements of another type.
template <class To, class From>
void convert_scaled(double factor, const From* from, To* to, Index n) {
  for (Index i = 0; i < n; ++i) to[i] = static_cast<To>(factor * static_cast<double>(from[i]));
}

/// to <- from / divisor, n elements of another type. The inverse of a small divisor could be infinite.
template <class To, class From>
void divide_row(double divisor, const From* from, To* to, Index n) {
  for (Index i = 0; i < n; ++i) to[i] = static_cast<To>(static_cast<double>(from[i]) / divisor);
}

/// Landmarks (m, d), and their sums (m, d_v + 1) over the keys relative to 2^top: the largest exponent.
template <class W>
struct WideLandmarks {
  MatrixRef<W> land, sums;
  double top;

  template <class T>
  WideLandmarks(const ConstMatrixRef<T>& landmarks, const ConstMatrixRef<T>& of_keys, std::span<const double> exponents,
                Scratch& scratch)
      : land(scratch.matrix<W>(landmarks.rows(), landmarks.cols())),
        sums(scratch.matrix<W>(of_keys.rows(), of_keys.cols())),
        top(*std::max_element(exponents.begin(), exponents.end())) {
    for (Index l = 0; l < land.rows(); ++l) {
      convert_scaled(1, row_of(landmarks, l), row_of(land, l), land.cols());
      convert_scaled(std::exp2(exponents[static_cast<std::size_t>(l)] - top), row_of(of_keys, l), row_of(sums, l),
                     sums.cols());
    }
  }
};

/// Rows [z z1 |z1|] of landmarks in T: row l of values, but for its last column, is unit_l times row l of rows, and
/// unit_l is 2^exponent e^bias_l. The largest bias is 0; that of a row of zeros is -infinity, which removes the
/// landmark.
template <class T>
struct SplitRows {
  MatrixRef<T> rows;
  std::span<T> bias;
  std::span<double> unit;
  double exponent = 0;
};

/// What a row [z z1] is measured by: |z1|, or if z is larger by far, z, so that neither overflows; 0 for a row of
/// zeros.
template <class W>
double magnitude_of(const W* row, Index d_v) {
  double largest = 0;
  bool finite = true;
  for (Index c = 0; c <= d_v; ++c) {
    const double x = std::abs(static_cast<double>(row[c])) * (c < d_v ? 0x1p-64 : 1.0);
    finite = finite && is_finite(x);
    if (is_finite(x)) largest = std::max(largest, x);
  }
  return largest > 0 || finite ? largest : 1;
}

template <class T, class W>
SplitRows<T> split_rows(const MatrixRef<W>& values, Scratch& scratch) {
  const Index m = values.rows(), d_v = values.cols() - 1;
  SplitRows<T> split{scratch.matrix<T>(m, d_v + 2), scratch.array<T>(m), scratch.array<double>(m)};
  double top = 0;
  for (Index l = 0; l < m; ++l) top = std::max(top, magnitude_of(row_of(values, l), d_v));
  split.exponent = top > 0 ? std::log2(top) : 0;
  for (Index l = 0; l < m; ++l) {
    const auto at = static_cast<std::size_t>(l);
    T* const row = row_of(split.rows, l);
    const double magnitude = magnitude_of(row_of(values, l), d_v),
                 log = std::log(magnitude) - std::numbers::ln2 * split.exponent;
    split.bias[at] = static_cast<T>(log);
    split.unit[at] = magnitude > 0 ? magnitude * std::exp(static_cast<double>(split.bias[at]) - log) : 1;
    divide_row(split.unit[at], row_of(values, l), row, d_v + 1);
    row[d_v + 1] = std::abs(row[d_v]);
  }
  return split;
}

/// The rows, of tokens and d_v columns, times 2^exponent_i each, with infinities where results overflow and nowhere
/// else.
template <class T>
void scale_by_exponent(double exponent, const T* row, T* to, Index d_v) {
  const double half = std::exp2(std::clamp(exponent, -2000.0, 2000.0) / 2);
  for (Index c = 0; c < d_v; ++c) to[c] = static_cast<T>(static_cast<double>(row[c]) * half * half);
}

/// out <- 2^exponent kappa(q, L) z for landmarks of such biases: each row relative to its largest weight until it is
/// written.
template <class T>
void raise_rows(const GaussianKernel& kernel, const Sources<T>& in, const ConstMatrixRef<T>& land,
                const MatrixRef<T>& z, std::span<const T> bias, double exponent, const ResultRows<T>& out,
                Context& context) {
  Scratch scratch = context.scratch();
  const Index most = std::min(kDividedRows, out.rows());
  MatrixRef<T> parts = scratch.matrix<T>(most, out.cols());
  const std::span<T> maximum = scratch.array<T>(most), sum = scratch.array<T>(most);
  for (Index first = 0; first < out.rows(); first += kDividedRows) {
    const Range rows{first, std::min(first + kDividedRows, out.rows())};
    const auto count = static_cast<std::size_t>(rows.last - first);
    const RowStates<T> states{maximum.first(count), sum.first(count), parts.topRows(rows.last - first)};
    multiply_partial(kernel, some_queries<T>(in, rows, land, z, bias), states, context);
    for (Index i = first; i < rows.last; ++i) {
      T* const part = &parts(i - first, 0);
      scale_by_exponent(static_cast<double>(maximum[static_cast<std::size_t>(i - first)]) + exponent, part, part,
                        out.cols());
      out.set_row(i, part);
    }
  }
}

/// out <- kappa(q, L) (kappa(L, L) + gamma I)^-1 sums for sums that are spread.
template <class T, class Inverse>
void multiply_spread(const GaussianKernel& kernel, const Inverse& inverse, const Sources<T>& in,
                     const ConstMatrixRef<T>& land, const LandmarkSums<T>& sums, const ResultRows<T>& out,
                     Context& context) {
  using W = WideScalar<T, Inverse>;
  Scratch scratch = context.scratch();
  const WideLandmarks<W> wide(land, ConstMatrixRef<T>(sums.sums), sums.exponents, scratch);
  MatrixRef<W> a = scratch.matrix<W>(land.rows(), land.rows()), values = wide.sums;
  kernel_matrix<GaussianKernel, W>(with_rows(kernel, Rows::raw), wide.land, wide.land, a, context);
  inverse.apply(a, values, context);
  SplitRows<T> split = split_rows<T>(values, scratch);
  if (kernel.rows == Rows::normalized) return divide_rows<T>(kernel, in, land, split.rows, out, context, split.bias);
  raise_rows<T>(kernel, in, land, split.rows.leftCols(out.cols()), split.bias, split.exponent + wide.top, out, context);
}

/// The gradients of raise_rows: dq, dland and dz. Rows are measured by their sums of weights, so that neither those nor
/// what they are multiplied by overflows.
template <class T>
void raise_rows_backward(const GaussianKernel& kernel, const Inputs<T>& in, const ConstMatrixRef<T>& land,
                         const MatrixRef<T>& z, std::span<const T> bias, double exponent, const ConstMatrixRef<T>& dout,
                         MatrixRef<T> dq, MatrixRef<T> dland, MatrixRef<T> dz, Context& context) {
  Scratch scratch = context.scratch();
  const Index n = dout.rows(), d_v = dout.cols();
  MatrixRef<T> scaled = scratch.matrix<T>(n, d_v), none = scratch.matrix<T>(n, d_v);
  const std::span<T> lse = scratch.array<T>(n);
  const Inputs<T> queries{in.q, land, z, queries_only(in.mask), bias};
  const GaussianKernel normalized = with_rows(kernel, Rows::normalized);
  kernel_matmul(normalized, queries, none, lse, context);
  for (Index i = 0; i < n; ++i) {
    const double log_sum = static_cast<double>(lse[static_cast<std::size_t>(i)]);
    scale_by_exponent(std::numbers::log2e * log_sum + exponent, dout.data() + i * dout.outerStride(), &scaled(i, 0),
                      d_v);
  }
  set_zero(none);  // sums of weights are constants here
  kernel_matmul_backward(normalized, queries, none, lse, scaled, {dq, dland, dz}, context);
}

/// dland <- the gradient by landmarks (m, d) of kappa(L, L) = a, for its gradient da, which is overwritten:
///   2 b (S L - diag(S 1) L)    with S = da a + (da a)^T element by element and kappa = exp(-b |x - y|^2)
template <class T, class W>
void landmark_matrix_backward(const GaussianKernel& kernel, const MatrixRef<W>& land, const MatrixRef<W>& a,
                              MatrixRef<W> da, MatrixRef<T> dland, Context& context) {
  Scratch scratch = context.scratch();
  const Index m = land.rows();
  const W twice_b = static_cast<W>(2 * score_parameters(kernel, land.cols()).bias);
  MatrixRef<W> product = scratch.matrix<W>(m, land.cols());
  for (Index i = 0; i < m; ++i) {
    for (Index j = 0; j < i; ++j) da(i, j) = da(j, i) = da(i, j) * a(i, j) + da(j, i) * a(j, i);
    da(i, i) = 0;
  }
  gemm<W>(twice_b, da, land, 0, product, context);
  for (Index i = 0; i < m; ++i) {
    add_row(-twice_b * row_sum(row_of(da, i), m), row_of(land, i), row_of(product, i), land.cols());
    convert_scaled(1, row_of(product, i), row_of(dland, i), land.cols());
  }
}

/// The gradients of sum_over_keys for dsums, that by the sums relative to 2^top: each landmark's weights are measured
/// by what they add up to, and so is its gradient.
template <class T, class W>
void spread_sums_backward(const GaussianKernel& kernel, const Inputs<T>& in, const KeyBias<T>& bias,
                          const ConstMatrixRef<T>& land, const ConstMatrixRef<T>& sums,
                          std::span<const double> exponents, double top, const MatrixRef<W>& dsums,
                          const Gradients<T>& to, std::span<T> dbias, Context& context) {
  Scratch scratch = context.scratch();
  const Index m = land.rows(), d_v = in.v.cols();
  MatrixRef<T> scaled = scratch.matrix<T>(m, d_v + 1), none = scratch.matrix<T>(m, d_v + 1);
  const std::span<T> lse = scratch.array<T>(m);
  const double common = common_exponent(kernel, bias);
  for (Index l = 0; l < m; ++l) {
    const auto at = static_cast<std::size_t>(l);
    const double log_sum = exponents[at] - common + std::log2(static_cast<double>(sums(l, d_v)));
    lse[at] = static_cast<T>(std::numbers::ln2 * log_sum);
    const double factor = std::exp(static_cast<double>(lse[at]) + std::numbers::ln2 * (common - top));
    convert_scaled(factor, row_of(dsums, l), row_of(scaled, l), d_v + 1);
  }
  set_zero(none);  // sums of weights are constants here
  sum_over_keys_backward<T>(with_rows(kernel, Rows::normalized), in, bias.relative, land, none, lse, scaled, to, dbias,
                            context);
}

/// dq, dland (m, d) and dz (m, d_v + 1) <- the gradients of kappa(q, L) [z z1], its rows divided by their sums if
/// normalized.
template <class T>
void spread_queries_backward(const GaussianKernel& kernel, const Inputs<T>& in, const ConstMatrixRef<T>& land,
                             SplitRows<T> z, double top, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                             MatrixRef<T> dq, MatrixRef<T> dland, MatrixRef<T> dz, Context& context) {
  const Index d_v = dout.cols();
  if (kernel.rows == Rows::normalized) {
    return divide_rows_backward<T>(kernel, in, land, z.rows.leftCols(d_v + 1), out, dout, dq, dland, dz, context,
                                   z.bias);
  }
  dz.col(d_v).setZero();
  raise_rows_backward<T>(kernel, in, land, z.rows.leftCols(d_v), z.bias, z.exponent + top, dout, dq, dland,
                         dz.leftCols(d_v), context);
}

/// to, dland and dbias <- the gradients of multiply_spread.
template <class T, class Inverse>
void multiply_spread_backward(const GaussianKernel& kernel, const Inverse& inverse, const Inputs<T>& in,
                              const KeyBias<T>& bias, const ConstMatrixRef<T>& land, const ConstMatrixRef<T>& sums,
                              std::span<const double> exponents, const ConstMatrixRef<T>& out,
                              const ConstMatrixRef<T>& dout, const Gradients<T>& to, MatrixRef<T> dland,
                              std::span<T> dbias, Context& context) {
  using W = WideScalar<T, Inverse>;
  Scratch scratch = context.scratch();
  const Index m = land.rows(), columns = sums.cols();
  const WideLandmarks<W> wide(land, sums, exponents, scratch);
  MatrixRef<W> a = scratch.matrix<W>(m, m), kernel_of_land = scratch.matrix<W>(m, m), da = scratch.matrix<W>(m, m);
  MatrixRef<W> values = scratch.matrix<W>(m, columns), dsums = scratch.matrix<W>(m, columns);
  MatrixRef<T> added = scratch.matrix<T>(m, land.cols()), dz = scratch.matrix<T>(m, columns);
  kernel_matrix<GaussianKernel, W>(with_rows(kernel, Rows::raw), wide.land, wide.land, kernel_of_land, context);
  set_scaled(a, 1, kernel_of_land);
  set_scaled(values, 1, wide.sums);
  inverse.apply(a, values, context);
  const SplitRows<T> z = split_rows<T>(values, scratch);
  spread_queries_backward(kernel, in, land, z, wide.top, out, dout, to.dq, dland, dz, context);
  for (Index l = 0; l < m; ++l)
    divide_row(z.unit[static_cast<std::size_t>(l)], row_of(dz, l), row_of(dsums, l), columns);
  set_scaled(a, 1, kernel_of_land);
  inverse.backward(a, wide.sums, dsums, da, context);
  landmark_matrix_backward<T>(kernel, wide.land, kernel_of_land, da, added, context);
  dland += added;
  spread_sums_backward(kernel, in, bias, land, sums, exponents, wide.top, dsums, {added, to.dk, to.dv}, dbias, context);
  dland += added;
}

}  // namespace attn::detail
