/// The core of spectral shifting.
#pragma once

#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/engine/packed.hpp>
#include <attn/matrix.hpp>

#include <algorithm>
#include <concepts>

namespace attn::detail {

/// A copy of m in double.
template <class T>
MatrixRef<double> in_double(const ConstMatrixRef<T>& m, Scratch& scratch) {
  const MatrixRef<double> copy = scratch.matrix<double>(m.rows(), m.cols());
  for (Index i = 0; i < m.rows(); ++i)
    std::copy_n(m.data() + i * m.outerStride(), m.cols(), copy.data() + i * copy.outerStride());
  return copy;
}

/// to <- m, rounded.
template <class T>
void set_rounded(const MatrixRef<T>& to, const MatrixRef<double>& m) {
  for (Index i = 0; i < m.rows(); ++i) {
    for (Index j = 0; j < m.cols(); ++j) to.data()[i * to.outerStride() + j] = static_cast<T>(m(i, j));
  }
}

/// Z - delta Z Z, Z that of IterativePinv: the core of the paper mode, and of the others where delta is 0. delta is a
/// constant. In double but where delta is 0: Z Z takes the rounding of Z, and delta divides by tr(I - Z A), which may
/// be as small as what float rounds away. Its members are templates of that one type, so that only programs that call
/// them compile the kernels for it.
struct ShiftedPinv {
  int iterations;
  double delta;

  /// x <- (Z - delta Z Z) x with delta = tr((I - Z A) A) / tr(I - Z A), 0 where the divisor is at most 1e-6 m, within
  /// [0, 1].
  template <std::same_as<double> T>
  static ShiftedPinv of_paper(const MatrixRef<T>& a, const MatrixRef<T>& x, int iterations, Context& context) {
    constexpr double kLeastTrace = 1e-6;
    const Index m = a.rows();
    Scratch scratch = context.scratch();
    MatrixRef<T> z = scratch.matrix<T>(m, m), residual = scratch.matrix<T>(m, m);
    IterativePinv{.iterations = iterations}.invert<T>(a, z, context);
    gemm<T>(-1, z, a, 0, residual, context);
    add_to_diagonal(residual, 1);
    double trace = 0, product = 0;
    for (Index i = 0; i < m; ++i) {
      trace += residual(i, i);
      for (Index j = 0; j < m; ++j) product += residual(i, j) * a(j, i);
    }
    const ShiftedPinv core{iterations,
                           trace > kLeastTrace * static_cast<double>(m) ? std::clamp(product / trace, 0.0, 1.0) : 0.0};
    core.multiply(z, x, context);
    return core;
  }

  template <class T>
  void apply(MatrixRef<T> a, MatrixRef<T> x, Context& context) const {
    if (delta == 0) return IterativePinv{.iterations = iterations}.apply<T>(a, x, context);
    Scratch scratch = context.scratch();
    const MatrixRef<double> wide = in_double<T>(x, scratch), z = scratch.matrix<double>(a.rows(), a.rows());
    IterativePinv{.iterations = iterations}.invert<double>(in_double<T>(a, scratch), z, context);
    multiply(z, wide, context);
    set_rounded<T>(x, wide);
  }

  template <class T>
  void backward(MatrixRef<T> a, MatrixRef<T> x, MatrixRef<T> dx, MatrixRef<T> da, Context& context) const {
    if (delta == 0) return IterativePinv{.iterations = iterations}.backward<T>(a, x, dx, da, context);
    Scratch scratch = context.scratch();
    const MatrixRef<double> wide = in_double<T>(dx, scratch), to = scratch.matrix<double>(a.rows(), a.rows());
    differentiate(in_double<T>(a, scratch), in_double<T>(x, scratch), wide, to, context);
    set_rounded<T>(dx, wide);
    set_rounded<T>(da, to);
  }

 private:
  /// x <- z x - delta z z x.
  template <std::same_as<double> T>
  void multiply(const MatrixRef<T>& z, const MatrixRef<T>& x, Context& context) const {
    Scratch scratch = context.scratch();
    MatrixRef<T> once = scratch.matrix<T>(x.rows(), x.cols());
    gemm<T>(1, z, x, 0, once, context);
    set_scaled(x, 1, once);
    gemm<T>(-delta, z, once, 1, x, context);
  }

  /// For y = t - delta z t, t = z x: dt = dx - delta z^T dx, dz = dt x^T - delta dx t^T, dx <- z^T dt.
  template <std::same_as<double> T>
  void differentiate(const MatrixRef<T>& a, const MatrixRef<T>& x, const MatrixRef<T>& dx, const MatrixRef<T>& da,
                     Context& context) const {
    Scratch scratch = context.scratch();
    MatrixRef<T> z = scratch.matrix<T>(a.rows(), a.rows()), dz = scratch.matrix<T>(a.rows(), a.rows());
    MatrixRef<T> once = scratch.matrix<T>(x.rows(), x.cols()), donce = scratch.matrix<T>(x.rows(), x.cols());
    const IterativePinv pinv{.iterations = iterations};
    pinv.invert<T>(a, z, context);
    gemm<T>(1, z, x, 0, once, context);
    set_scaled(donce, 1, dx);
    gemm<T>(-delta, transposed(z), dx, 1, donce, context);
    gemm<T>(1, donce, transposed(x), 0, dz, context);
    gemm<T>(-delta, dx, transposed(once), 1, dz, context);
    gemm<T>(1, transposed(z), donce, 0, dx, context);
    pinv.invert_backward<T>(a, dz, da, context);
  }
};

}  // namespace attn::detail
