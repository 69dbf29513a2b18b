// compiles
// flags: -O3 -ffast-math -fno-finite-math-only
#include <attn/attn.hpp>
