#include "accuracy/dense.hpp"

#include <attn/metrics.hpp>

#include <Eigen/QR>

#include <algorithm>

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
