#include "accuracy/wildcat.hpp"

#include "common/families.hpp"

#include <attn/exact.hpp>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

namespace accuracy {
namespace {

using families::Random;
using Vector = Eigen::VectorXf;

/// W_0(z) for z > 0: the solution w of w exp(w) = z, by Newton's method.
double lambert_w(double z) {
  double w = std::log1p(z);
  for (int i = 0; i < 20; ++i) w -= (w - z * std::exp(-w)) / (w + 1);
  return w;
}

/// tau^2 for keys and queries of these largest norms.
double squared_temperature(double scale, double q_radius, double k_radius, Index n) {
  constexpr double kRho = 3.1916010253237;
  const double b = std::log(static_cast<double>(n)) / (scale * q_radius * k_radius) + 2;
  return k_radius / q_radius * b / (2 * lambert_w(b / (2 * kRho)));
}

/// A row with a probability in proportion to its weight; none where no weight is left.
std::optional<Index> draw(const Vector& weights, Random& random) {
  double left = random.uniform() * static_cast<double>(weights.sum());
  std::optional<Index> last;
  for (Index i = 0; i < weights.size(); ++i) {
    if (weights(i) <= 0) continue;
    last = i;
    left -= static_cast<double>(weights(i));
    if (left < 0) break;
  }
  return last;
}

/// G ~ F F^T for the Gaussian kernel's matrix G_ij = exp(-|x_i - x_j|^2 / 2), from the columns of the pivots.
struct Cholesky {
  std::vector<Index> pivots;
  Eigen::MatrixXf factor;  ///< F, a column for each pivot
};

/// Pivots are drawn by what is left of the diagonal of exp(x_i.x_j), which is that of G times exp(|x_i|^2).
Cholesky pivoted_cholesky(const Matrix<float>& x, const Vector& half_norms, Index rank, Random& random) {
  constexpr float kCovered = 1e-6f;  // of a diagonal of 1: rounding
  const Vector scales = (2 * (half_norms.array() - half_norms.maxCoeff())).exp();
  Vector left = Vector::Ones(x.rows()), column(x.rows());
  Cholesky result{{}, Eigen::MatrixXf(x.rows(), rank)};
  for (Index i = 0; i < rank; ++i) {
    const std::optional<Index> pivot = draw((left.array() < kCovered).select(0, left.cwiseProduct(scales)), random);
    if (!pivot) break;
    column.noalias() = x * x.row(*pivot).transpose();
    column = (column.array() - half_norms.array() - half_norms(*pivot)).min(0).exp();
    const Vector known = result.factor.row(*pivot).head(i);
    column.noalias() -= result.factor.leftCols(i) * known;
    column /= std::sqrt(left(*pivot));
    left = (left - column.cwiseAbs2()).cwiseMax(0);
    left(*pivot) = 0;
    result.factor.col(i) = column;
    result.pivots.push_back(*pivot);
  }
  return result;
}

/// Keys with a log-weight each, and sums that stand for values and, in the last column, for ones.
struct Coreset {
  Matrix<float> k, sums;
  Vector bias;
};

/// The coreset of a bin. With x = k sqrt(s) / tau the weights are W = exp(-|x_S|^2 / 2) G_SS^-1 G_S exp(|x|^2 / 2):
/// the left factor is the keys' bias. G_SS = L L^T with L = F_S gives G_SS^-1 G_S = L^-T F^T.
Coreset coreset_of(const Matrix<float>& k, const attn::ConstMatrixRef<float>& v, double q_radius, Index size,
                   Random& random) {
  const double scale = 1 / std::sqrt(static_cast<double>(k.cols()));
  const double k_radius = std::sqrt(static_cast<double>(k.rowwise().squaredNorm().maxCoeff()));
  const double squared = squared_temperature(scale, q_radius, k_radius, k.rows());
  const Matrix<float> x = static_cast<float>(std::sqrt(scale / squared)) * k;
  const Vector half_norms = x.rowwise().squaredNorm() / 2;
  const float most = half_norms.maxCoeff();
  const Cholesky cholesky = pivoted_cholesky(x, half_norms, size, random);
  const auto rank = static_cast<Index>(cholesky.pivots.size());

  Matrix<float> summands(k.rows(), v.cols() + 1);
  summands.col(v.cols()) = (half_norms.array() - most).exp();
  summands.leftCols(v.cols()) = v.array().colwise() * summands.col(v.cols()).array();
  Coreset set{k(cholesky.pivots, Eigen::all), cholesky.factor.leftCols(rank).transpose() * summands,
              most - half_norms(cholesky.pivots).array()};
  const Eigen::MatrixXf l = cholesky.factor(cholesky.pivots, Eigen::seqN(0, rank));
  l.triangularView<Eigen::Lower>().transpose().solveInPlace(set.sums);
  return set;
}

}  // namespace

void WildCat::forward(const attn::Inputs<float>& in, Matrix<float>& out, attn::Context& context) const {
  constexpr float kLeast = 1e-20f;  // as the authors': a smaller divisor leaves the middle of the range
  const Index n = in.k.rows(), bins = std::clamp<Index>(num_bins, 1, n), dim = in.v.cols();
  const Matrix<float> k = in.k.rowwise() - in.k.colwise().mean();
  const double q_radius = std::sqrt(static_cast<double>(in.q.rowwise().squaredNorm().maxCoeff()));
  Random random(seed);
  Matrix<float> keys(0, k.cols()), sums(0, dim + 1);
  std::vector<float> bias;
  for (Index bin = 0; bin < bins; ++bin) {
    const Index first = bin * n / bins, count = (bin + 1) * n / bins - first;
    const Index size = std::min(count, std::max<Index>(num_keys / bins, 1));
    const Coreset set = coreset_of(k.middleRows(first, count), in.v.middleRows(first, count), q_radius, size, random);
    keys.conservativeResize(keys.rows() + set.k.rows(), Eigen::NoChange);
    sums.conservativeResize(keys.rows(), Eigen::NoChange);
    keys.bottomRows(set.k.rows()) = set.k;
    sums.bottomRows(set.k.rows()) = set.sums;
    bias.insert(bias.end(), set.bias.begin(), set.bias.end());
  }
  Matrix<float> both(in.q.rows(), dim + 1);
  attn::SoftmaxAttention<float>{}.forward({.q = in.q, .k = keys, .v = sums, .key_bias = bias}, both, context);
  const Eigen::RowVectorXf low = in.v.colwise().minCoeff(), high = in.v.colwise().maxCoeff();
  for (Index i = 0; i < out.rows(); ++i) {
    const float divisor = both(i, dim);
    if (divisor > kLeast) {
      out.row(i) = (both.row(i).head(dim) / divisor).cwiseMax(low).cwiseMin(high);
    } else {
      out.row(i) = (low + high) / 2;
    }
  }
}

}  // namespace accuracy
