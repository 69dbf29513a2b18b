/// Tokens far from the others, or in groups that are: what Gaussian weights of pairs near each other lose by where they
/// are measured from.
#include <attn/exact.hpp>
#include <attn/kernel_matmul.hpp>
#include <attn/skyformer.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

namespace test {
namespace {

using attn::Causal;
using attn::GaussianKernel;
using attn::Rows;

/// Moves tokens; q and k move alike where both are to.
struct Move {
  std::string name;
  std::function<void(Matrix<float>& q, Matrix<float>& k)> apply;
};

void move_rows(Matrix<float>& x, Index first, Index step, float by) {
  for (Index i = first; i < x.rows(); i += step) x.row(i).array() += by;
}

/// The first key, or one whose share of the mean is as large; several first tokens; two groups; all tokens; far queries
/// among far keys.
std::vector<Move> moves() {
  return {
      {"first key", [](auto&, auto& k) { k.row(0).array() += 30.0F; }},
      {"one key, very far",
       [](auto&, auto& k) { k.row(k.rows() / 2).array() += 30.0F * static_cast<float>(k.rows()); }},
      {"first token", [](auto& q, auto& k) { q.row(0).array() += 30.0F, k.row(0).array() += 30.0F; }},
      {"first four tokens", [](auto& q, auto& k) { q.topRows(4).array() += 50.0F, k.topRows(4).array() += 50.0F; }},
      {"two groups", [](auto& q, auto& k) { move_rows(q, 0, 2, 40), move_rows(k, 0, 2, 40); }},
      {"three groups",
       [](auto& q, auto& k) {
         move_rows(q, 0, 3, 40), move_rows(k, 0, 3, 40), move_rows(q, 1, 3, -25), move_rows(k, 1, 3, -25);
       }},
      {"a late group",
       [](auto& q, auto& k) {
         q.bottomRows(q.rows() / 2).array() += 40.0F, k.bottomRows(k.rows() / 4).array() += 40.0F;
       }},
      {"all tokens", [](auto& q, auto& k) { q.array() += 64.0F, k.array() += 64.0F; }},
  };
}

/// float, in every form of the product: many queries, few queries with split keys, few keys; with masks and biases.
void expect_close_to_oracle(const Move& move, const GaussianKernel& kernel, Shape shape, Causal causal, bool biased) {
  Tokens<float> x = make_tokens<float>(Family::init, shape, 7);
  move.apply(x.q, x.k);
  std::vector<float> bias = biased ? random_key_bias<float>(shape.n_k, 0.1, 5) : std::vector<float>{};
  for (std::size_t j = 0; j < bias.size(); ++j)
    bias[j] += j % 5 == 0 ? 1.0F : -100.0F;  // so much that near pairs are not told by scores
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}, .key_bias = bias};
  const auto p = to_reference(in);
  const auto oracle_kernel = reference::gaussian_kernel(x.q.cols(), kernel.bandwidth, kernel.rows == Rows::normalized);
  const auto expected = attend(oracle_kernel, p);
  Matrix<float> out(shape.n_q, shape.d_v), dq(shape.n_q, shape.d), dk(shape.n_k, shape.d), dv(shape.n_k, shape.d_v);
  Context context;
  const attn::GaussianAttention<float> method{kernel};
  attn::GaussianAttention<float>::Saved saved;
  method.forward(in, out, context);
  EXPECT_LT(relative_error(out, expected.out), 2e-6);
  method.forward(in, out, context, saved);
  EXPECT_LT(relative_error(out, expected.out), 2e-6);
  const Matrix<float> dout = make_tokens<float>(Family::init, {1, shape.n_q, 1, shape.d_v}, 8).v;
  method.backward(in, out, dout, saved, {dq, dk, dv}, context);
  const auto gradients = attend_backward(oracle_kernel, p, dout.cast<double>());
  EXPECT_LT(relative_error(dv, gradients.dv), 3e-6);
  EXPECT_LT(relative_error(dq, gradients.dq),
            1e-4);  // a sum of differences to keys, each as precise as its tokens' distance from the center
  EXPECT_LT(relative_error(dk, gradients.dk), 1e-4);
}

