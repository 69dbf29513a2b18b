/// The bytes that a fuzzer chose, as a source of numbers.
#pragma once

#include "common/inputs.hpp"

#include <fuzzer/FuzzedDataProvider.h>

#include <cstddef>
#include <cstdint>

namespace fuzz {

/// As families::Random, but every decision is the fuzzer's; the entries of matrices follow from a seed of its.
class Source {
 public:
  Source(const std::uint8_t* data, std::size_t size) : provider_(data, size) {}

  /// In [0, n); 0 once the bytes are used up.
  attn::Index below(std::size_t n) {
    return static_cast<attn::Index>(provider_.ConsumeIntegralInRange<std::size_t>(0, n - 1));
  }
  attn::Index below(attn::Index n) { return below(static_cast<std::size_t>(n)); }
  attn::Index below(int n) { return below(static_cast<std::size_t>(n)); }

  attn::Matrix<double> normal(attn::Index rows, attn::Index cols) {
    return test::Random(provider_.ConsumeIntegral<std::uint16_t>()).normal(rows, cols);
  }

  /// Any number at all: infinities, subnormals and NaN among them.
  template <class T>
  T any() {
    T x{};
    provider_.ConsumeData(&x, sizeof x);
    return x;
  }

 private:
  FuzzedDataProvider provider_;
};

}  // namespace fuzz
