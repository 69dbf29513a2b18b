// error: not row-major, as Eigen::MatrixXf is not: attn::Matrix<T> y = x;
#include <attn/exact.hpp>

attn::Matrix<float> call(const Eigen::MatrixXf& q, const attn::Matrix<float>& k) {
  return attn::attention(attn::SoftmaxAttention<float>{}, q, k, k);
}
