// error: attn::OpenMP needs -fopenmp .CMake: link OpenMP::OpenMP_CXX.
#include <attn/context.hpp>

attn::Context context(attn::OpenMP{});
