/// The filter: what makes an edge-preserving smoother out of attention.
///
/// Every pixel is a token. Its features are its place and its colour, x/s, y/s, r/t, g/t, b/t, and its value is its
/// colour:
///   out_i = sum_j w_ij colour_j / sum_j w_ij
///   w_ij  = exp(-|place_i - place_j|^2 / (2 s^2) - |colour_i - colour_j|^2 / (2 t^2))
/// This is a mean over all pixels in which near ones of like colour count most, so that edges stay: the bilateral
/// filter (Tomasi and Manduchi 1998) with all of the image as its window, or Gaussian attention with rows normalized
/// and a bandwidth of 1.
#pragma once

#include "image.hpp"

#include <attn/kernel.hpp>

inline constexpr attn::GaussianKernel kFilterKernel{.bandwidth = 1.0, .rows = attn::Rows::normalized};

/// The features of every pixel, (width height, 5); s in pixels, t in units of colour.
inline attn::Matrix<float> pixel_features(const Image& image, double s, double t) {
  attn::Matrix<float> features(image.rgb.rows(), 5);
  const auto per_s = static_cast<float>(1.0 / s), per_t = static_cast<float>(1.0 / t);
  for (attn::Index pixel = 0; pixel < features.rows(); ++pixel) {
    const attn::Index x = pixel % image.width, y = pixel / image.width;
    features.row(pixel) << per_s * static_cast<float>(x), per_s * static_cast<float>(y), per_t * image.rgb.row(pixel);
  }
  return features;
}
