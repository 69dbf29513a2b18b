/// Refused arguments: every error is a std::invalid_argument that names the method, the argument and the numbers.
#include <attn/attn.hpp>

#include "support.hpp"

#include <gtest/gtest.h>

#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using attn::Causal;
using attn::GaussianKernel;
using attn::Rows;
using attn::SoftmaxKernel;
using test::Context;
using test::error_of;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;

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

/// Shapes of a training step for 6 tokens, each of which a test may get wrong in the backward pass.
struct Step {
  std::pair<Index, Index> out{6, 3}, dout{6, 3}, dq{6, 4}, dk{6, 4}, dv{6, 3};
};

/// The error of a backward pass for 6 tokens.
template <class Method>
std::string backward_error_of(const Method& method, const Step& step, typename Method::Saved& saved) {
  const auto zeros = [](const std::pair<Index, Index>& shape) -> Matrix<float> {
    return Matrix<float>::Zero(shape.first, shape.second);
  };
  const auto x = test::make_tokens<float>(test::Family::unit, {6, 6, 4, 3});
  const Matrix<float> out = zeros(step.out), dout = zeros(step.dout);
  Matrix<float> dq = zeros(step.dq), dk = zeros(step.dk), dv = zeros(step.dv);
  Context context;
  return error_of([&] { method.backward({.q = x.q, .k = x.k, .v = x.v}, out, dout, saved, {dq, dk, dv}, context); });
}

/// What a forward pass of inputs of that shape saves.
template <class Method>
typename Method::Saved saved_of(const Method& method, const test::Shape& shape) {
  const auto x = test::make_tokens<float>(test::Family::unit, shape);
  Matrix<float> out(shape.n_q, shape.d_v);
  typename Method::Saved saved;
  Context context;
  method.forward({.q = x.q, .k = x.k, .v = x.v}, out, context, saved);
  return saved;
}

/// Every method with 2 landmarks.
template <class Method>
Method with_few_landmarks() {
  if constexpr (std::is_constructible_v<Method, attn::SegmentMeans>) return Method(attn::SegmentMeans{2});
  if constexpr (std::is_constructible_v<Method, attn::UniformSample>) return Method(attn::UniformSample{2});
  return Method{};
}

template <class Method>
class BackwardErrorsOf : public ::testing::Test {
 protected:
  static std::string error(const Step& step, const test::Shape& saved_for) {
    const Method method = with_few_landmarks<Method>();
    typename Method::Saved saved = saved_of(method, saved_for);
    return backward_error_of(method, step, saved);
  }
  static std::string text(const std::string& rest) { return std::string(Method::kName) + ": " + rest; }
};
using TrainedMethods =
    ::testing::Types<attn::SoftmaxAttention<float>, attn::GaussianAttention<float>, attn::Nystrom<float>,
                     attn::ShiftedNystrom<float>, attn::Skyformer<float>, attn::LiftedSoftmax<float>>;
TYPED_TEST_SUITE(BackwardErrorsOf, TrainedMethods);

TYPED_TEST(BackwardErrorsOf, ShapesThatDisagree) {
  const auto error = [](const Step& step) { return TestFixture::error(step, {6, 6, 4, 3}); };
  EXPECT_EQ(error({}), "no error");
  EXPECT_EQ(error({.out = {5, 3}}), this->text("out is 5 x 3, should be 6 x 3"));
  EXPECT_EQ(error({.dout = {6, 4}}), this->text("dout is 6 x 4, should be 6 x 3"));
  EXPECT_EQ(error({.dq = {6, 3}}), this->text("dq is 6 x 3, should be 6 x 4"));
  EXPECT_EQ(error({.dk = {7, 4}}), this->text("dk is 7 x 4, should be 6 x 4"));
  EXPECT_EQ(error({.dv = {6, 4}}), this->text("dv is 6 x 4, should be 6 x 3"));
}

