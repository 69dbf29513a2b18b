// error: a temporary ends before the view of it: give the matrix a name first
#include <attn/exact.hpp>

attn::Inputs<float> inputs(const attn::Matrix<float>& q) {
  return {.q = q, .k = q, .v = Eigen::VectorXf::Zero(q.rows()).eval()};
}
