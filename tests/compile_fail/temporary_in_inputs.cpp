// error: a temporary ends before the view of it: give the matrix a name first
#include <attn/exact.hpp>

void call(const attn::Matrix<float>& q, attn::Matrix<float>& out, attn::Context& context) {
  const attn::Inputs<float> in{.q = attn::Matrix<float>(2 * q), .k = q, .v = q};
  attn::SoftmaxAttention<float>{}.forward(in, out, context);
}
