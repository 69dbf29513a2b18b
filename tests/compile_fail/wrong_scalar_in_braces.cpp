// error: of another type: attn::Matrix<T> y = x.template cast<T>
#include <attn/nystrom.hpp>

void call(const attn::Matrix<double>& q, const attn::Matrix<float>& k, attn::Matrix<float>& out,
          attn::Context& context) {
  attn::Nystrom<float>{}.forward({.q = q, .k = k, .v = k}, out, context);
}
