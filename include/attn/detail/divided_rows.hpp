/// Rows of a low-rank product divided by its own row sums, and their gradients: Skyformer's normalized rows.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/tokens.hpp>
#include <attn/kernel.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>
#include <type_traits>

namespace attn::detail {

/// The divisor of a row of F [z z1 |z1|], whose last two columns these are: kept above 1e-6 of the sum of its terms'
/// magnitudes.
template <class T>
T guarded_divisor(T sum, T magnitude) {
  return std::max(sum, T(1e-6) * magnitude);
}

/// body(first, queries) for some queries of a call at a time, from the first on, with their masks, on landmarks; bias:
/// those of the landmarks, or empty.
template <class T, class Body>
void for_some_queries(const Sources<T>& in, const ConstMatrixRef<T>& land, const ConstMatrixRef<T>& values,
                      std::span<const T> bias, const Body& body) {
  constexpr Index kQueries = 4096;  // to keep the extra columns small
  for (Index first = 0; first < in.q.rows(); first += kQueries) {
    const Index count = std::min(kQueries, in.q.rows() - first);
    RowMask mask = queries_only(in.mask);
    if (!mask.keep_query.empty()) mask.keep_query = part_of(mask.keep_query, first, count);
    body(first, Sources<T>{in.q.middle_rows(first, count), land, values, mask, bias});
  }
}

/// out <- (F z) / max(F z1, 1e-6 F |z1|) for values = [z z1 |z1|], F = kappa(q, L) up to a factor of each row, which
/// cancels: its rows are normalised, so that queries far from every landmark stay finite. bias: where given, landmark l
/// weighs e^bias_l times as much.
template <class T>
void divide_rows(const GaussianKernel& kernel, const Sources<T>& in, const ConstMatrixRef<T>& land,
                 const MatrixRef<T>& values, const ResultRows<T>& out, Context& context,
                 std::type_identity_t<std::span<const T>> bias = {}) {
  const Index d_v = out.cols();
  for_some_queries<T>(in, land, values, bias, [&](Index first, const Sources<T>& queries) {
    Scratch scratch = context.scratch();
    MatrixRef<T> parts = scratch.matrix<T>(queries.q.rows(), d_v + 2);
    multiply<GaussianKernel, T>(kernel, queries, parts, nullptr, context);
    for (Index i = 0; i < parts.rows(); ++i) {
      auto part = parts.row(i);
      const T divisor = guarded_divisor(part(d_v), part(d_v + 1));
      if (divisor == 0) {
        part.setZero();
      } else {
        part.head(d_v) /= divisor;
      }
      out.set_row(first + i, part.data());
    }
  });
}

/// dparts_i, on entry (F [z z1 |z1|])_i, <- its gradient for dout_i; out_i and dout_i have d_v elements.
template <class T>
void divide_row_backward(const T* out, const T* dout, Index d_v, T* parts) {
  const T sum = parts[d_v], floor = T(1e-6) * parts[d_v + 1], divisor = std::max(sum, floor);
  const T factor = divisor == 0 ? T(0) : 1 / divisor, along = -factor * dot_product(out, dout, d_v);
  for (Index c = 0; c < d_v; ++c) parts[c] = factor * dout[c];
  parts[d_v] = sum >= floor ? along : T(0);
  parts[d_v + 1] = sum >= floor ? T(0) : T(1e-6) * along;
}

/// The gradients of divide_rows: dq (n_q, d), dland (m, d), and dvalues (m, d_v + 1) by [z z1], where values hold no
/// |z1| yet.
template <class T>
void divide_rows_backward(const GaussianKernel& kernel, const Inputs<T>& in, const ConstMatrixRef<T>& land,
                          const MatrixRef<T>& solved, const ConstMatrixRef<T>& out, const ConstMatrixRef<T>& dout,
                          MatrixRef<T> dq, MatrixRef<T> dland, MatrixRef<T> dvalues, Context& context,
                          std::type_identity_t<std::span<const T>> bias = {}) {
  Scratch scratch = context.scratch();
  const Index m = land.rows(), d_v = out.cols(), n = out.rows();
  MatrixRef<T> values = scratch.matrix<T>(m, d_v + 2), dall = scratch.matrix<T>(m, d_v + 2);
  MatrixRef<T> parts = scratch.matrix<T>(n, d_v + 2), dparts = scratch.matrix<T>(n, d_v + 2);
  const std::span<RowLog<T>> lse = scratch.array<RowLog<T>>(n);
  values.leftCols(d_v + 1) = solved;
  values.col(d_v + 1) = solved.col(d_v).cwiseAbs();
  const Inputs<T> queries{in.q, land, values, queries_only(in.mask), bias};
  multiply<GaussianKernel, T>(kernel, sources(queries), parts, {nullptr, lse.data()}, context);
  for (Index i = 0; i < n; ++i) {
    dparts.row(i).setZero();
    if (!keeps_query(in, i)) continue;
    dparts.row(i) = parts.row(i);
    divide_row_backward(row_of(out, i), row_of(dout, i), d_v, row_of(dparts, i));
  }
  multiply_backward<GaussianKernel, T>(kernel, queries, parts, lse, dparts, {dq, dland, dall}, context);
  dvalues = dall.leftCols(d_v + 1);
  for (Index j = 0; j < m; ++j) dvalues(j, d_v) += std::copysign(T(1), values(j, d_v)) * dall(j, d_v + 1);
}

}  // namespace attn::detail
