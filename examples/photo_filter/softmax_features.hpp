/// What lets softmax attention, and what approximates it, compute the filter's normalised Gaussian attention.
#pragma once

#include <attn/matrix.hpp>

#include <cmath>
#include <utility>

/// Queries and keys of n tokens, (n, d + 1) each.
struct SoftmaxFeatures {
  attn::Matrix<float> q, k;
};

/// q~_i = [f_i, 1] and k~_j = [f_j, -|f_j|^2 / 2], whose scores are
///   q~_i . k~_j = f_i . f_j - |f_j|^2 / 2 = -|f_i - f_j|^2 / 2 + |f_i|^2 / 2.
/// The last term is the same along a row, where the division by the row's sum cancels it, so that with a scale of 1
///   softmax(q~ k~^T)_ij = exp(-|f_i - f_j|^2 / 2) / sum_l exp(-|f_i - f_l|^2 / 2),
/// the Gaussian weights of bandwidth 1, rows normalised.
///
/// Three changes leave these weights as they are and help with float's digits and range: the features' mean is
/// subtracted, which changes no distance; the middle b of the range b -+ r of |f_j|^2 / 2 is, which changes all scores
/// of a row alike; and the last columns become c and (b - |f_j|^2 / 2) / c with c = sqrt(r), of the same product, and
/// as large in q~ as in k~. Lifted softmax weights key j by exp(|k~_j|^2 / 2), which overflows for c = 1.
inline SoftmaxFeatures softmax_features(attn::Matrix<float> features) {
  const attn::Index n = features.rows(), d = features.cols();
  const attn::Matrix<double> mean = features.cast<double>().colwise().mean();
  features.rowwise() -= mean.cast<float>().row(0);
  const attn::Matrix<float> half_norms = 0.5f * features.rowwise().squaredNorm();
  const float middle = (half_norms.maxCoeff() + half_norms.minCoeff()) / 2, range = half_norms.maxCoeff() - middle;
  const float c = range > 0 ? std::sqrt(range) : 1.0f;
  attn::Matrix<float> q(n, d + 1), k(n, d + 1);
  q.leftCols(d) = features;
  q.col(d).setConstant(c);
  k.leftCols(d) = features;
  k.col(d) = (middle - half_norms.array()) / c;
  return {std::move(q), std::move(k)};
}
