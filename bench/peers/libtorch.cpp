#include "peer.hpp"

#include <ATen/core/ivalue.h>  // ahead of the others: Clang 14 takes them for C++20 only so
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>

namespace bench {
namespace {

at::Tensor view(const attn::ConstMatrixRef<float>& m) {
  return at::from_blob(const_cast<float*>(m.data()), {m.rows(), m.cols()}, {m.outerStride(), 1}, at::kFloat);
}

void forward(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context&) {
  const at::NoGradGuard inference;
  const at::Tensor scores = at::matmul(view(in.q) / std::sqrt(static_cast<double>(in.q.cols())), view(in.k).t());
  at::Tensor result = view(out);
  at::matmul_out(result, at::softmax(scores, 1), view(in.v));
}

}  // namespace

Peer libtorch() {
  at::set_num_threads(1);
  return {.name = "libtorch", .has_causal = false, .forward = forward};
}

}  // namespace bench
