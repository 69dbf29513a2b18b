#include <attn/attn.hpp>

#include <iostream>

int main() {
  // 1024 tokens of 64 features: one a row
  const attn::Matrix<float> q = 0.5f * attn::Matrix<float>::Random(1024, 64);
  const attn::Matrix<float> k = 0.5f * attn::Matrix<float>::Random(1024, 64);
  const attn::Matrix<float> v = attn::Matrix<float>::Random(1024, 64);

  // Exact softmax attention in one line
  const attn::Matrix<float> softmax = attn::attention(attn::SoftmaxAttention<float>{}, q, k, v);

  // Exact Gaussian-kernel attention and Skyformer, which approximates it through 128 landmarks
  attn::Context context;  // keeps scratch memory from call to call
  attn::Matrix<float> exact(1024, 64), approximate(1024, 64);
  attn::GaussianAttention<float>{}.forward({.q = q, .k = k, .v = v}, exact, context);
  attn::Skyformer<float>{{.num_landmarks = 128}}.forward({.q = q, .k = k, .v = v}, approximate, context);

  std::cout << "softmax: " << softmax.rows() << " x " << softmax.cols() << '\n'
            << "skyformer: relative error " << (approximate - exact).norm() / exact.norm() << '\n';
}
