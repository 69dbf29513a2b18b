// error: RowMajorWithContiguousRows
#include <attn/exact.hpp>

void call(const attn::Matrix<float>& q, attn::Matrix<float>& out, attn::Context& context) {
  attn::SoftmaxAttention<float>{}.forward({.q = 2 * q, .k = q, .v = q}, out, context);
}
