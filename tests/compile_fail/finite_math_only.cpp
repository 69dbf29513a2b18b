// error: NaN and infinity, which -ffinite-math-only .* does not: add -fno-finite-math-only
// flags: -ffinite-math-only
#include <attn/attn.hpp>
