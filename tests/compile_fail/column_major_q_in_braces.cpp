// error: not row-major, as Eigen::MatrixXf is not: attn::Matrix<T> y = x;
#include <attn/exact.hpp>

void call(const Eigen::MatrixXf& q, const attn::Matrix<float>& k, attn::Matrix<float>& out, attn::Context& context) {
  attn::SoftmaxAttention<float>{}.forward({.q = q, .k = k, .v = k}, out, context);
}
