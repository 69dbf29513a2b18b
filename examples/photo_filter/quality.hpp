/// How good a result is.
#pragma once

#include <attn/matrix.hpp>

#include <cmath>

/// Peak signal-to-noise ratio in decibels of colours against clean ones, both clipped to [0, 1]; infinite if they are
/// equal.
inline double psnr(const attn::Matrix<float>& colours, const attn::Matrix<float>& clean) {
  const auto clipped = [](const attn::Matrix<float>& m) { return m.cwiseMax(0.0f).cwiseMin(1.0f).cast<double>(); };
  return -10.0 * std::log10((clipped(colours) - clipped(clean)).squaredNorm() / static_cast<double>(clean.size()));
}
