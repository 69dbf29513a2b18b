#include "accuracy/dense.hpp"

#include <attn/metrics.hpp>

#include <Eigen/QR>

#include <algorithm>
#include <cmath>

namespace accuracy {
namespace {

/// A stored matrix as an operator.
struct Stored {
  using Scalar = float;
  const Matrix<float>& a;

  Index rows() const { return a.rows(); }
  Index cols() const { return a.cols(); }
  void apply(const attn::ConstMatrixRef<float>& x, attn::MatrixRef<float> y, attn::Context&) const {
    y.noalias() = a * x;
  }
  void apply_transpose(const attn::ConstMatrixRef<float>& x, attn::MatrixRef<float> y, attn::Context&) const {
    y.noalias() = a.transpose() * x;
  }
};

Eigen::MatrixXf orthonormal(const Eigen::MatrixXf& x) {
  return Eigen::HouseholderQR<Eigen::MatrixXf>(x).householderQ() * Eigen::MatrixXf::Identity(x.rows(), x.cols());
}

/// The count largest singular values of a matrix A, given A^T A.
Eigen::VectorXd values_of_gram(const Matrix<double>& gram, Index count) {
  return eigenvalues(gram).reverse().head(count).cwiseMax(0).cwiseSqrt();
}

Eigen::VectorXd iterated_values(const Matrix<float>& a, Index count) {
  constexpr Index kOversampling = 32;
  constexpr int kSteps = 3;
  const Index columns = std::min(count + kOversampling, a.cols());
  Eigen::MatrixXf x = attn::detail::random_signs<float>(a.cols(), columns, 1);
  for (int step = 0; step < kSteps; ++step) x = orthonormal(a.transpose() * orthonormal(a * x));
  const Matrix<double> y = (a * x).cast<double>();
  return values_of_gram(y.transpose() * y, count);
}

}  // namespace

template <class T>
Matrix<T> softmax_matrix(const Matrix<T>& q, const Matrix<T>& k) {
  Matrix<T> a = q * k.transpose() / std::sqrt(static_cast<T>(q.cols()));
  for (Index i = 0; i < a.rows(); ++i) {
    a.row(i) = (a.row(i).array() - a.row(i).maxCoeff()).exp();
    a.row(i) /= a.row(i).sum();
  }
  return a;
}

template <class T>
Matrix<T> gaussian_matrix(const Matrix<T>& q, const Matrix<T>& k) {
  const Eigen::VectorX<T> q_squares = q.rowwise().squaredNorm(), k_squares = k.rowwise().squaredNorm();
  Matrix<T> a = 2 * q * k.transpose();
  a.colwise() -= q_squares;
  a.rowwise() -= k_squares.transpose();
  return (a.array().min(T(0)) / (2 * std::sqrt(static_cast<T>(q.cols())))).exp();
}

template <class T>
Matrix<T> segment_means(const Matrix<T>& x, Index m) {
  const Index length = x.rows() / m;
  Matrix<T> means(m, x.cols());
  for (Index i = 0; i < m; ++i) means.row(i) = x.middleRows(i * length, length).colwise().mean();
  return means;
}

template Matrix<float> softmax_matrix(const Matrix<float>&, const Matrix<float>&);
template Matrix<double> softmax_matrix(const Matrix<double>&, const Matrix<double>&);
template Matrix<float> gaussian_matrix(const Matrix<float>&, const Matrix<float>&);
template Matrix<double> gaussian_matrix(const Matrix<double>&, const Matrix<double>&);
template Matrix<float> segment_means(const Matrix<float>&, Index);
template Matrix<double> segment_means(const Matrix<double>&, Index);

double spectral_norm(const Matrix<float>& a) {
  attn::Context context;
  return attn::spectral_norm(Stored{a}, {.tolerance = 2e-3, .max_iterations = 30, .oversampling = 5}, context);
}

Eigen::VectorXd leading_values(const Matrix<float>& a, Index count) {
  constexpr Index kExact = 1024;
  if (a.rows() > kExact) return iterated_values(a, count);
  const Matrix<double> wide = a.cast<double>();
  return values_of_gram(wide.transpose() * wide, count);
}

}  // namespace accuracy
