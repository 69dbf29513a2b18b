// error: attn::OpenMP needs -fopenmp .CMake: link OpenMP::OpenMP_CXX.
#include <attn/attn.hpp>

void call(const attn::Matrix<float>& q, attn::Matrix<float>& out) {
  attn::Context context{attn::OpenMP{.threads = 2}};
  attn::SoftmaxAttention<float>{}.forward({.q = q, .k = q, .v = q}, out, context);
}
