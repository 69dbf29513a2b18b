/// Key biases of any size: what a constant one cancels, what large differences hide, and which of them a query may
/// depend on.
#include <attn/exact.hpp>
#include <attn/kernel_matmul.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace test {
namespace {

using attn::Causal;
using attn::GaussianKernel;
using attn::Rows;
using attn::SoftmaxKernel;

/// A sequence with key biases.
template <class T>
struct Biased {
  Biased(Index n_q, Index n_k, std::vector<T> key_bias, Causal alignment, std::uint64_t seed = 1)
      : x(make_tokens<T>(Family::init, {n_q, n_k, 8, 5}, seed)), bias(std::move(key_bias)), causal(alignment) {}

  Inputs<T> inputs() const { return {.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}, .key_bias = bias}; }

  Tokens<T> x;
  std::vector<T> bias;
  Causal causal;
};

template <class T, class Kernel>
Matrix<T> forward(const Kernel& kernel, const Inputs<T>& in, std::vector<T>* lse = nullptr) {
  Matrix<T> out(in.q.rows(), in.v.cols());
  Context context;
  std::vector<T> sums(static_cast<std::size_t>(in.q.rows()));
  kernel_matmul(kernel, in, out, sums, context);
  if (lse != nullptr) *lse = sums;
  return out;
}

template <class T>
struct AllGradients {
  Matrix<T> dq, dk, dv;
  std::vector<T> dbias;
};

template <class T>
Matrix<T> some_gradient(const Inputs<T>& in) {
  return make_tokens<T>(Family::init, {1, in.q.rows(), 1, in.v.cols()}, 77).v;
}

/// By kernel_matmul_backward, or with saved ones by the method.
template <class T, class Kernel>
AllGradients<T> backward(const Kernel& kernel, const Inputs<T>& in, const Matrix<T>& dout, bool by_method) {
  AllGradients<T> g{Matrix<T>(in.q.rows(), in.q.cols()), Matrix<T>(in.k.rows(), in.k.cols()),
                    Matrix<T>(in.v.rows(), in.v.cols()), std::vector<T>(static_cast<std::size_t>(in.k.rows()))};
  Context context;
  Matrix<T> out(in.q.rows(), in.v.cols());
  if (by_method) {
    const attn::ExactAttention<T, Kernel> method{kernel};
    typename attn::ExactAttention<T, Kernel>::Saved saved;
    method.forward(in, out, context, saved);
    method.backward(in, out, dout, saved, {g.dq, g.dk, g.dv}, context);
  } else {
    std::vector<T> lse(static_cast<std::size_t>(in.q.rows()));
    kernel_matmul(kernel, in, out, lse, context);
    kernel_matmul_backward(kernel, in, out, lse, dout, {g.dq, g.dk, g.dv}, context, g.dbias);
  }
  return g;
}

template <class T, class Kernel>
void expect_gradients(const Kernel& kernel, const reference::Kernel& expected_kernel, const Inputs<T>& in,
                      double tolerance) {
  const Matrix<T> dout = some_gradient(in);
  const auto expected = attend_backward(expected_kernel, to_reference(in), dout.template cast<double>());
  for (const bool by_method : {false, true}) {
    SCOPED_TRACE(by_method ? "method" : "kernel_matmul_backward");
    const AllGradients<T> g = backward(kernel, in, dout, by_method);
    EXPECT_LT(relative_error(g.dq, expected.dq), tolerance);
    EXPECT_LT(relative_error(g.dk, expected.dk), tolerance);
    EXPECT_LT(relative_error(g.dv, expected.dv), tolerance);
  }
}

/// In forward and backward passes of every kernel.
template <class T>
void expect_all_kernels(const Biased<T>& problem) {
  const Inputs<T> in = problem.inputs();
  const reference::Problem p = to_reference(in);
  const Index d = in.q.cols();
  const double tolerance = sizeof(T) == 4 ? 3e-6 : 1e-12;
  {
    SCOPED_TRACE("softmax");
    expect_close(forward(SoftmaxKernel{}, in), attend(reference::softmax_kernel(d), p), p, reference::softmax_kernel(d),
                 tolerance);
    expect_gradients(SoftmaxKernel{}, reference::softmax_kernel(d), in, tolerance);
  }
  SCOPED_TRACE("normalized Gaussian");
  const GaussianKernel gaussian{.rows = Rows::normalized};
  const auto kernel = reference::gaussian_kernel(d, {}, true);
  expect_close(forward(gaussian, in), attend(kernel, p), p, kernel, tolerance);
  expect_gradients(gaussian, kernel, in, tolerance);
}

template <class T>
class KeyBias : public ::testing::Test {};
TYPED_TEST_SUITE(KeyBias, Scalars);

