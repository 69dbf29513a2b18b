// error: of another type: attn::Matrix<T> y = x.template cast<T>
#include <attn/exact.hpp>

attn::Matrix<float> call(const attn::Matrix<double>& q, const attn::Matrix<float>& k) {
  return attn::attention(attn::SoftmaxAttention<float>{}, q, k, k);
}
