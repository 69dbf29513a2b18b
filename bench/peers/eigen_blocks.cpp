#include "blocks.hpp"
#include "peer.hpp"

namespace bench {
namespace {

using Const = attn::ConstMatrixRef<float>;
using Mutable = attn::MatrixRef<float>;

void forward(const attn::Inputs<float>& in, Mutable out, attn::Context& context) {
  const float scale = softmax_scale(in.q.cols());
  attend_in_blocks(
      in, out, context, [=](Const a, Const b, Mutable c) { c.noalias() = (scale * a) * b.transpose(); },
      [](Const a, Const b, Mutable c) { c.noalias() = a * b; });
}

}  // namespace

Peer eigen_blocks() {
  Eigen::setNbThreads(1);
  return {.name = "eigen_blocks", .has_causal = true, .forward = forward};
}

}  // namespace bench
