// Two equal keys share every query's weight, so each row of the result is the mean of the two values.
#include <attn/attn.hpp>

#include <cmath>
#include <iostream>

int main() {
  const attn::Matrix<float> q = attn::Matrix<float>::Ones(3, 4), k = attn::Matrix<float>::Ones(2, 4);
  attn::Matrix<float> v(2, 1);
  v << 1.0f, 3.0f;
  const attn::Matrix<float> out = attn::attention(attn::SoftmaxAttention<float>{}, q, k, v);
  std::cout << "attn " << ATTN_VERSION_MAJOR << '.' << ATTN_VERSION_MINOR << '.' << ATTN_VERSION_PATCH << ": " << out.transpose() << '\n';
  return out.rows() == 3 && out.cols() == 1 && std::abs(out.mean() - 2.0f) < 1e-6f ? 0 : 1;
}
