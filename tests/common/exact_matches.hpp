/// Exact attention beside the oracle: results and gradients, by every kernel.
#pragma once

#include <attn/exact.hpp>
#include <attn/kernel.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <string>
#include <type_traits>

namespace test {

/// What results of T may be off by, relative.
template <class T>
inline constexpr double kTolerance = std::is_same_v<T, Eigen::half> ? 2e-3
                                     : sizeof(T) == 2               ? 1.6e-2
                                                                    : kExactTolerance<T>;

/// Inputs in words, with where they are in the sequence.
template <class T>
std::string text(const Inputs<T>& in) {
  const Mask& mask = in.mask;
  return describe(in) + ", window " + std::to_string(mask.window) + ", sinks " + std::to_string(mask.num_sinks) +
         ", offset " + std::to_string(mask.first_query - mask.first_key) + ", slope " + std::to_string(in.alibi_slope);
}

/// Results and gradients are the oracle's.
template <class T, class Kernel>
void expect_matches(const Kernel& kernel, const reference::Kernel& oracle, const Inputs<T>& in) {
  const attn::ExactAttention<T, Kernel> method{kernel};
  typename attn::ExactAttention<T, Kernel>::Saved saved;
  const reference::Problem p = to_reference(in);
  Matrix<T> out(in.q.rows(), in.v.cols()), dq(in.q.rows(), in.q.cols()), dk(in.k.rows(), in.k.cols()),
      dv(in.v.rows(), in.v.cols());
  const Matrix<T> dout = Random(3).normal(out.rows(), out.cols()).template cast<T>();
  Context context;
  method.forward(in, out, context, saved);
  method.backward(in, out, dout, saved, {dq, dk, dv}, context);
  EXPECT_LE(relative_error(out, attend(oracle, p).out), kTolerance<T>);
  Matrix<T> inference(in.q.rows(), in.v.cols());
  method.forward(in, inference, context);
  EXPECT_LE(relative_error(inference, attend(oracle, p).out), kTolerance<T>);
  const auto expected = attend_backward(oracle, p, dout.template cast<double>());
  const auto error = [&](const Matrix<T>& gradient, const reference::Matrix& of_oracle) {  // of rows of one key it is 0
    return (gradient.template cast<double>() - of_oracle).norm() /
           (of_oracle.norm() + dout.template cast<double>().norm());
  };
  EXPECT_LE(error(dq, expected.dq), 5 * kTolerance<T>);
  EXPECT_LE(error(dk, expected.dk), 5 * kTolerance<T>);
  EXPECT_LE(error(dv, expected.dv), 5 * kTolerance<T>);
}

/// So they are by every kernel.
template <class T>
void expect_all_kernels_match(const Inputs<T>& in) {
  SCOPED_TRACE(text(in));
  const Index d = in.q.cols();
  expect_matches(attn::SoftmaxKernel{}, reference::softmax_kernel(d), in);
  for (const attn::Rows rows : {attn::Rows::raw, attn::Rows::normalized}) {
    expect_matches(attn::GaussianKernel{.rows = rows},
                   reference::gaussian_kernel(d, {}, rows == attn::Rows::normalized), in);
  }
}

}  // namespace test
