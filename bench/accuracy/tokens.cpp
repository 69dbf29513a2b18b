#include "accuracy/tokens.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numbers>
#include <stdexcept>
#include <string>
#include <utility>

namespace accuracy {
namespace {

/// (n, 24): each row one of 512 words N (512, 24), word w drawn with a probability of about 1 / (w + 1) (Zipf's law).
Matrix<double> draw_words(families::Random& random, Index n) {
  constexpr Index kWords = 512, kColumns = 24;
  const Matrix<double> words = random.normal(kWords, kColumns);
  Matrix<double> x(n, kColumns);
  for (Index i = 0; i < n; ++i) {
    const auto word = static_cast<Index>(std::pow(static_cast<double>(kWords), random.uniform())) - 1;
    x.row(i) = words.row(std::clamp<Index>(word, 0, kWords - 1));
  }
  return x;
}

/// (n, 8): sines and cosines of the position, of wavelengths 64, 256, 1024 and 4096 tokens.
Matrix<double> positions(Index n) {
  Matrix<double> x(n, 8);
  for (Index i = 0; i < n; ++i) {
    double wavelength = 64;
    for (Index c = 0; c < 8; c += 2, wavelength *= 4) {
      const double angle = 2 * std::numbers::pi * static_cast<double>(i) / wavelength;
      x(i, c) = std::sqrt(2.0) * std::sin(angle);
      x(i, c + 1) = std::sqrt(2.0) * std::cos(angle);
    }
  }
  return x;
}

/// What a trained head may look like: words that come again and again and smooth positions, x (n, 32), seen by queries
/// and keys through projections W = D (W_0 + .5 N), D_ii = (i + 1)^-1/2, W_0 = N (32, d) shared. Scaled so that the
/// scores q.k / sqrt(d) have a standard deviation of about 2.
template <class T>
Tokens<T> word_tokens(Index n, std::uint64_t seed) {
  families::Random random(seed);
  const Matrix<double> v = random.normal(n, kFeatures), words = draw_words(random, n);
  Matrix<double> x(n, 32);
  x << positions(n), words;
  const Matrix<double> shared = random.normal(32, kFeatures);
  const auto project = [&]() -> Matrix<double> {
    Matrix<double> w = shared + 0.5 * random.normal(32, kFeatures);
    for (Index i = 0; i < w.rows(); ++i) w.row(i) /= std::sqrt(static_cast<double>(i + 1));
    return x * w;
  };
  Matrix<double> q = project(), k = project();
  double squares = 0;
  for (Index i = 0; i < n; ++i) squares += std::pow(q.row(i).dot(k.row(random.below(n))), 2) / static_cast<double>(n);
  const double scale = std::sqrt(2 * std::sqrt(static_cast<double>(kFeatures)) / std::sqrt(squares));
  q *= scale;
  k *= scale;
  return {q.cast<T>(), k.cast<T>(), v.cast<T>()};
}

}  // namespace

Tokens<double> mixed_tokens(Index n, double share, std::uint64_t seed) {
  constexpr double kSmoothVariance = 1.26;
  const families::Shape shape{n, n, kFeatures, kFeatures};
  const auto smooth = families::make_tokens<double>(families::Family::smooth, shape, seed);
  const auto noise = families::make_tokens<double>(families::Family::self, shape, seed);
  const Matrix<double> x = std::sqrt((1 - share) / kSmoothVariance) * smooth.q + std::sqrt(share) * noise.q;
  return {x, x, smooth.v};
}

template <class T>
Tokens<T> make_tokens(std::string_view family, Index n, std::uint64_t seed) {
  using families::Family;
  constexpr std::pair<std::string_view, Family> kShared[] = {{"smooth", Family::smooth},
                                                             {"clusters", Family::clusters},
                                                             {"self", Family::self},
                                                             {"init", Family::init},
                                                             {"unit", Family::unit}};
  if (family == "words") return word_tokens<T>(n, seed);
  const auto* const found =
      std::find_if(std::begin(kShared), std::end(kShared), [&](const auto& f) { return f.first == family; });
  if (found == std::end(kShared)) throw std::logic_error("no family is called " + std::string(family));
  return families::make_tokens<T>(found->second, {n, n, kFeatures, kFeatures}, seed);
}

template Tokens<float> make_tokens(std::string_view, Index, std::uint64_t);
template Tokens<double> make_tokens(std::string_view, Index, std::uint64_t);

}  // namespace accuracy
