/// Attention matrices that are stored, as the studies need them, and their norms and spectra.
#pragma once

#include <attn/matrix.hpp>

#include "common/reference.hpp"

#include <Eigen/Core>

namespace accuracy {

using attn::Index;
using attn::Matrix;
using reference::eigenvalues;
using reference::singular_values;

/// softmax(q k^T / sqrt(d)), by its definition. T is float or double, here and below.
template <class T>
Matrix<T> softmax_matrix(const Matrix<T>& q, const Matrix<T>& k);

/// exp(-|q_i - k_j|^2 / (2 sqrt(d))), by its definition.
template <class T>
Matrix<T> gaussian_matrix(const Matrix<T>& q, const Matrix<T>& k);

/// (m, d): the means of m segments of n / m rows, where m divides n.
template <class T>
Matrix<T> segment_means(const Matrix<T>& x, Index m);

/// |a|_2 by power iteration, to about a percent, from below.
double spectral_norm(const Matrix<float>& a);

/// The count largest singular values of a (n, n), in descending order, from below: exact up to rounding for n at most
/// 1024, else by subspace iteration with QR, whose last values may be some percent too small.
Eigen::VectorXd leading_values(const Matrix<float>& a, Index count);

}  // namespace accuracy
