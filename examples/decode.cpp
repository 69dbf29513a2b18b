/// Decoding with a cache: a prompt at once, then token by token, by multipole attention and, to compare, exactly.
#include <attn/attn.hpp>

#include <cstdlib>
#include <iostream>

namespace {

using Matrix = attn::Matrix<float>;

/// Tokens that drift, as those of a text do: in the place of what a model's layer computes.
Matrix drifting(attn::Index tokens, attn::Index features) {
  Matrix x = Matrix::Random(tokens, features);
  for (attn::Index i = 1; i < tokens; ++i) x.row(i) = 0.95f * x.row(i - 1) + 0.3f * x.row(i);
  return x;
}

}  // namespace

int main() {
  // 4 heads of queries, of which pairs share a head of keys and values; all heads of a token lie side by side
  constexpr attn::CacheShape kShape{.heads = 4, .key_heads = 2, .d = 32, .d_v = 32};
  constexpr attn::Index kPrompt = 2000, kTokens = 2100;
  const Matrix q = drifting(kTokens, 4 * 32), k = drifting(kTokens, 2 * 32), v = drifting(kTokens, 2 * 32);

  attn::Context context;
  attn::KeyCache<float> cache(kShape);
  cache.reserve(kTokens);
  Matrix out(kTokens, 4 * 32), exact(kTokens, 4 * 32);

  for (attn::Index first = 0, count = kPrompt; first < kTokens; first += count, count = 1) {
    cache.append(k.middleRows(first, count), v.middleRows(first, count), q.middleRows(first, count));
    cache.attend(q.middleRows(first, count), out.middleRows(first, count), context);
    cache.attend_exactly(q.middleRows(first, count), exact.middleRows(first, count), context);
  }
  const float error = (out - exact).norm() / exact.norm();
  std::cout << cache.length() << " tokens, relative error " << error << '\n';
  return error < 0.1f ? EXIT_SUCCESS : EXIT_FAILURE;
}
