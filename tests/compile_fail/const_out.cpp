// error: results need rows that can be written: an attn::Matrix<T>, not const
#include <attn/exact.hpp>

void call(const attn::Matrix<float>& q, const attn::Matrix<float>& out, attn::Context& context) {
  attn::SoftmaxAttention<float>{}.forward({.q = q, .k = q, .v = q}, out, context);
}
