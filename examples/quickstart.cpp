#include <attn/attn.hpp>

#include <iostream>

int main() {
  // 4096 tokens of 64 features, one a row, each much like the one before it
  attn::Matrix<float> x = attn::Matrix<float>::Random(4096, 64);
  for (attn::Index i = 1; i < 4096; ++i) x.row(i) = 0.95f * x.row(i - 1) + 0.3f * x.row(i);
  const attn::Matrix<float> q = 0.5f * x, k = 0.5f * x, v = x;

  // Exact softmax attention in one line
  const attn::Matrix<float> exact = attn::attention(attn::SoftmaxAttention<float>{}, q, k, v);

  // Multipole attention within an error of 3 %, or exact attention where no setting is found
  attn::Context context;  // keeps scratch memory from call to call
  attn::Matrix<float> out(4096, 64);
  attn::Choice choice;  // what was chosen
  attn::Automatic<float>{.max_error = 0.03}.forward({.q = q, .k = k, .v = v}, out, context, choice);

  std::cout << (choice.plan.exact ? "exact attention" : "multipole attention") << ", error by its own estimate "
            << choice.estimate.error << ", measured " << (out - exact).norm() / exact.norm() << '\n';
}
