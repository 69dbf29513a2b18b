/// A context with the threads that a user asks for.
#pragma once

#include <attn/context.hpp>
#ifdef _OPENMP
#include <attn/openmp.hpp>
#endif

#include <stdexcept>

/// 0: as many as OpenMP would use. Throws std::invalid_argument for more than one in a program that was built without
/// OpenMP.
inline attn::Context make_context(int threads) {
#ifdef _OPENMP
  return attn::Context{attn::OpenMP{.threads = threads}};
#else
  if (threads > 1) throw std::invalid_argument("--threads: built without OpenMP, only 1 is possible");
  return attn::Context{};
#endif
}