TEST(FarTokens, TakeNoDigitsFromOthers) {
  for (const Move& move : moves()) {
    for (const Rows rows : {Rows::raw, Rows::normalized}) {
      for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
        for (const Shape shape : {Shape{300, 300, 16, 9}, Shape{20, 2600, 16, 9}, Shape{400, 60, 16, 9}}) {
          for (const bool biased : {false, true}) {
            SCOPED_TRACE(move.name + ", rows " + std::to_string(static_cast<int>(rows)) + ", causal " +
                         std::to_string(static_cast<int>(causal)) + ", n_q " + std::to_string(shape.n_q) +
                         (biased ? ", biased" : ""));
            expect_close_to_oracle(move, {.rows = rows}, shape, causal, biased);
          }
        }
      }
    }
  }
}

/// Lanes without a query, and dropped queries, are in no place, however far the keys are from zero: nothing is read of
/// them.
TEST(FarTokens, AreNotThoseThatAreMissing) {
  Tokens<float> x = make_tokens<float>(Family::init, {13, 40, 16, 9}, 7);
  x.q.array() += 64.0F;
  x.k.array() += 64.0F;
  x.k.topRows(3).array() -= 64.0F;
  std::vector<std::uint8_t> keep(13, 1);
  keep[5] = 0;
  x.q.row(5).setConstant(kNaN<float>);
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.keep_query = keep}};
    Matrix<float> out(13, 9);
    Context context;
    attn::GaussianAttention<float>{GaussianKernel{.rows = rows}}.forward(in, out, context);
    EXPECT_LT(
        relative_error(out, attend(reference::gaussian_kernel(16, {}, rows == Rows::normalized), to_reference(in)).out),
        2e-6);
  }
}

/// A row's bits must not depend on whether later queries, or keys, are far.
TEST(FarTokens, ThatComeLaterChangeNoBit) {
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    for (const bool biased : {false, true}) {
      const Tokens<float> x = make_tokens<float>(Family::init, {200, 200, 16, 9}, 7);
      Tokens<float> y = x;
      y.q.bottomRows(117).array() += 40.0F;
      y.k.bottomRows(117).array() += 40.0F;
      const std::vector<float> bias = biased ? random_key_bias<float>(200, 0.1, 5) : std::vector<float>{};
      Matrix<float> a(200, 9), b(200, 9);
      Context context;
      const attn::GaussianAttention<float> method{GaussianKernel{.rows = rows}};
      method.forward({.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = Causal::upper_left}, .key_bias = bias}, a,
                     context);
      method.forward({.q = y.q, .k = y.k, .v = y.v, .mask = {.causal = Causal::upper_left}, .key_bias = bias}, b,
                     context);
      for (Index i = 0; i < 83; ++i) EXPECT_TRUE(same_row(a, b, i)) << "row " << i;
    }
  }
}

TEST(FarTokens, AmongLandmarksTakeNoDigits) {
  for (const Move& move : moves()) {
    for (const Rows rows : {Rows::raw, Rows::normalized}) {
      SCOPED_TRACE(move.name + ", rows " + std::to_string(static_cast<int>(rows)));
      Tokens<float> x = make_tokens<float>(Family::init, {128, 128, 16, 9}, 7);
      move.apply(x.q, x.k);
      const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
      Matrix<float> out(128, 9);
      Context context;
      attn::Skyformer<float, attn::StridedSample>{attn::StridedSample{.num_landmarks = 40}, {}, {.rows = rows}}.forward(
          in, out, context);
      const auto p = to_reference(in);
      const auto kernel = reference::gaussian_kernel(16, {}, rows == Rows::normalized);
      const auto inverse = [](const reference::Matrix& a) { return reference::ridge_inverse(a, 0.1); };
      const reference::Matrix expected = skyformer(kernel, p, strided_landmarks(p, 40), inverse);
      // Not of the first tokens, which may be so far from all landmarks that the oracle's weights underflow.
      EXPECT_LT(relative_error<float>(out.bottomRows(124), expected.bottomRows(124)), 1e-5);
    }
  }
}