TYPED_TEST(BackwardErrorsOf, WhatOtherInputsSaved) {
  constexpr bool kSavesNothing = std::is_same_v<TypeParam, attn::GaussianAttention<float>>;  // for rows are raw
  constexpr bool kSavesLandmarks = !kSavesNothing && !std::is_same_v<TypeParam, attn::SoftmaxAttention<float>>;
  const auto saved_holds = [&](const std::string& what) {
    return this->text("saved holds " + what + ": it is not of a forward pass of these inputs");
  };
  typename TypeParam::Saved unused;
  const auto expect = [](const std::string& error, bool refused, const std::string& text) {
    EXPECT_EQ(error, refused ? text : "no error");
  };
  expect(backward_error_of(TypeParam{}, {}, unused), !kSavesNothing, saved_holds("0 rows of q, should hold 6"));
  expect(this->error({}, {5, 5, 4, 3}), !kSavesNothing, saved_holds("5 rows of q, should hold 6"));
  expect(this->error({}, {6, 6, 9, 3}), kSavesLandmarks, saved_holds("9 columns of k, should hold 4"));
  expect(this->error({}, {6, 6, 4, 7}), kSavesLandmarks, saved_holds("7 columns of v, should hold 3"));
}

TEST(Errors, WhatAnotherMethodSaved) {
  attn::AnyApproximator<float>::Saved saved;
  const auto softmax = attn::make_approximator<float>("softmax"), nystrom = attn::make_approximator<float>("nystrom");
  EXPECT_EQ(backward_error_of(softmax, {}, saved), "softmax: saved is not of a forward pass of this method");
  saved = saved_of(nystrom, {6, 6, 4, 3});
  EXPECT_EQ(backward_error_of(softmax, {}, saved), "softmax: saved is not of a forward pass of this method");
  EXPECT_EQ(backward_error_of(nystrom, {}, saved), "no error");
}

TEST(Errors, OfTheStreamedGradients) {
  const Matrix<float> q = Matrix<float>::Zero(6, 4), v = Matrix<float>::Zero(5, 3);
  Matrix<float> out = Matrix<float>::Zero(6, 3), dq = q, dk = q.topRows(5), dv = v;
  std::vector<float> lse(6), dbias(5), four(4);
  Context context;
  const auto error = [&](std::span<const float> sums, std::span<float> to) {
    return error_of([&] {
      attn::kernel_matmul_backward(SoftmaxKernel{}, Inputs<float>{.q = q, .k = q.topRows(5), .v = v}, out, sums, out,
                                   {dq, dk, dv}, context, to);
    });
  };
  EXPECT_EQ(error(lse, dbias), "no error");
  EXPECT_EQ(error(four, {}), "kernel_matmul_backward: lse has 4 entries, q has 6 rows");
  EXPECT_EQ(error({}, {}), "kernel_matmul_backward: lse is empty, should have 6 entries, for rows are normalized");
  EXPECT_EQ(error(lse, four), "kernel_matmul_backward: dbias has 4 entries, k has 5 rows");
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

TEST(Errors, ParametersOfThePreconditionedCore) {
  using attn::PreconditionedPinv, attn::UniformSample;
  const auto errors = [](const PreconditionedPinv& inverse) {
    return std::pair(error_of(attn::Skyformer<float, UniformSample, PreconditionedPinv>({}, inverse), Call{}),
                     error_of(attn::LiftedSoftmax<float, UniformSample, PreconditionedPinv>({}, inverse), Call{}));
  };
  const auto both = [](const std::string& text) { return std::pair("skyformer: " + text, "lifted-softmax: " + text); };
  EXPECT_EQ(errors({.gamma = -1}), both("gamma is -1, should be at least 0"));
  EXPECT_EQ(errors({.gamma = test::kNaN<double>}), both("gamma is nan, should be at least 0"));
  EXPECT_EQ(errors({.iterations = 0}), both("iterations is 0, should be at least 1"));
  EXPECT_EQ(errors({}), std::pair(std::string("no error"), std::string("no error")));
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
