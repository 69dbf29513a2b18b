/// A choice of landmarks of one's own for Skyformer: Lloyd's algorithm, compared with uniform sampling.
#include <attn/attn.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <span>
#include <type_traits>

/// The centres of clusters of the kept rows of q and k: rows drawn uniformly, then moved by steps of Lloyd's algorithm.
/// Costs O(steps (n_q + n_k) m d). Landmarks need not be rows of q and k: every set of points gives an approximation
/// from below.
struct ClusterCentres {
  attn::Index num_landmarks = 128;
  int steps = 3;
  std::uint64_t seed = 0;

  template <class T>
  attn::MatrixRef<T> select(const attn::Inputs<T>& in, attn::Scratch& scratch) const {
    const attn::UniformSample start{.num_landmarks = num_landmarks, .seed = seed};
    attn::MatrixRef<T> centres = start.select(in, scratch);
    if (centres.rows() == 0) return centres;     // no row is kept
    attn::Scratch temporary = scratch.nested();  // given back at the end, unlike centres
    attn::MatrixRef<T> sums = temporary.matrix<T>(centres.rows(), centres.cols());
    const std::span<attn::Index> counts = temporary.array<attn::Index>(centres.rows());
    for (int step = 0; step < steps; ++step) {
      sums.setZero();
      std::ranges::fill(counts, 0);
      assign<T>(in.q, in.mask.keep_query, centres, sums, counts);
      assign<T>(in.k, in.mask.keep_key, centres, sums, counts);
      for (attn::Index c = 0; c < centres.rows(); ++c) {
        const attn::Index count = counts[static_cast<std::size_t>(c)];
        if (count > 0) centres.row(c) = sums.row(c) / static_cast<T>(count);
      }
    }
    return centres;
  }

 private:
  /// Adds each kept row to the sum of the centre that is nearest to it.
  template <class T>
  static void assign(const attn::ConstMatrixRef<T>& rows, std::span<const std::uint8_t> keep,
                     const attn::MatrixRef<T>& centres, attn::MatrixRef<T> sums, std::span<attn::Index> counts) {
    for (attn::Index i = 0; i < rows.rows(); ++i) {
      if (!keep.empty() && keep[static_cast<std::size_t>(i)] == 0) continue;
      attn::Index nearest = 0;
      T smallest = std::numeric_limits<T>::infinity();
      for (attn::Index c = 0; c < centres.rows(); ++c) {
        const T distance = (rows.row(i) - centres.row(c)).squaredNorm();
        if (distance < smallest) {
          smallest = distance;
          nearest = c;
        }
      }
      sums.row(nearest) += rows.row(i);
      ++counts[static_cast<std::size_t>(nearest)];
    }
  }
};

static_assert(attn::JointLandmarks<ClusterCentres, float> && attn::JointLandmarks<ClusterCentres, double>);

/// n tokens of d features around one of 40 points each, some of which many tokens share and others few.
attn::Matrix<float> clustered_tokens(const attn::Matrix<float>& points, attn::Index n) {
  attn::Matrix<float> tokens = 0.2f * attn::Matrix<float>::Random(n, points.cols());
  for (attn::Index i = 0; i < n; ++i) tokens.row(i) += points.row(points.rows() * i / n * i / n);
  return tokens;
}

int main() {
  constexpr attn::Index kTokens = 1024, kFeatures = 16, kLandmarks = 64;
  const attn::Matrix<float> points = 2.0f * attn::Matrix<float>::Random(40, kFeatures);
  const attn::Matrix<float> q = clustered_tokens(points, kTokens), k = clustered_tokens(points, kTokens);
  const attn::Matrix<float> v = attn::Matrix<float>::Random(kTokens, 8);
  const attn::GaussianKernel kernel{.bandwidth = 1.0, .rows = attn::Rows::normalized};
  const attn::RidgeInverse inverse{.gamma = 1e-3};

  const attn::Matrix<float> exact = attn::attention(attn::GaussianAttention<float>{kernel}, q, k, v);
  const auto error_with = [&](const auto& landmarks) {
    const attn::Skyformer<float, std::remove_cvref_t<decltype(landmarks)>> method{landmarks, inverse, kernel};
    return (attn::attention(method, q, k, v) - exact).norm() / exact.norm();
  };
  const float uniform = error_with(attn::UniformSample{.num_landmarks = kLandmarks});
  const float centres = error_with(ClusterCentres{.num_landmarks = kLandmarks});
  std::cout << "relative error with " << kLandmarks << " landmarks: drawn uniformly " << uniform << ", cluster centres "
            << centres << '\n';
  return centres < uniform ? EXIT_SUCCESS : EXIT_FAILURE;
}
