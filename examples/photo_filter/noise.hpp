/// Gaussian noise that is the same with every compiler and library.
#pragma once

#include <attn/matrix.hpp>

#include <cmath>
#include <cstdint>
#include <numbers>
#include <random>

/// Normal deviates from the Mersenne twister, whose bits the standard fixes, by the method of Box and Muller 1958;
/// std::normal_distribution may differ from library to library.
class GaussianNoise {
 public:
  explicit GaussianNoise(std::uint64_t seed) : bits_(seed) {}

  double operator()() {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    const double radius = std::sqrt(-2.0 * std::log(uniform())), angle = 2.0 * std::numbers::pi * uniform();
    spare_ = radius * std::sin(angle);
    has_spare_ = true;
    return radius * std::cos(angle);
  }

 private:
  /// Uniform in (0, 1]: never 0, whose logarithm is infinite.
  double uniform() { return (static_cast<double>(bits_() >> 11) + 1.0) * 0x1p-53; }

  std::mt19937_64 bits_;
  double spare_ = 0.0;
  bool has_spare_ = false;
};

/// colours + sigma times noise, not clipped.
inline attn::Matrix<float> with_noise(attn::Matrix<float> colours, double sigma, std::uint64_t seed) {
  GaussianNoise noise(seed);
  for (float& colour : colours.reshaped<Eigen::RowMajor>()) colour += static_cast<float>(sigma * noise());
  return colours;
}