/// Tokens along a line, in its order or not: most are far from the center, and each is near some others and so far from
/// most that their weights are 0.
template <class T>
Tokens<T> along_a_line(Index n, Index d, bool ordered) {
  Tokens<T> x = make_tokens<T>(Family::init, {n, n, d, 9}, 7);
  for (Index i = 0; i < n; ++i) {
    const auto at = static_cast<T>(ordered ? i : i * 577 % n) / 4;
    x.q(i, 0) += at;
    x.k(i, 0) += at;
  }
  return x;
}

template <class T>
void expect_close_along_a_line(Index n_k, Index d, bool ordered, Rows rows, double tolerance) {
  SCOPED_TRACE("n_k " + std::to_string(n_k) + ", d " + std::to_string(d) + (ordered ? ", ordered" : "") + ", rows " +
               std::to_string(static_cast<int>(rows)));
  Tokens<T> x = along_a_line<T>(1201, d, ordered);
  const Inputs<T> in{.q = x.q, .k = x.k.topRows(n_k), .v = x.v.topRows(n_k)};
  const GaussianKernel kernel{.bandwidth = 1, .rows = rows};
  const auto oracle_kernel = reference::gaussian_kernel(d, kernel.bandwidth, rows == Rows::normalized);
  Matrix<T> out(1201, 9);
  Context context;
  attn::GaussianAttention<T>{kernel}.forward(in, out, context);
  EXPECT_LT(relative_error(out, attend(oracle_kernel, to_reference(in)).out), tolerance);
}

TEST(FarTokens, AlongALineTakeNoDigits) {
  for (const Index n_k : {1201, 60}) {  // many keys, and few
    for (const Index d : {1, 5, 32, 33}) {
      for (const bool ordered : {true, false}) {
        if (n_k < 1201 && ordered) continue;  // queries far from every key are another test's
        expect_close_along_a_line<float>(n_k, d, ordered, Rows::raw, 3e-6);
        expect_close_along_a_line<double>(n_k, d, ordered, Rows::raw, 3e-14);
        if (n_k == 1201) expect_close_along_a_line<float>(n_k, d, ordered, Rows::normalized, 3e-6);
        if (n_k == 1201) expect_close_along_a_line<double>(n_k, d, ordered, Rows::normalized, 3e-14);
      }
    }
  }
}

/// A tile whose weights are all 0 is passed over, unless 0 times its values is NaN.
TEST(FarTokens, WithoutWeightHideNoNaN) {
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    for (const int where : {0, 1, 2, 3}) {
      SCOPED_TRACE("rows " + std::to_string(static_cast<int>(rows)) + ", where " + std::to_string(where));
      Tokens<float> x = along_a_line<float>(1201, 5, true);
      (where == 0 ? x.v : x.k)(where < 2 ? 1199 : 3, 2) =
          where == 3 ? std::numeric_limits<float>::infinity() : kNaN<float>;
      if (where == 3) x.v(3, 1) = -std::numeric_limits<float>::infinity();
      Matrix<float> out(1201, 9);
      Context context;
      attn::GaussianAttention<float>{GaussianKernel{.bandwidth = 1, .rows = rows}}.forward(
          {.q = x.q, .k = x.k, .v = x.v}, out, context);
      for (Index i = 0; i < 1201; ++i) EXPECT_TRUE(out.row(i).array().isNaN().any()) << "row " << i;
    }
  }
  Tokens<float> x = along_a_line<float>(1201, 5, true);
  x.q(700, 1) = kNaN<float>;
  Matrix<float> out(1201, 9);
  Context context;
  attn::GaussianAttention<float>{GaussianKernel{.bandwidth = 1}}.forward({.q = x.q, .k = x.k, .v = x.v}, out, context);
  for (Index i = 0; i < 1201; ++i) EXPECT_EQ(out.row(i).array().isNaN().all(), i == 700) << "row " << i;
}