TYPED_TEST(KeyBias, OfTheFirstKeyTakesNoDigitsFromLaterOnes) {
  using T = TypeParam;
  Matrix<T> q = Matrix<T>::Ones(3, 1), k(3, 1), v(3, 1);
  k << 0, 0, 10;
  v << 7, 0, 1;
  for (const T first : {T(-1e9), T(-3e38), std::numeric_limits<T>::lowest()}) {
    const std::vector<T> bias{first, 0, 0};
    const Inputs<T> in{.q = q, .k = k, .v = v, .mask = {.causal = Causal::upper_left}, .key_bias = bias};
    const Matrix<T> out = forward(SoftmaxKernel{.scale = 1}, in);
    EXPECT_NEAR(static_cast<double>(out(0, 0)), 7, 1e-6);
    EXPECT_NEAR(static_cast<double>(out(1, 0)), 0, 1e-6);
    EXPECT_NEAR(static_cast<double>(out(2, 0)), 0.9999546, 1e-6);
  }
}

TYPED_TEST(KeyBias, OfAnySizeUnderEveryMask) {
  using T = TypeParam;
  constexpr Index kKeys = 333;
  for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
    for (const double size : {-1e4, -1e9, -3e38, 1e4, 1e9}) {
      SCOPED_TRACE("causal " + std::to_string(static_cast<int>(causal)) + ", size " + std::to_string(size));
      std::vector<T> bias(kKeys, T(0));
      for (const std::size_t j : {0U, 1U, 60U, 200U, 201U}) bias[j] = static_cast<T>(size);
      expect_all_kernels(Biased<T>(90, kKeys, bias, causal));
    }
  }
}

TYPED_TEST(KeyBias, ThatGrowsAlongTheSequence) {
  using T = TypeParam;
  for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
    for (const double slope : {0.5, -0.5, 3.0}) {
      std::vector<T> bias(3000);
      for (std::size_t j = 0; j < bias.size(); ++j) bias[j] = static_cast<T>(slope * static_cast<double>(j));
      SCOPED_TRACE("causal " + std::to_string(static_cast<int>(causal)) + ", slope " + std::to_string(slope));
      expect_all_kernels(Biased<T>(100, 3000, bias, causal));
    }
  }
}

/// Keys that a bias hides come first, with scores so large that their weights overflow beside anything but their own.
TYPED_TEST(KeyBias, HidesLargeScores) {
  using T = TypeParam;
  constexpr Index kHidden = 700, kKeys = 710;
  const Matrix<T> q = Matrix<T>::Constant(3, 1, T(40));
  Matrix<T> k = Matrix<T>::Zero(kKeys, 1), v = Matrix<T>::Ones(kKeys, 1);
  k.topRows(kHidden).setConstant(T(40));
  v.topRows(kHidden).setConstant(T(7));
  std::vector<T> bias(kKeys, T(0));
  std::fill_n(bias.begin(), kHidden, T(-1e30));
  for (const Causal causal : {Causal::none, Causal::lower_right}) {
    const Inputs<T> in{.q = q, .k = k, .v = v, .mask = {.causal = causal}, .key_bias = bias};
    EXPECT_TRUE((forward(SoftmaxKernel{.scale = 1}, in).array() == T(1)).all());
  }
}

TYPED_TEST(KeyBias, CommonToAllKeysChangesNothing) {
  using T = TypeParam;
  for (const Causal causal : {Causal::none, Causal::upper_left}) {
    const Biased<T> plain(70, 70, std::vector<T>(70, T(0)), causal);
    for (const T size : {T(1e3), T(-1e6), T(1e30), std::numeric_limits<T>::lowest(), std::numeric_limits<T>::max()}) {
      SCOPED_TRACE(size);
      const Biased<T> biased(70, 70, std::vector<T>(70, size), causal);
      EXPECT_TRUE(bitwise_equal(forward(SoftmaxKernel{}, biased.inputs()), forward(SoftmaxKernel{}, plain.inputs())));
      std::vector<T> lse;
      forward(SoftmaxKernel{}, biased.inputs(), &lse);
      EXPECT_NEAR(static_cast<double>(lse[50] / size), 1, 1e-2);
      const Matrix<T> dout = some_gradient(plain.inputs());
      for (const bool by_method : {false, true}) {
        EXPECT_TRUE(bitwise_equal(backward(SoftmaxKernel{}, biased.inputs(), dout, by_method).dv,
                                  backward(SoftmaxKernel{}, plain.inputs(), dout, true).dv));
      }
    }
  }
}

