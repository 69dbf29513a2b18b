/// Refused arguments: every error is a std::invalid_argument that names the method, the argument and the numbers.
#include <attn/attn.hpp>

#include "support.hpp"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using attn::Causal;
using attn::GaussianKernel;
using attn::Rows;
using attn::SoftmaxKernel;
using test::Context;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;

template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "no error";
}

/// Shapes of a call, each of which a test may get wrong.
struct Call {
  std::pair<Index, Index> q{5, 4}, k{6, 4}, v{6, 3}, out{5, 3};
  Mask mask{};
  std::vector<float> key_bias{};
};

template <class Method>
std::string error_of(const Method& method, const Call& call) {
  const auto zeros = [](const std::pair<Index, Index>& shape) -> Matrix<float> {
    return Matrix<float>::Zero(shape.first, shape.second);
  };
  const Matrix<float> q = zeros(call.q), k = zeros(call.k), v = zeros(call.v);
  Matrix<float> out = zeros(call.out);
  Context context;
  return error_of([&] { method.forward({.q = q, .k = k, .v = v, .mask = call.mask, .key_bias = call.key_bias}, out, context); });
}

/// kernel_matmul with the interface of a method.
struct KernelMatmul {
  static constexpr std::string_view kName = "kernel_matmul";
  void forward(const Inputs<float>& in, attn::MatrixRef<float> out, Context& context) const {
    attn::kernel_matmul(SoftmaxKernel{}, in, out, context);
  }
};

template <class Method>
class ErrorsOf : public ::testing::Test {
 protected:
  static void expect(const Call& call, const std::string& text) {
    EXPECT_EQ(error_of(Method{}, call), std::string(Method::kName) + ": " + text);
  }
};
using Methods =
    ::testing::Types<attn::SoftmaxAttention<float>, attn::GaussianAttention<float>, attn::Skyformer<float>, KernelMatmul>;
TYPED_TEST_SUITE(ErrorsOf, Methods);

TYPED_TEST(ErrorsOf, ShapesThatDisagree) {
  EXPECT_EQ(error_of(TypeParam{}, Call{}), "no error");
  TestFixture::expect({.k = {63, 4}, .v = {64, 3}}, "k has 63 rows, v has 64");
  TestFixture::expect({.q = {5, 16}, .k = {6, 8}}, "q has 16 columns, k has 8");
  TestFixture::expect({.out = {5, 4}}, "out is 5 x 4, should be 5 x 3");
  TestFixture::expect({.out = {6, 3}}, "out is 6 x 3, should be 5 x 3");
}

TYPED_TEST(ErrorsOf, EmptyMatrices) {
  TestFixture::expect({.q = {0, 64}}, "q is empty (0 x 64)");
  TestFixture::expect({.q = {5, 0}, .k = {6, 0}}, "q is empty (5 x 0)");
  TestFixture::expect({.k = {0, 4}, .v = {0, 3}}, "k is empty (0 x 4)");
  TestFixture::expect({.v = {6, 0}, .out = {5, 0}}, "v is empty (6 x 0)");
}

TYPED_TEST(ErrorsOf, MasksAndBiasesOfTheWrongLength) {
  const std::vector<std::uint8_t> four(4, 1), five(5, 1), six(6, 1);
  TestFixture::expect({.mask = {.keep_key = five}}, "keep_key has 5 entries, k has 6 rows");
  TestFixture::expect({.mask = {.keep_query = four}}, "keep_query has 4 entries, q has 5 rows");
  TestFixture::expect({.mask = {.keep_query = six}}, "keep_query has 6 entries, q has 5 rows");
  TestFixture::expect({.key_bias = std::vector<float>(5, 0)}, "key_bias has 5 entries, k has 6 rows");
}

TEST(Errors, KernelParameters) {
  const double nan = test::kNaN<double>, inf = test::kInf<double>;
  const auto softmax = [](double scale) { return error_of(attn::SoftmaxAttention<float>(SoftmaxKernel{.scale = scale}), Call{}); };
  EXPECT_EQ(softmax(nan), "softmax: scale is nan, should be finite");
  EXPECT_EQ(softmax(inf), "softmax: scale is inf, should be finite");
  EXPECT_EQ(softmax(0), "no error");
  const auto gaussian = [](double bandwidth) {
    return error_of(attn::GaussianAttention<float>(GaussianKernel{.bandwidth = bandwidth}), Call{});
  };
  EXPECT_EQ(gaussian(0), "gaussian: bandwidth is 0, should be positive and finite");
  EXPECT_EQ(gaussian(-1), "gaussian: bandwidth is -1, should be positive and finite");
  EXPECT_EQ(gaussian(nan), "gaussian: bandwidth is nan, should be positive and finite");
  EXPECT_EQ(gaussian(inf), "gaussian: bandwidth is inf, should be positive and finite");
}