/// Far beyond where scores have digits, a row is still its nearest key's.
TEST(FarTokens, VeryFarAlongALineHaveTheirOwnValues) {
  Tokens<float> x = along_a_line<float>(1201, 5, true);
  for (Index i = 0; i < 1201; ++i) x.k(i, 0) = static_cast<float>(i) * 1e5F;
  x.q = x.k;
  Matrix<float> out(1201, 9);
  Context context;
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    attn::GaussianAttention<float>{GaussianKernel{.bandwidth = 1, .rows = rows}}.forward({.q = x.q, .k = x.k, .v = x.v},
                                                                                         out, context);
    EXPECT_LT(relative_error(out, reference::Matrix(x.v.cast<double>())), 1e-6);
  }
}

/// Where no key is near a query, the error grows with the exponents, as docs/numerics.md says.
TEST(FarTokens, QueriesFarFromEveryKey) {
  for (const float distance : {1.0F, 5.0F, 7.1F, 20.0F}) {
    Tokens<float> x = make_tokens<float>(Family::init, {200, 300, 16, 9}, 7);
    x.q.array() += distance;
    const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
    const auto kernel = reference::gaussian_kernel(16, {}, true);
    const auto expected = attend(kernel, to_reference(in));
    Matrix<float> out(200, 9);
    Context context;
    attn::GaussianAttention<float>{GaussianKernel{.rows = Rows::normalized}}.forward(in, out, context);
    EXPECT_LT(relative_error(out, expected.out), 2e-6 + 1e-8 * std::abs(expected.lse.minCoeff()))
        << "exponents near " << expected.lse.mean();
  }
}

/// With small bandwidths every weight has a large exponent.
TEST(LargeExponents, KeepTheirBound) {
  for (const Index d : {4, 16, 64}) {
    for (const double h : {1.0, 0.5, 0.25, 0.1, 0.05}) {
      SCOPED_TRACE("d " + std::to_string(d) + ", bandwidth " + std::to_string(h));
      const Tokens<float> x = make_tokens<float>(Family::unit, {150, 400, d, 9}, 7);
      const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
      const auto p = to_reference(in);
      Context context;
      Matrix<float> out(150, 9);
      const auto expected = attend(reference::gaussian_kernel(d, h, true), p);
      attn::GaussianAttention<float>{GaussianKernel{.bandwidth = h, .rows = Rows::normalized}}.forward(in, out,
                                                                                                       context);
      EXPECT_LT(relative_error(out, expected.out), 2e-6 + 1e-8 * std::abs(expected.lse.minCoeff()));
      const auto raw = attend(reference::gaussian_kernel(d, h), p);
      if (raw.lse.maxCoeff() < -60) continue;  // below what float holds
      attn::GaussianAttention<float>{GaussianKernel{.bandwidth = h}}.forward(in, out, context);
      EXPECT_LT(relative_error(out, raw.out), 2e-6 + 2e-7 * std::max(0.0, -raw.lse.maxCoeff()));
    }
  }
}

TEST(ManyFeatures, KeepTheTolerance) {
  for (const Index d : {64, 255, 256, 257, 600, 1024}) {
    const Tokens<float> x = make_tokens<float>(Family::unit, {150, 200, d, 9}, 7);
    const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
    const auto p = to_reference(in);
    Context context;
    Matrix<float> out(150, 9);
    for (const Rows rows : {Rows::raw, Rows::normalized}) {
      SCOPED_TRACE("d " + std::to_string(d) + ", rows " + std::to_string(static_cast<int>(rows)));
      attn::GaussianAttention<float>{GaussianKernel{.rows = rows}}.forward(in, out, context);
      const double bound = rows == Rows::raw && d > 256 ? 4e-6 : 2e-6;
      EXPECT_LT(relative_error(out, attend(reference::gaussian_kernel(d, {}, rows == Rows::normalized), p).out), bound);
    }
    attn::SoftmaxAttention<float>{}.forward(in, out, context);
    EXPECT_LT(relative_error(out, attend(reference::softmax_kernel(d), p).out), 2e-6);
  }
}

}  // namespace
}  // namespace test