TYPED_TEST(KeyBias, OfALaterKeyChangesNoBit) {
  using T = TypeParam;
  const Biased<T> one(200, 200, std::vector<T>(200, T(0)), Causal::upper_left);
  for (const T later : {T(1e9), std::numeric_limits<T>::max(), kInf<T>, kNaN<T>}) {
    Biased<T> other = one;
    for (std::size_t j = 83; j < 200; ++j) other.bias[j] = later;
    const GaussianKernel gaussian{.rows = Rows::normalized};
    const Matrix<T> a = forward(SoftmaxKernel{}, one.inputs()), b = forward(SoftmaxKernel{}, other.inputs());
    const Matrix<T> c = forward(gaussian, one.inputs()), d = forward(gaussian, other.inputs());
    for (Index i = 0; i < 83; ++i) EXPECT_TRUE(same_row(a, b, i) && same_row(c, d, i)) << "row " << i;
  }
}

/// Where all queries of a strip see the same keys, for those between are dropped, but not all keys of a tile.
TYPED_TEST(KeyBias, OfAKeyBeyondDroppedOnesChangesNoBit) {
  using T = TypeParam;
  const Index n = 530;
  std::vector<std::uint8_t> keep(static_cast<std::size_t>(n), 1);
  std::fill_n(keep.begin() + 1, 60, std::uint8_t{0});
  const Biased<T> one(n, n, std::vector<T>(static_cast<std::size_t>(n), T(0.3)), Causal::upper_left);
  Biased<T> other = one;
  other.bias[100] = T(777.7);
  Inputs<T> in = one.inputs(), changed = other.inputs();
  in.mask.keep_key = changed.mask.keep_key = keep;
  const Matrix<T> a = forward(SoftmaxKernel{}, in), b = forward(SoftmaxKernel{}, changed), dout = some_gradient(in);
  const Matrix<T> da = backward(SoftmaxKernel{}, in, dout, true).dq,
                  db = backward(SoftmaxKernel{}, changed, dout, true).dq;
  for (Index i = 0; i < 100; ++i) EXPECT_TRUE(same_row(a, b, i) && same_row(da, db, i)) << "row " << i;
}

TEST(KeyBiasInBackward, OfTwoEqualKeys) {
  const Matrix<float> q = Matrix<float>::Ones(1, 4), k = Matrix<float>::Ones(2, 4), v = Matrix<float>::Ones(2, 1);
  const Matrix<float> dout = Matrix<float>::Ones(1, 1);
  const std::vector<float> bias{1e6F, 1e6F};
  const Inputs<float> in{.q = q, .k = k, .v = v, .key_bias = bias};
  for (const bool by_method : {false, true}) {
    const auto g = backward(SoftmaxKernel{}, in, dout, by_method);
    EXPECT_EQ(g.dv(0, 0), 0.5F);
    EXPECT_EQ(g.dv(1, 0), 0.5F);
  }
}

TEST(KeyBiasInBackward, OfAQueryFarFromItsKey) {
  const Matrix<float> q = Matrix<float>::Constant(1, 1, 1000.12F), k = Matrix<float>::Zero(1, 1),
                      v = Matrix<float>::Ones(1, 1);
  const Matrix<float> dout = v;
  const Inputs<float> in{.q = q, .k = k, .v = v};
  for (const bool by_method : {false, true}) {
    const auto g = backward(GaussianKernel{.bandwidth = 1, .rows = Rows::normalized}, in, dout, by_method);
    EXPECT_EQ(g.dv(0, 0), 1.0F);
  }
}

/// States of one row and one column.
struct OneState {
  float maximum, sum, weighted;

  attn::RowStates<float> view() { return {{&maximum, 1}, {&sum, 1}, MatrixRef<float>(&weighted, 1, 1, 1)}; }
};

float finished(OneState state, float* lse) {
  Matrix<float> out(1, 1);
  finish(SoftmaxKernel{}, state.view(), 1, out, std::span<float>(lse, 1));
  return out(0, 0);
}

TEST(MergedStates, WithoutKeysChangeNothing) {
  for (const float maximum : {-200.0F, -140.0F, 0.0F, 300.0F}) {
    for (const float none : {0.0F, -kInf<float>, kInf<float>, std::numeric_limits<float>::lowest(), 500.0F}) {
      OneState a{maximum, 1, 5}, b{none, 0, 0};
      OneState c = b, d = a;
      merge(a.view(), b.view());
      merge(c.view(), d.view());
      float lse = 0;
      EXPECT_EQ(finished(a, &lse), 5.0F);
      EXPECT_NEAR(lse, maximum * std::log(2.0F), 1e-4F);
      EXPECT_EQ(finished(c, &lse), 5.0F);
      EXPECT_NEAR(lse, maximum * std::log(2.0F), 1e-4F);
    }
  }
  OneState a{-kInf<float>, 0, 0}, b{-kInf<float>, 0, 0};
  merge(a.view(), b.view());
  float lse = 0;
  EXPECT_EQ(finished(a, &lse), 0.0F);
  EXPECT_EQ(lse, -kInf<float>);
}

