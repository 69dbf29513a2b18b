// error: not row-major, as Eigen::MatrixXf is not: attn::Matrix<T> y = x;
#include <attn/matrix.hpp>

attn::ConstMatrixRef<float> view(const Eigen::MatrixXf& q) {
  return attn::ConstMatrixRef<float>(q);
}
