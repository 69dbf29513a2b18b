#include "torch/attention.hpp"

#include <torch/torch.h>

#include <cstdlib>
#include <iostream>
#include <vector>

int main() {
  torch::manual_seed(0);
  const torch::Tensor x = torch::randn({4, 256, 64}), target = torch::randn({4, 256, 64});  // 4 sequences of 256 tokens
  const torch::Tensor keep = torch::arange(256) < torch::tensor({256, 200, 150, 100}).unsqueeze(1);  // padded behind

  torch::nn::Linear projection(64, 3 * 64), joined(64, 64);
  const attn_torch::Attention attention("skyformer", attn::MethodOptions{.num_landmarks = 32});

  const auto loss = [&] {
    const torch::Tensor projected = projection(x).view({4, 256, 3, 2, 32});  // q, k and v of 2 heads
    const auto part = [&](long i) { return projected.select(2, i).transpose(1, 2); };
    const torch::Tensor out = attention->forward(part(0), part(1), part(2), {.key = keep, .query = keep});
    return (joined(out.transpose(1, 2).flatten(2)) - target).square().mean();
  };

  std::vector<torch::Tensor> parameters = projection->parameters();
  for (const torch::Tensor& parameter : joined->parameters()) parameters.push_back(parameter);
  torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(1e-2));
  const float before = loss().item<float>();
  for (int step = 0; step < 20; ++step) {
    optimizer.zero_grad();
    loss().backward();
    optimizer.step();
  }
  const float after = loss().item<float>();
  std::cout << "loss " << before << " -> " << after << '\n';
  return after < before ? EXIT_SUCCESS : EXIT_FAILURE;
}
