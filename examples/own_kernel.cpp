/// A kernel of one's own, in exact attention and in the primitive below it, checked against a plain loop.
#include <attn/attn.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <iostream>
#include <vector>

/// Softmax in which long keys count less: exp((q.k - penalty |k|^2) / sqrt(d)), rows divided by their sum. A penalty of
/// 0 is softmax, one of 1/2 the Gaussian kernel with normalized rows. The library applies bias(d) to |q|^2 as well,
/// which the division cancels.
struct PenalizedSoftmax {
  double penalty = 0.2;

  double scale(Eigen::Index d) const { return 1.0 / std::sqrt(static_cast<double>(d)); }
  double bias(Eigen::Index d) const { return penalty / std::sqrt(static_cast<double>(d)); }
  attn::Rows rows() const { return attn::Rows::normalized; }
};

static_assert(attn::ScoreKernel<PenalizedSoftmax>);
static_assert(attn::Approximator<attn::ExactAttention<float, PenalizedSoftmax>>);

/// log kappa(q_i, k_j) by its formula.
double log_weight(const PenalizedSoftmax& kernel, const attn::Inputs<float>& in, attn::Index i, attn::Index j) {
  const attn::Index d = in.q.cols();
  double qk = 0, qq = 0, kk = 0;
  for (attn::Index c = 0; c < d; ++c) {
    const double q = in.q(i, c), k = in.k(j, c);
    qk += q * k;
    qq += q * q;
    kk += k * k;
  }
  return kernel.scale(d) * qk - kernel.bias(d) * (qq + kk);
}

/// out and lse as kernel_matmul should give them, in double.
void by_loop(const PenalizedSoftmax& kernel, const attn::Inputs<float>& in, attn::Matrix<double>& out,
             std::vector<double>& lse) {
  out.setZero();
  for (attn::Index i = 0; i < in.q.rows(); ++i) {
    double sum = 0;
    for (attn::Index j = 0; j < in.k.rows(); ++j) {
      const double weight = std::exp(log_weight(kernel, in, i, j));
      sum += weight;
      for (attn::Index c = 0; c < in.v.cols(); ++c) out(i, c) += weight * static_cast<double>(in.v(j, c));
    }
    out.row(i) /= sum;
    lse[static_cast<std::size_t>(i)] = std::log(sum);
  }
}

/// The largest difference between n numbers.
double difference(const float* actual, const double* expected, attn::Index n) {
  double largest = 0;
  for (attn::Index i = 0; i < n; ++i)
    largest = std::max(largest, std::abs(static_cast<double>(actual[i]) - expected[i]));
  return largest;
}

int main() {
  const PenalizedSoftmax kernel{.penalty = 0.3};
  const attn::Matrix<float> q = attn::Matrix<float>::Random(100, 24), k = attn::Matrix<float>::Random(150, 24);
  const attn::Matrix<float> v = attn::Matrix<float>::Random(150, 8);
  const attn::Inputs<float> in{.q = q, .k = k, .v = v};

  attn::Context context;
  attn::Matrix<float> by_method(100, 8), by_primitive(100, 8);
  std::vector<float> lse(100);
  attn::ExactAttention<float, PenalizedSoftmax>{kernel}.forward(in, by_method, context);
  attn::kernel_matmul(kernel, in, by_primitive, lse, context);

  attn::Matrix<double> expected(100, 8);
  std::vector<double> expected_lse(100);
  by_loop(kernel, in, expected, expected_lse);
  const double method = difference(by_method.data(), expected.data(), expected.size());
  const double primitive = difference(by_primitive.data(), expected.data(), expected.size());
  const double sums = difference(lse.data(), expected_lse.data(), 100);
  std::cout << "largest difference: ExactAttention " << method << ", kernel_matmul " << primitive << ", its lse "
            << sums << '\n';
  return method < 1e-6 && primitive < 1e-6 && sums < 5e-6 ? EXIT_SUCCESS : EXIT_FAILURE;
}
