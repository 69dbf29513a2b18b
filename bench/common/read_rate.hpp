/// The machine's limit for what is read once: how long reading takes. Shares no code with the library it judges.
#pragma once

#include "fma_peak.hpp"

#include <chrono>
#include <cstddef>
#include <cstdint>

namespace bench {

/// Reads an array and does nothing with it; returns the bits that any of its words has. Fetches ahead what hardware
/// alone would fetch too late.
inline std::uint64_t read_all(const void* data, std::size_t bytes) {
  using Word [[gnu::vector_size(kVectorBytes), gnu::aligned(8), gnu::may_alias]] = std::uint64_t;
  constexpr std::size_t kStep = 256, kAhead = 4096;
  const char* const p = static_cast<const char*>(data);
  Word any[kStep / kVectorBytes] = {};
  for (std::size_t at = 0; at + kStep <= bytes; at += kStep) {
    for (std::size_t line = 0; line < kStep; line += 64) {
      __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(p) + at + line + kAhead), 0, 2);
    }
    for (std::size_t i = 0; i < kStep / kVectorBytes; ++i) {
      any[i] |= *reinterpret_cast<const Word*>(p + at + i * kVectorBytes);
    }
  }
  std::uint64_t all = 0;
  for (const Word& word : any) {
    for (std::size_t i = 0; i < kVectorBytes / sizeof(std::uint64_t); ++i) all |= word[i];
  }
  return all;
}

}  // namespace bench
