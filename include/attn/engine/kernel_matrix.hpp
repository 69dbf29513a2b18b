/// The matrix of a kernel between a few tokens and a few others: small, and stored.
#pragma once

#include <attn/context.hpp>
#include <attn/engine/center.hpp>
#include <attn/engine/exp2.hpp>
#include <attn/engine/far_pairs.hpp>
#include <attn/engine/gemm.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <limits>
#include <numbers>
#include <span>

namespace attn::detail {

/// to <- x, relative to origin unless that is null; returns bias times the squared norms of its rows.
template <class T>
std::span<T> copy_centered(const ConstMatrixRef<T>& x, const T* origin, T bias, MatrixRef<T> to, Scratch& scratch) {
  const std::span<T> norms = scratch.array<T>(x.rows());
  for (Index i = 0; i < x.rows(); ++i) {
    const T* from = x.data() + i * x.outerStride();
    T* row = to.data() + i * to.outerStride();
    for (Index c = 0; c < x.cols(); ++c) row[c] = from[c] - (origin != nullptr ? origin[c] : T(0));
    norms[static_cast<std::size_t>(i)] = bias * squared_norm(row, x.cols());
  }
  return norms;
}

/// out (n, m) <- scale x_i.y_j - bias (|x_i|^2 + |y_j|^2), at most largest. For a Gaussian that is -bias |x_i - y_j|^2,
/// and computed from a center amid y, or from that difference, see far_pairs.hpp.
template <class T>
void biased_scores(T scale, T bias, T largest, const ConstMatrixRef<T>& x, const ConstMatrixRef<T>& y, MatrixRef<T> out,
                   Context& context) {
  Scratch scratch = context.scratch();
  MatrixRef<T> from = scratch.matrix<T>(x.rows(), x.cols()), to = scratch.matrix<T>(y.rows(), y.cols());
  const T* origin = bias != 0 && scale == 2 * bias ? choose_center(Sources<T>{x, y, y}, scratch) : nullptr;
  const auto norms_from = copy_centered(x, origin, bias, from, scratch),
             norms_to = copy_centered(y, origin, bias, to, scratch);
  gemm<T>(scale, from, transposed(to), 0, out, context);
  for (Index i = 0; i < out.rows(); ++i) {
    T* row = out.data() + i * out.outerStride();
    const T n_x = norms_from[static_cast<std::size_t>(i)];
    for (Index j = 0; j < out.cols(); ++j) {
      const T n_y = norms_to[static_cast<std::size_t>(j)];
      row[j] -= n_x + n_y;
      if (origin != nullptr && is_near(row[j], n_x, n_y)) {
        row[j] = -bias * squared_distance(x.data() + i * x.outerStride(), y.data() + j * y.outerStride(), x.cols());
      }
      row[j] = std::min(row[j], largest);
    }
  }
}

/// The largest of n elements.
template <class T>
T row_maximum(const T* row, Index n) {
  auto top = broadcast(std::numeric_limits<T>::lowest());
  for (Index j = 0; j < n; j += kLanes<T>) top = max(top, load_row(row, j, n, std::numeric_limits<T>::lowest()));
  return largest(top);
}

/// The sum of n elements.
template <class T>
T row_sum(const T* row, Index n) {
  auto total = broadcast(T(0));
  for (Index j = 0; j < n; j += kLanes<T>) total = total + load_row(row, j, n);
  return sum(total);
}

/// row (length n) <- exp2(row - origin); returns its sum.
template <class T>
T exponentiate(T* row, Index n, T origin) {
  auto total = broadcast(T(0));
  for (Index j = 0; j < n; j += kLanes<T>) {
    const auto weight = exp2(load_row(row, j, n, -std::numeric_limits<T>::infinity()) - broadcast(origin));
    total = total + weight;
    store_row(row, j, n, weight);
  }
  return sum(total);
}

/// row (length n) <- exp2(row), or with normalized rows what that is divided by its sum, taken relative to its maximum.
template <class T>
void weigh_row(T* row, Index n, Rows rows) {
  const T total = exponentiate(row, n, rows == Rows::normalized ? row_maximum(row, n) : T(0));
  if (rows == Rows::raw) return;
  for (Index j = 0; j < n; j += kLanes<T>) store_row(row, j, n, load_row(row, j, n) / broadcast(total));
}

/// out (n, m) <- kappa(x_i, y_j) for x (n, d) and y (m, d), rows divided by their sums if the kernel's are normalized.
/// Where kappa is at most 1, rounding does not lift it above that.
template <ScoreKernel Kernel, class T>
void kernel_matrix(const Kernel& kernel, const ConstMatrixRef<T>& x, const ConstMatrixRef<T>& y, MatrixRef<T> out,
                   Context& context) {
  const ScoreParameters parameters = score_parameters(kernel, x.cols());
  const T scale = static_cast<T>(parameters.scale * std::numbers::log2e);
  if constexpr (kMayHaveBias<Kernel>) {
    const T bias = static_cast<T>(parameters.bias * std::numbers::log2e);
    biased_scores(scale, bias, parameters.bounded() ? T(0) : std::numeric_limits<T>::infinity(), x, y, out, context);
  } else {
    gemm<T>(scale, x, transposed(y), 0, out, context);
  }
  for (Index i = 0; i < out.rows(); ++i) weigh_row(out.data() + i * out.outerStride(), out.cols(), parameters.rows);
}

}  // namespace attn::detail
