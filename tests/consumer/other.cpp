#include "means.hpp"

attn::Matrix<float> by_other_unit(const attn::Matrix<float>& v) {
#ifdef _OPENMP
  attn::Context context{attn::OpenMP{.threads = 2}};
#else
  attn::Context context;
#endif
  const attn::Matrix<float> q = ones(3), k = ones(v.rows());
  attn::Matrix<float> out(q.rows(), v.cols());
  attn::SoftmaxAttention<float>{}.forward({.q = q, .k = k, .v = v}, out, context);
  return out;
}
