#include "resize.hpp"

#include <algorithm>
#include <cmath>

namespace {

using attn::Index;
using attn::Matrix;

/// Row i of out is the mean over rows [i, i + 1) n_in / n_out of in, those at the ends counted in part.
void average_rows(attn::ConstMatrixRef<float> in, attn::MatrixRef<float> out) {
  const double box = static_cast<double>(in.rows()) / static_cast<double>(out.rows());
  out.setZero();
  for (Index i = 0; i < out.rows(); ++i) {
    const double begin = static_cast<double>(i) * box, end = begin + box;
    for (Index j = static_cast<Index>(begin); j < std::min(in.rows(), static_cast<Index>(std::ceil(end))); ++j) {
      const double covered = std::min(end, static_cast<double>(j + 1)) - std::max(begin, static_cast<double>(j));
      out.row(i) += static_cast<float>(covered / box) * in.row(j);
    }
  }
}

Image box_average(const Image& image, Index width, Index height) {
  Matrix<float> narrow(image.height * width, 3);
  for (Index y = 0; y < image.height; ++y) {
    average_rows(image.rgb.middleRows(y * image.width, image.width), narrow.middleRows(y * width, width));
  }
  Image out(width, height);
  average_rows({narrow.data(), image.height, 3 * width, 3 * width}, {out.rgb.data(), height, 3 * width, 3 * width});
  return out;
}

}  // namespace

Image fit_within(const Image& image, Index max_width, Index max_height) {
  const double scale = std::min({1.0, static_cast<double>(max_width) / static_cast<double>(image.width),
                                 static_cast<double>(max_height) / static_cast<double>(image.height)});
  if (scale == 1.0) return image;
  const auto scaled = [&](Index n) -> Index { return std::max(1L, std::lround(scale * static_cast<double>(n))); };
  return box_average(image, scaled(image.width), scaled(image.height));
}

Image magnified(const Image& image, Index factor) {
  Image out(factor * image.width, factor * image.height);
  for (Index y = 0; y < out.height; ++y) {
    for (Index x = 0; x < out.width; ++x) {
      out.rgb.row(y * out.width + x) = image.rgb.row(y / factor * image.width + x / factor);
    }
  }
  return out;
}