TEST(Errors, LengthOfLse) {
  const Matrix<float> q = Matrix<float>::Zero(6, 4), v = Matrix<float>::Zero(6, 3);
  Matrix<float> out(6, 3);
  std::vector<float> lse(5);
  Context context;
  EXPECT_EQ(error_of([&] {
              attn::kernel_matmul(SoftmaxKernel{}, Inputs<float>{.q = q, .k = q, .v = v}, out, std::span<float>(lse), context);
            }),
            "kernel_matmul: lse has 5 entries, q has 6 rows");
}

TEST(Errors, RowStates) {
  const Matrix<float> q = Matrix<float>::Zero(6, 4), v = Matrix<float>::Zero(6, 3);
  Matrix<float> weighted(6, 3), narrow(6, 2);
  std::vector<float> maximum(6), sum(6), few(5);
  Context context;
  const auto partial = [&](const attn::RowStates<float>& states) {
    return error_of([&] { attn::kernel_matmul_partial(SoftmaxKernel{}, Inputs<float>{.q = q, .k = q, .v = v}, states, context); });
  };
  EXPECT_EQ(partial({maximum, sum, weighted}), "no error");
  EXPECT_EQ(partial({maximum, sum, narrow}), "kernel_matmul: weighted is 6 x 2, should be 6 x 3");
  EXPECT_EQ(partial({few, sum, weighted}), "kernel_matmul: maximum has 5 entries, weighted has 6 rows");
  EXPECT_EQ(partial({maximum, few, weighted}), "kernel_matmul: sum has 5 entries, weighted has 6 rows");
}

TEST(Errors, SkyformerParameters) {
  using attn::RidgeInverse, attn::Skyformer, attn::UniformSample;
  const double nan = test::kNaN<double>;
  EXPECT_EQ(error_of(Skyformer<float>(UniformSample{.num_landmarks = 0}), Call{}),
            "skyformer: num_landmarks is 0, should be at least 1");
  EXPECT_EQ(error_of(Skyformer<float>(UniformSample{.num_landmarks = -3}), Call{}),
            "skyformer: num_landmarks is -3, should be at least 1");
  EXPECT_EQ(error_of(Skyformer<float>({}, RidgeInverse{.gamma = -1}), Call{}), "skyformer: gamma is -1, should be at least 0");
  EXPECT_EQ(error_of(Skyformer<float>({}, RidgeInverse{.gamma = nan}), Call{}), "skyformer: gamma is nan, should be at least 0");
  EXPECT_EQ(error_of(Skyformer<float>({}, {}, GaussianKernel{.bandwidth = 0.0}), Call{}),
            "skyformer: bandwidth is 0, should be positive and finite");
}

TEST(Errors, SkyformerIsNotCausal) {
  const Matrix<float> q = Matrix<float>::Zero(6, 4);
  for (const Causal causal : {Causal::upper_left, Causal::lower_right}) {
    EXPECT_EQ(error_of(attn::Skyformer<float>{}, {.mask = {.causal = causal}}), "skyformer: causal masks are not supported");
    EXPECT_FALSE(attn::Skyformer<float>{}.supports({.q = q, .k = q, .v = q, .mask = {.causal = causal}}));
  }
  EXPECT_TRUE(attn::Skyformer<float>{}.supports({.q = q, .k = q, .v = q}));
}

TEST(Errors, LeaveOutAndContextUsable) {
  const auto x = test::make_tokens<float>(test::Family::unit, {5, 6, 4, 3});
  Matrix<float> out = Matrix<float>::Constant(5, 3, 7.0F);
  Context context;
  EXPECT_THROW(attn::SoftmaxAttention<float>{}.forward({.q = x.q, .k = x.k, .v = x.v.topRows(5)}, out, context),
               std::invalid_argument);
  EXPECT_TRUE((out.array() == 7.0F).all());
  EXPECT_NO_THROW(attn::SoftmaxAttention<float>{}.forward({.q = x.q, .k = x.k, .v = x.v}, out, context));
}

}  // namespace
