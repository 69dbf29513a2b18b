#include "blocks.hpp"

#include <ATen/core/ivalue.h>  // ahead of the others: Clang 14 takes them for C++20 only so
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <malloc.h>

#include <limits>

namespace bench {
namespace {

using at::Tensor;

Tensor tensor(const ConstView& m) {
  return at::from_blob(const_cast<float*>(m.data()), {m.rows(), m.cols()}, {m.outerStride(), 1}, at::kFloat);
}

void forward(const attn::Inputs<float>& in, View out, attn::Context& context) {
  const at::NoGradGuard inference;
  const bool causal = in.mask.causal != attn::Causal::none;
  const float scale = softmax_scale(in.q.cols());
  attn::Scratch scratch = context.scratch();
  in_blocks_of_queries(in, out, scratch, [=](ConstView q, ConstView k, ConstView v, View weights, View block) {
    Tensor scores = tensor(weights), result = tensor(block);
    at::matmul_out(scores, tensor(q) * scale, tensor(k).t());
    if (causal) {
      const Tensor future = at::full({q.rows(), q.rows()}, -std::numeric_limits<float>::infinity()).triu_(1);
      scores.narrow(1, k.rows() - q.rows(), q.rows()).add_(future);
    }
    at::matmul_out(result, at::softmax(scores, 1), tensor(v));
  });
}

/// A^+ by six iterations, as iterate_pinv.
Tensor pinv(const Tensor& a) {
  const Tensor identity = at::eye(a.size(0));
  Tensor z = a.t() / (a.abs().sum(0).max() * a.abs().sum(1).max());
  for (int iteration = 0; iteration < 6; ++iteration) {
    const Tensor az = at::matmul(a, z);
    const Tensor inner = 15 * identity - at::matmul(az, 7 * identity - az);
    z = at::matmul(z, 13 * identity - at::matmul(az, inner)) / 4;
  }
  return z;
}

/// The whole factors as tensors, multiplied in the cheapest order.
void nystrom(const attn::Inputs<float>& in, View out, attn::Context&) {
  const at::NoGradGuard inference;
  const Index d = in.q.cols();
  const Tensor q = tensor(in.q) * softmax_scale(d), k = tensor(in.k);
  const Tensor q_land = q.view({kPeerLandmarks, -1, d}).mean(1), k_land = k.view({kPeerLandmarks, -1, d}).mean(1);
  const Tensor of_queries = at::softmax(at::matmul(q, k_land.t()), 1);
  const Tensor of_landmarks = at::softmax(at::matmul(q_land, k_land.t()), 1);
  const Tensor of_keys = at::softmax(at::matmul(q_land, k.t()), 1);
  Tensor result = tensor(out);
  at::matmul_out(result, of_queries, at::matmul(pinv(of_landmarks), at::matmul(of_keys, tensor(in.v))));
}

}  // namespace

Peer libtorch() {
  at::set_num_threads(1);
  mallopt(M_MMAP_MAX, 0);  // or the system would clear the pages of every large tensor anew
  mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
  return {.name = "libtorch", .forward = forward, .nystrom = nystrom};
}

}  // namespace bench
