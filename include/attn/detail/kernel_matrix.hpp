/// The matrix of a kernel between landmarks: small, and stored.
#pragma once

#include <attn/context.hpp>
#include <attn/detail/exp2.hpp>
#include <attn/detail/gemm.hpp>
#include <attn/kernel.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <numbers>

namespace attn::detail {

/// out (m, m) <- exp(-|x_i - x_j|^2 / (2 h^2)) for x (m, d). Distances are measured from the mean of x, which keeps digits.
template <class T>
void gaussian_matrix(const GaussianKernel& kernel, const ConstMatrixRef<T>& x, MatrixRef<T> out, Context& context) {
  const ScoreParameters parameters = score_parameters(kernel, x.cols());
  const T scale = static_cast<T>(parameters.scale * std::numbers::log2e), bias = static_cast<T>(parameters.bias * std::numbers::log2e);
  Scratch scratch = context.scratch();
  MatrixRef<T> centered = scratch.matrix<T>(x.rows(), x.cols()), mean = scratch.matrix<T>(1, x.cols());
  MatrixRef<T> norms = scratch.matrix<T>(1, x.rows());
  mean.setZero();
  for (Index i = 0; i < x.rows(); ++i) mean += x.row(i) / static_cast<T>(x.rows());
  centered = x.rowwise() - mean.row(0);
  for (Index i = 0; i < x.rows(); ++i) norms(0, i) = squared_norm(centered.data() + i * x.cols(), x.cols());
  gemm<T, Left::row_major, Right::transposed>(scale, centered, centered, 0, out, context);
  for (Index i = 0; i < out.rows(); ++i) {
    T* row = out.data() + i * out.outerStride();
    for (Index j = 0; j < out.cols(); j += kLanes<T>) {
      const auto distance = broadcast(-bias) * (broadcast(norms(0, i)) + load_row(norms.data(), j, out.cols()));
      store_row(row, j, out.cols(), exp2(load_row(row, j, out.cols()) + distance));
    }
  }
}

}  // namespace attn::detail
