// compiles
// flags: -march=native -DEIGEN_MAX_ALIGN_BYTES=0
#include <attn/attn.hpp>

void call(const attn::Matrix<float>& q, attn::Matrix<float>& out) {
  out = attn::attention(attn::SoftmaxAttention<float>{}, q, q, q);
}
