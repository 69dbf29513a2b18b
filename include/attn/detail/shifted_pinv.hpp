/// The core of spectral shifting.
#pragma once

#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/detail/gemm.hpp>
#include <attn/matrix.hpp>

namespace attn::detail {

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
    gemm<T>(-delta, transposed(z), dx, 1, donce, context);
    gemm<T>(1, donce, transposed(x), 0, dz, context);
    gemm<T>(-delta, dx, transposed(once), 1, dz, context);
    gemm<T>(1, transposed(z), donce, 0, dx, context);
    pinv.invert_backward<T>(a, dz, da, context);
  }
};

}  // namespace attn::detail
