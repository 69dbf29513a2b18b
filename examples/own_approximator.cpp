/// A method of one's own: what the concept asks for, and what it then fits into. Checked against exact attention.
#include <attn/attn.hpp>

#include "mean_pooling.hpp"

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <vector>

bool check(bool holds, const char* what) {
  std::cout << (holds ? "yes  " : "NO   ") << what << '\n';
  return holds;
}

int main() {
  constexpr attn::Index kTokens = 100;
  const attn::Matrix<float> q = attn::Matrix<float>::Random(kTokens, 16), k = attn::Matrix<float>::Random(kTokens, 16);
  const attn::Matrix<float> v = attn::Matrix<float>::Random(kTokens, 8), alike = k.row(0).replicate(kTokens, 1);
  std::vector<std::uint8_t> keep(kTokens, 1);
  keep[0] = keep[7] = keep[99] = 0;
  const attn::Mask mask{.keep_key = keep, .keep_query = keep};

  // In one line, with and without a mask
  const attn::SoftmaxAttention<float> softmax;
  const MeanPooling<float> pooling;
  const bool plain = attn::attention(pooling, q, alike, v).isApprox(attn::attention(softmax, q, alike, v), 1e-5f);
  const bool masked =
      attn::attention(pooling, q, alike, v, mask).isApprox(attn::attention(softmax, q, alike, v, mask), 1e-5f);

  // As one of several methods of one type, chosen at run time
  const std::vector<attn::AnyApproximator<float>> methods{
      attn::AnyApproximator<float>(softmax), attn::AnyApproximator<float>(pooling),
      attn::make_approximator<float>("skyformer", {.num_landmarks = 32})};
  for (const auto& method : methods) {
    std::cout << method.name() << ": a mean magnitude of " << attn::attention(method, q, k, v).cwiseAbs().mean()
              << '\n';
  }
  const bool same =
      attn::attention(methods[1], q, k, v) == attn::attention(pooling, q, k, v) && methods[1].name() == "mean-pooling";

  // A training step: what the forward pass saves, and the gradients of a loss whose gradient by out is all ones
  attn::Context context;
  decltype(methods)::value_type::Saved saved;
  attn::Matrix<float> out(kTokens, 8), dq(kTokens, 16), dk(kTokens, 16), dv(kTokens, 8);
  const attn::Matrix<float> dout = attn::Matrix<float>::Ones(kTokens, 8);
  methods[1].forward({.q = q, .k = k, .v = v}, out, context, saved);
  methods[1].backward({.q = q, .k = k, .v = v}, out, dout, saved, {.dq = dq, .dk = dk, .dv = dv}, context);
  const bool trained = dq.isZero() && dk.isZero() && dv.isApprox(dout);

  bool good = check(plain, "equal to softmax attention where all keys are alike");
  good &= check(masked, "and with a mask");
  good &= check(same, "the same as AnyApproximator");
  good &= check(trained, "every value counts as much for the mean as any other");
  return good ? EXIT_SUCCESS : EXIT_FAILURE;
}
