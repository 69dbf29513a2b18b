// error: an expression has no memory to view: attn::Matrix<T> y = expression;
#include <attn/exact.hpp>

void call(const attn::Matrix<float>& q, attn::Matrix<float>& out, attn::Context& context) {
  const attn::Inputs<float> in{.q = 2 * q, .k = q, .v = q};
  attn::SoftmaxAttention<float>{}.forward(in, out, context);
}
