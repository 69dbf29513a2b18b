// error: not row-major, as Eigen::MatrixXf is not: attn::Matrix<T> y = x;
#include <attn/exact.hpp>

using EverySecondColumn = Eigen::Map<const attn::Matrix<float>, Eigen::Unaligned, Eigen::Stride<Eigen::Dynamic, 2>>;

void call(const EverySecondColumn& q, const attn::Matrix<float>& k, attn::Matrix<float>& out, attn::Context& context) {
  const attn::Inputs<float> in{.q = q, .k = k, .v = k};
  attn::SoftmaxAttention<float>{}.forward(in, out, context);
}
