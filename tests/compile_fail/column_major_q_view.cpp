// error: RowMajorWithContiguousRows
#include <attn/matrix.hpp>

attn::ConstMatrixRef<float> view(const Eigen::MatrixXf& q) {
  return attn::ConstMatrixRef<float>(q);
}
