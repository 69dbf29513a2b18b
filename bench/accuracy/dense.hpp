/// Attention matrices that are stored, as the studies need them, and their norms and spectra.
#pragma once

#include <attn/matrix.hpp>

#include "reference.hpp"

#include <Eigen/Core>

#include <cmath>

namespace accuracy {

using attn::Index;
using attn::Matrix;
using reference::eigenvalues;
using reference::singular_values;

/// softmax(q k^T / sqrt(d)), by its definition.
template <class T>
Matrix<T> softmax_matrix(const Matrix<T>& q, const Matrix<T>& k) {
  Matrix<T> a = q * k.transpose() / std::sqrt(static_cast<T>(q.cols()));
  for (Index i = 0; i < a.rows(); ++i) {
    a.row(i) = (a.row(i).array() - a.row(i).maxCoeff()).exp();
    a.row(i) /= a.row(i).sum();
  }
  return a;
}

/// exp(-|q_i - k_j|^2 / (2 sqrt(d))), by its definition.
template <class T>
Matrix<T> gaussian_matrix(const Matrix<T>& q, const Matrix<T>& k) {
  const Eigen::VectorX<T> q_squares = q.rowwise().squaredNorm(), k_squares = k.rowwise().squaredNorm();
  Matrix<T> a = 2 * q * k.transpose();
  a.colwise() -= q_squares;
  a.rowwise() -= k_squares.transpose();
  return (a.array().min(T(0)) / (2 * std::sqrt(static_cast<T>(q.cols())))).exp();
}

/// |a|_2 by power iteration, to about a percent, from below.
double spectral_norm(const Matrix<float>& a);

/// The count largest singular values of a (n, n), in descending order, from below: exact up to rounding for n at most
/// 1024, else by subspace iteration with QR, whose last values may be some percent too small.
Eigen::VectorXd leading_values(const Matrix<float>& a, Index count);

}  // namespace accuracy
