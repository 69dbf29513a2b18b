// error: NaN and infinity, which -ffinite-math-only .part of -ffast-math. does not: add -fno-finite-math-only
// flags: -O3 -ffast-math
#include <attn/attn.hpp>
