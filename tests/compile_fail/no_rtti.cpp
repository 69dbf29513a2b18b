// compiles
// flags: -fno-rtti
#include <attn/attn.hpp>

void call(const attn::Matrix<float>& q, attn::Matrix<float>& out, attn::Context& context) {
  const attn::AnyApproximator<float> method(attn::SoftmaxAttention<float>{});
  attn::AnyApproximator<float>::Saved saved;
  method.forward({.q = q, .k = q, .v = q}, out, context, saved);
}
