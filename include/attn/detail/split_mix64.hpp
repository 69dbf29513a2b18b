/// Random numbers.
#pragma once

#include <Eigen/Core>

#include <cstdint>

namespace attn::detail {

using Eigen::Index;

/// SplitMix64 (Steele, Lea and Flood 2014): the same numbers on every platform.
class SplitMix64 {
 public:
  explicit SplitMix64(std::uint64_t seed) : state_(seed) {}

  std::uint64_t operator()() {
    state_ += 0x9e3779b97f4a7c15U;
    std::uint64_t z = state_;
    z = (z ^ (z >> 30U)) * 0xbf58476d1ce4e5b9U;
    z = (z ^ (z >> 27U)) * 0x94d049bb133111ebU;
    return z ^ (z >> 31U);
  }

  /// A number below n, each as likely as any other: draws that would favour small ones are thrown away.
  Index below(Index n) {
    const auto bound = static_cast<std::uint64_t>(n);
    const std::uint64_t rejected = (0 - bound) % bound;
    std::uint64_t x = (*this)();
    while (x < rejected) x = (*this)();
    return static_cast<Index>(x % bound);
  }

 private:
  std::uint64_t state_;
};

}  // namespace attn::detail