TEST(MergedStates, OfRawRowsStayInRange) {
  Matrix<float> out(1, 1);
  for (const auto& [state, expected] : {std::pair{OneState{150, 1, 0x1p-100F}, 0x1p50F},
                                        {OneState{-200, 1, 0x1p100F}, 0x1p-100F},
                                        {OneState{1000, 0, 0}, 0.0F},
                                        {OneState{300, 1, 1}, kInf<float>}}) {
    OneState copy = state;
    finish(GaussianKernel{}, copy.view(), 1, out);
    EXPECT_EQ(out(0, 0), expected);
  }
}

/// The states of two parts of the keys, merged and finished.
template <class T, class Kernel>
Matrix<T> in_two_parts(const Kernel& kernel, const Inputs<T>& in, Index cut) {
  const Index n_q = in.q.rows(), d_v = in.v.cols(), n_k = in.k.rows();
  Context context;
  const auto part = [&](Index first, Index count, std::vector<T>& maximum, std::vector<T>& sum, Matrix<T>& weighted) {
    const auto bias = in.key_bias.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count));
    const Inputs<T> some{in.q, in.k.middleRows(first, count), in.v.middleRows(first, count), in.mask, bias};
    kernel_matmul_partial(kernel, some, {maximum, sum, weighted}, context);
  };
  const auto n = static_cast<std::size_t>(n_q);
  std::vector<T> maximum(n), sum(n), other_maximum(n), other_sum(n);
  Matrix<T> weighted(n_q, d_v), other_weighted(n_q, d_v), out(n_q, d_v);
  part(0, cut, maximum, sum, weighted);
  part(cut, n_k - cut, other_maximum, other_sum, other_weighted);
  merge(attn::RowStates<T>{maximum, sum, weighted}, {other_maximum, other_sum, other_weighted});
  finish(kernel, attn::RowStates<T>{maximum, sum, weighted}, in.q.cols(), out);
  return out;
}

TYPED_TEST(KeyBias, CommonToAllKeysTakesNoDigitsOfStates) {
  using T = TypeParam;
  for (const T size :
       {T(0), T(1e3), T(-1e5), T(1e7), T(1e30), std::numeric_limits<T>::lowest(), std::numeric_limits<T>::max()}) {
    for (const Index cut : {1, 100, 150}) {
      SCOPED_TRACE(std::to_string(size) + ", cut at " + std::to_string(cut));
      Biased<T> problem(60, 150, std::vector<T>(150, size), Causal::none);
      const auto p = to_reference(problem.inputs());
      const auto softmax = reference::softmax_kernel(8), gaussian = reference::gaussian_kernel(8, {}, true);
      expect_close(in_two_parts(SoftmaxKernel{}, problem.inputs(), cut), attend(softmax, p), p, softmax);
      expect_close(in_two_parts(GaussianKernel{.rows = Rows::normalized}, problem.inputs(), cut), attend(gaussian, p),
                   p, gaussian);
    }
  }
}

TYPED_TEST(KeyBias, ThatDiffersBetweenStates) {
  using T = TypeParam;
  for (const T size : {T(3e7), T(1e5), T(10), T(-1e9)}) {
    Biased<T> problem(60, 150, std::vector<T>(150, size), Causal::none);
    for (std::size_t j = 80; j < 150; ++j)
      problem.bias[j] = std::nextafter(size, T(0));  // below 1e5 nearly equal, beyond it far less
    const auto p = to_reference(problem.inputs());
    const auto softmax = reference::softmax_kernel(8);
    expect_close(in_two_parts(SoftmaxKernel{}, problem.inputs(), 80), attend(softmax, p), p, softmax);
  }
}

TEST(StatesOfParts, ComparedWithQueriesFarFromTheirKeys) {
  Tokens<float> x = make_tokens<float>(Family::init, {20, 60, 8, 5}, 3);
  x.q.array() += 300.0F;
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v, .key_bias = {}};
  const std::vector<float> none(60, 0.0F);
  const Inputs<float> biased{.q = x.q, .k = x.k, .v = x.v, .key_bias = none};
  const auto p = to_reference(in);
  const auto kernel = reference::gaussian_kernel(8, {}, true);
  EXPECT_LT(relative_error(in_two_parts(GaussianKernel{.rows = Rows::normalized}, biased, 25), attend(kernel, p).out),
            1e-4);
}

}  // namespace
}  // namespace test
