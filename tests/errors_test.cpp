/// Refused arguments: every error is a std::invalid_argument that names the method, the argument and the numbers.
#include <attn/attn.hpp>

#include "common/methods.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <new>
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
  return error_of(
      [&] { method.forward({.q = q, .k = k, .v = v, .mask = call.mask, .key_bias = call.key_bias}, out, context); });
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
using Methods = ::testing::Types<attn::SoftmaxAttention<float>, attn::GaussianAttention<float>, attn::Skyformer<float>,
                                 attn::Multipole<float>, KernelMatmul>;
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

/// A view of a wrong size, as a Map of one is without Eigen's assertions.
attn::ConstMatrixRef<float> sized(Index rows, Index cols) {
  return {nullptr, rows, cols, cols};
}

TYPED_TEST(ErrorsOf, NegativeSizes) {
  const Matrix<float> q = Matrix<float>::Zero(5, 4), k = Matrix<float>::Zero(6, 4), v = Matrix<float>::Zero(6, 3);
  Matrix<float> out(5, 3);
  Context context;
  const auto expect = [&](const Inputs<float>& in, attn::MatrixRef<float> to, const std::string& text) {
    EXPECT_EQ(error_of([&] { TypeParam{}.forward(in, to, context); }), std::string(TypeParam::kName) + ": " + text);
  };
  const attn::MatrixRef<float> negative(nullptr, -3, 3, 3);
  expect({.q = sized(-3, 4), .k = k, .v = v}, negative, "q is -3 x 4, should be at least 1 x 1");
  expect({.q = q, .k = sized(-3, 4), .v = sized(-3, 3)}, out, "k is -3 x 4, should be at least 1 x 1");
  expect({.q = sized(5, -4), .k = sized(6, -4), .v = v}, out, "q is 5 x -4, should be at least 1 x 1");
  expect({.q = q, .k = k, .v = sized(6, -1)}, {nullptr, 5, -1, 1}, "v is 6 x -1, should be at least 1 x 1");
  expect({.q = q, .k = k, .v = v}, negative, "out is -3 x 3, should be 5 x 3");
}

TEST(Errors, NegativeSizesElsewhere) {
  const Matrix<float> x = Matrix<float>::Zero(6, 4);
  Matrix<float> to = x;
  std::vector<float> taps(3), few{};
  Context context;
  EXPECT_EQ(error_of([&] {
              static_cast<void>(attn::attention(attn::make_approximator<float>("softmax"), sized(-3, 4), x, x));
            }),
            "softmax: q is -3 x 4, should be at least 1 x 1");
  EXPECT_EQ(error_of([&] { static_cast<void>(attn::attention(attn::Nystrom<float>{}, x, x, sized(6, -4))); }),
            "nystrom: v is 6 x -4, should be at least 1 x 1");
  EXPECT_EQ(error_of([&] {
              attn::depthwise_conv<float>(sized(-3, 4), taps, {nullptr, -3, 4, 4}, context);
            }),
            "depthwise_conv: v is -3 x 4, should be at least 1 x 1");
  const attn::RowStates<float> negative{few, few, {nullptr, 6, -4, 4}};
  EXPECT_EQ(error_of([&] { attn::merge(negative, negative); }), "merge: weighted is 6 x -4, should be at least 1 x 1");
  EXPECT_EQ(error_of([&] {
              attn::finish(SoftmaxKernel{}, negative, 4, {nullptr, 6, -4, 4});
            }),
            "finish: out is 6 x -4, should be at least 1 x 1");
  const attn::ApproximatorOperator<attn::Nystrom<float>> op(attn::Nystrom<float>{}, x, x);
  EXPECT_EQ(error_of([&] { op.apply(sized(-3, 4), to, context); }), "nystrom: v is -3 x 4, should be at least 1 x 1");
  EXPECT_EQ(error_of([&] { op.apply_transpose(sized(-3, 4), to, context); }),
            "approximator operator: x is -3 x 4, should be 6 x 4");
  EXPECT_EQ(error_of([&] {
              op.apply_transpose(x, {nullptr, 6, -4, 4}, context);
            }),
            "approximator operator: v is 6 x -4, should be at least 1 x 1");
  EXPECT_EQ(error_of([&] {
              attn::Difference(op, op).apply(x, {nullptr, -3, 4, 4}, context);
            }),
            "nystrom: out is -3 x 4, should be 6 x 4");
}

/// A landmark policy of a user's that gives matrices of zeros of these shapes: for 6 queries, for 5 keys, and for both
/// together.
struct AnyLandmarks {
  std::pair<Index, Index> of_queries{2, 4}, of_keys{2, 4}, of_both{2, 4};
  Index num_landmarks = 2;

  template <class T>
  static attn::MatrixRef<T> zeros(const std::pair<Index, Index>& shape, attn::Scratch& scratch) {
    if (shape.first < 0) return {nullptr, shape.first, shape.second, shape.second};
    attn::MatrixRef<T> landmarks = scratch.matrix<T>(shape.first, shape.second);
    landmarks.setZero();
    return landmarks;
  }
  template <class T, class Keeps>
  attn::MatrixRef<T> select(const attn::ConstMatrixRef<T>& x, const Keeps&, attn::Scratch& scratch) const {
    return zeros<T>(x.rows() == 6 ? of_queries : of_keys, scratch);
  }
  template <class T>
  attn::MatrixRef<T> select(const Inputs<T>&, attn::Scratch& scratch) const {
    return zeros<T>(of_both, scratch);
  }
};

template <class T>
std::pair<std::string, std::string> landmark_errors(const AnyLandmarks& landmarks, const Mask& mask = {}) {
  const Matrix<T> q = Matrix<T>::Ones(6, 4), k = Matrix<T>::Ones(5, 4);
  Matrix<T> out(6, 4);
  Context context;
  const Inputs<T> in{.q = q, .k = k, .v = k, .mask = mask};
  return {error_of([&] { attn::Nystrom<T, AnyLandmarks>{landmarks}.forward(in, out, context); }),
          error_of([&] { attn::Skyformer<T, AnyLandmarks>{landmarks}.forward(in, out, context); })};
}

TEST(Errors, LandmarksOfAUsersPolicy) {
  const std::string counts = "nystrom: there are 3 landmarks of q, 2 of k, should be as many";
  EXPECT_EQ(landmark_errors<float>({.of_queries = {3, 4}}).first, counts);
  EXPECT_EQ(landmark_errors<double>({.of_queries = {3, 4}}).first, counts);
  EXPECT_EQ(landmark_errors<Eigen::half>({.of_queries = {3, 4}}).first, counts);
  EXPECT_EQ(landmark_errors<float>({.of_keys = {2, 3}}).first,
            "nystrom: landmarks of k are 2 x 3, should be at least 1 x 4");
  EXPECT_EQ(landmark_errors<float>({.of_queries = {2, 5}}).first,
            "nystrom: landmarks of q are 2 x 5, should be at least 1 x 4");
  EXPECT_EQ(landmark_errors<float>({.of_queries = {0, 4}, .of_keys = {0, 4}}).first,
            "nystrom: landmarks of q are 0 x 4, should be at least 1 x 4");
  EXPECT_EQ(landmark_errors<float>({.of_both = {2, 3}}).second,
            "skyformer: landmarks of q and k are 2 x 3, should be at least 1 x 4");
  EXPECT_EQ(landmark_errors<Eigen::bfloat16>({.of_both = {9, 5}}).second,
            "skyformer: landmarks of q and k are 9 x 5, should be at least 1 x 4");
  EXPECT_EQ(landmark_errors<double>({.of_both = {0, 4}}).second,
            "skyformer: landmarks of q and k are 0 x 4, should be at least 1 x 4");
  EXPECT_EQ(landmark_errors<float>({.of_both = {-2, 4}}).second,
            "skyformer: landmarks of q and k are -2 x 4, should be at least 1 x 4");
  const std::vector<std::uint8_t> none(5, 0);
  EXPECT_EQ(landmark_errors<float>({.of_both = {0, 4}}, {.keep_key = none}).second, "no error");
  EXPECT_EQ(landmark_errors<float>({.of_both = {-2, 4}}, {.keep_key = none}).second,
            "skyformer: landmarks of q and k are -2 x 4, should be at least 0 x 4");
  EXPECT_EQ(landmark_errors<float>({}), std::pair(std::string("no error"), std::string("no error")));
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

/// Every method with 2 landmarks, or 2 clusters of which one is near.
template <class Method>
Method with_few_landmarks() {
  if constexpr (std::is_constructible_v<Method, attn::Clusters>)
    return Method(attn::Clusters{.num_clusters = 2, .num_near = 1});
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
using TrainedMethods = ::testing::Types<attn::SoftmaxAttention<float>, attn::GaussianAttention<float>,
                                        attn::Multipole<float>, attn::Nystrom<float>, attn::ShiftedNystrom<float>,
                                        attn::Skyformer<float>, attn::LiftedSoftmax<float>>;
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
  const auto saved_holds = [&](const std::string& what) {
    return this->text("saved holds " + what + ": it is not of a forward pass of these inputs");
  };
  typename TypeParam::Saved unused;
  const auto expect = [](const std::string& error, bool refused, const std::string& text) {
    EXPECT_EQ(error, refused ? text : "no error");
  };
  expect(backward_error_of(TypeParam{}, {}, unused), !kSavesNothing, saved_holds("0 rows of q, should hold 6"));
  expect(this->error({}, {5, 5, 4, 3}), !kSavesNothing, saved_holds("5 rows of q, should hold 6"));
  expect(this->error({}, {6, 6, 9, 3}), !kSavesNothing, saved_holds("9 columns of k, should hold 4"));
  expect(this->error({}, {6, 6, 4, 7}), !kSavesNothing, saved_holds("7 columns of v, should hold 3"));
  if (TypeParam::kName == "shifted-nystrom") return;  // has as many keys as queries
  expect(this->error({}, {6, 8, 4, 3}), !kSavesNothing, saved_holds("8 rows of k, should hold 6"));
}

static_assert(!std::is_same_v<attn::Skyformer<float>::Saved, attn::LiftedSoftmax<float>::Saved>);
static_assert(!std::is_convertible_v<attn::LiftedSoftmax<float>::Saved, attn::Skyformer<float>::Saved>);
static_assert(
    !std::is_convertible_v<attn::Nystrom<float, attn::SegmentMeans, attn::IterativePinv, GaussianKernel>::Saved,
                           attn::Nystrom<float>::Saved>);
static_assert(!std::is_convertible_v<attn::ShiftedNystrom<float>::Saved, attn::Nystrom<float>::Saved>);

/// The error of a backward pass of one method after the forward pass of another, both erased, with inputs of their own.
template <class T>
std::string error_after(const attn::AnyApproximator<T>& forward, const attn::AnyApproximator<T>& backward,
                        const Inputs<T>& then, const Inputs<T>& now) {
  typename attn::AnyApproximator<T>::Saved saved;
  Matrix<T> out(12, 3), dq(12, 4), dk(12, 4), dv(12, 3);
  const Matrix<T> dout = Matrix<T>::Ones(12, 3);
  Context context;
  forward.forward(then, out, context, saved);
  return error_of([&] { backward.backward(now, out, dout, saved, {dq, dk, dv}, context); });
}

template <class T>
std::string error_after(const std::string& name, const attn::MethodOptions& then, const attn::MethodOptions& now) {
  const auto x = test::make_tokens<T>(test::Family::unit, {12, 12, 4, 3});
  const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
  return error_after<T>(attn::find_method<T>(name).make(then), attn::find_method<T>(name).make(now), in, in);
}

TEST(Errors, SavedWithOtherOptions) {
  const auto landmarks = [](const std::string& name, Index then, Index now) {
    return name + ": saved holds " + std::to_string(then) + " landmarks, should hold " + std::to_string(now) +
           ": it is not of a forward pass of these inputs";
  };
  for (const std::string name : {"nystrom", "shifted-nystrom", "skyformer", "lifted-softmax"}) {
    for (const auto& [then, now] :
         {std::pair<Index, Index>{4, 8}, {8, 4}, {4, 40}, {40, 4}}) {  // at 40 two of them are exact
      EXPECT_EQ(error_after<float>(name, {.num_landmarks = then}, {.num_landmarks = now}), landmarks(name, then, now));
      EXPECT_EQ(error_after<double>(name, {.num_landmarks = then}, {.num_landmarks = now}), landmarks(name, then, now));
      EXPECT_EQ(error_after<Eigen::half>(name, {.num_landmarks = then}, {.num_landmarks = now}),
                landmarks(name, then, now));
    }
    EXPECT_EQ(error_after<float>(name, {.num_landmarks = 4}, {.num_landmarks = 4}), "no error");
  }
  const auto options = [](const std::string& name) { return name + ": saved is of a forward pass with other options"; };
  const attn::MethodOptions few = test::of_size(4);
  const auto error = [&](const std::string& name, const auto& change) {
    attn::MethodOptions other = few;
    change(other);
    return error_after<float>(name, other, few);
  };
  EXPECT_EQ(error("multipole", [](auto& o) { o.num_clusters = 3; }), options("multipole"));
  EXPECT_EQ(error("multipole", [](auto& o) { o.num_near = 2; }), options("multipole"));
  EXPECT_EQ(error("nystrom", [](auto& o) { o.iterations = 9; }), options("nystrom"));
  EXPECT_EQ(error("shifted-nystrom", [](auto& o) { o.iterations = 9; }), options("shifted-nystrom"));
  EXPECT_EQ(error("shifted-nystrom", [](auto& o) { o.mode = attn::ShiftMode::scalar; }), options("shifted-nystrom"));
  for (const std::string name : {"skyformer", "lifted-softmax"}) {
    EXPECT_EQ(error(name, [](auto& o) { o.seed = 9; }), options(name));
    EXPECT_EQ(error(name, [](auto& o) { o.gamma = 0.5; }), options(name));
  }
  EXPECT_EQ(error("skyformer", [](auto& o) { o.rows = Rows::normalized; }),
            "skyformer: saved is of a forward pass with scale 0.5, bias 0.25 and normalized rows, should be of 0.5, "
            "0.25 and raw");
  EXPECT_EQ(error("skyformer", [](auto& o) { o.bandwidth = 0.5; }),
            "skyformer: saved is of a forward pass with scale 4, bias 2 and raw rows, should be of 0.5, 0.25 and raw");
  for (const std::string name : {"softmax", "multipole", "nystrom", "shifted-nystrom", "lifted-softmax"}) {
    EXPECT_NE(error(name, [](auto& o) { o.scale = 2.0; }).find("saved is of a forward pass with scale 2, bias 0"),
              std::string::npos);
    EXPECT_EQ(error(name, [](auto& o) { o.scale = 0.5; }), "no error");  // which is the default's value
  }
  EXPECT_EQ(error("gaussian", [](auto& o) { o.rows = Rows::normalized; }),
            "gaussian: saved holds 12 rows of q, should hold 0: it is not of a forward pass of these inputs");
}

TEST(Errors, SavedWithOtherMasksAndBiases) {
  const auto x = test::make_tokens<float>(test::Family::unit, {12, 12, 4, 3});
  std::vector<std::uint8_t> keep(12, 1), other(12, 1), all(12, 7);
  keep[3] = other[4] = 0;
  const std::vector<float> bias(12, 0.0F);
  std::vector<float> removed = bias;
  removed[3] = -test::kInf<float>;
  const auto with = [&](const Mask& mask, std::span<const float> key_bias = {}) {
    return Inputs<float>{.q = x.q, .k = x.k, .v = x.v, .mask = mask, .key_bias = key_bias};
  };
  const auto error = [&](const std::string& name, const Inputs<float>& then, const Inputs<float>& now) {
    const auto method = attn::find_method<float>(name).make(test::of_size(4));
    return error_after<float>(method, method, then, now);
  };
  for (const std::string name : {"softmax", "multipole", "nystrom", "shifted-nystrom", "skyformer", "lifted-softmax"}) {
    const std::string refused = name + ": saved is of a forward pass with another mask";
    EXPECT_EQ(error(name, with({.keep_key = keep, .keep_query = keep}), with({.keep_key = other, .keep_query = other})),
              refused);
    EXPECT_EQ(error(name, with({}), with({.keep_key = other, .keep_query = other})), refused);
    EXPECT_EQ(error(name, with({.keep_key = keep, .keep_query = keep}), with({})), refused);
    EXPECT_EQ(error(name, with({.keep_key = all}), with({})), "no error");
  }
  EXPECT_EQ(error("softmax", with({.causal = Causal::upper_left}), with({})),
            "softmax: saved is of a forward pass with another mask");
  for (const std::string name : {"softmax", "multipole", "skyformer", "lifted-softmax"}) {
    EXPECT_EQ(error(name, with({}, bias), with({})), name + ": saved is of a forward pass with key biases");
    EXPECT_EQ(error(name, with({}), with({}, bias)), name + ": saved is of a forward pass with no key biases");
    EXPECT_EQ(error(name, with({}, bias), with({}, removed)), name + ": saved is of a forward pass with another mask");
  }
}

/// Segment means, unless it runs out of memory.
struct Failing : attn::SegmentMeans {
  bool fails = false;

  template <class T, class Keeps>
  attn::MatrixRef<T> select(const attn::ConstMatrixRef<T>& x, const Keeps& keeps, attn::Scratch& scratch) const {
    if (fails) throw std::bad_alloc();
    return attn::SegmentMeans::select<T>(x, keeps, scratch);
  }
};

TEST(Errors, WhatAForwardPassThatThrewLeft) {
  const attn::Nystrom<float, Failing> method(Failing{{2}}), failing(Failing{{2}, true});
  auto saved = saved_of(method, {6, 6, 4, 3});
  EXPECT_EQ(backward_error_of(method, {}, saved), "no error");
  const auto x = test::make_tokens<float>(test::Family::unit, {9, 9, 4, 3});
  Matrix<float> out(9, 3);
  Context context;
  EXPECT_THROW(failing.forward({.q = x.q, .k = x.k, .v = x.v}, out, context, saved), std::bad_alloc);
  EXPECT_EQ(backward_error_of(method, {}, saved),
            "nystrom: saved holds 0 rows of q, should hold 6: it is not of a forward pass of these inputs");
}

TEST(Errors, SavedOfHeadsWithOtherLandmarks) {
  std::vector<double> x(2 * 3 * 12 * 4, 0.5), out(x), dq(x), dk(x), dv(x);
  const auto view = [](auto& data) { return attn::head_major(data.data(), 2, 3, 12, 4); };
  const auto then = attn::make_approximator<double>("nystrom", {.num_landmarks = 8}),
             now = attn::make_approximator<double>("nystrom", {.num_landmarks = 4});
  std::vector<attn::AnyApproximator<double>::Saved> saved;
  Context context;
  attn::multi_head(then, view(x), view(x), view(x), view(out), {}, context, saved);
  const auto backward = [&](const auto& method) {
    return error_of([&] {
      attn::multi_head_backward(method, view(x), view(x), view(x), view(out), view(out), {}, saved,
                                {view(dq), view(dk), view(dv)}, context);
    });
  };
  EXPECT_EQ(backward(now),
            "nystrom: saved holds 8 landmarks, should hold 4: it is not of a forward pass of these inputs");
  EXPECT_EQ(backward(then), "no error");
}

TEST(Errors, WhatAnotherMethodSaved) {
  attn::AnyApproximator<float>::Saved saved;
  const auto softmax = attn::make_approximator<float>("softmax"), nystrom = attn::make_approximator<float>("nystrom");
  EXPECT_EQ(backward_error_of(softmax, {}, saved), "softmax: saved is not of a forward pass of this method");
  saved = saved_of(nystrom, {6, 6, 4, 3});
  EXPECT_EQ(backward_error_of(softmax, {}, saved), "softmax: saved is not of a forward pass of this method");
  EXPECT_EQ(backward_error_of(nystrom, {}, saved), "no error");
  const auto skyformer = attn::make_approximator<float>("skyformer"),
             lifted = attn::make_approximator<float>("lifted-softmax");
  saved = saved_of(lifted, {6, 6, 4, 3});
  EXPECT_EQ(backward_error_of(skyformer, {}, saved), "skyformer: saved is not of a forward pass of this method");
  saved = saved_of(skyformer, {6, 6, 4, 3});
  EXPECT_EQ(backward_error_of(lifted, {}, saved), "lifted-softmax: saved is not of a forward pass of this method");
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
  const auto softmax = [](double scale) {
    return error_of(attn::SoftmaxAttention<float>(SoftmaxKernel{.scale = scale}), Call{});
  };
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

/// A kernel of a user's with any parameters.
struct AnyKernel {
  double scale_, bias_;
  double scale(Index) const { return scale_; }
  double bias(Index) const { return bias_; }
  Rows rows() const { return Rows::raw; }
};

/// What every entry point says of a kernel for matrices of T, without its own name.
template <class T, class Kernel>
std::vector<std::string> kernel_errors_of(const Kernel& kernel) {
  const Matrix<T> x = Matrix<T>::Constant(6, 4, static_cast<T>(0.5F));
  Matrix<T> out(6, 4);
  Context context;
  const Inputs<T> in{x, x, x};
  using Landmarks = attn::Nystrom<T, attn::SegmentMeans, attn::IterativePinv, Kernel>;
  std::vector<std::string> errors{error_of([&] { attn::kernel_matmul(kernel, in, out, context); }),
                                  error_of([&] { attn::ExactAttention<T, Kernel>{kernel}.forward(in, out, context); }),
                                  error_of([&] {
                                    Landmarks{{2}, {}, kernel}.forward(in, out, context);
                                  })};
  if constexpr (std::is_same_v<Kernel, SoftmaxKernel>) {
    errors.push_back(error_of([&] { attn::ShiftedNystrom<T>{{2}, {}, kernel}.forward(in, out, context); }));
    errors.push_back(error_of([&] { attn::LiftedSoftmax<T>{{2}, {.gamma = 1e-3}, kernel}.forward(in, out, context); }));
  }
  if constexpr (std::is_same_v<Kernel, GaussianKernel>) {
    errors.push_back(error_of([&] { attn::Skyformer<T>{{2}, {}, kernel}.forward(in, out, context); }));
  }
  if constexpr (sizeof(T) > 2) {
    errors.push_back(error_of([&] { attn::ExactOperator<T, Kernel>(kernel, x, x, {}, context); }));
    Matrix<T> dq(6, 4), dk(6, 4), dv(6, 4);
    const std::vector<T> lse(6);
    errors.push_back(error_of([&] { attn::kernel_matmul_backward(kernel, in, out, lse, x, {dq, dk, dv}, context); }));
  }
  for (std::string& error : errors) error.erase(0, error.find(": ") == std::string::npos ? 0 : error.find(": ") + 2);
  return errors;
}

template <class T, class Kernel>
void expect_all(const Kernel& kernel, const std::string& text) {
  for (const std::string& error : kernel_errors_of<T>(kernel)) EXPECT_EQ(error, text);
}

TEST(Errors, KernelParametersThatTheComputingTypeDoesNotHold) {
  const std::string in_float = " for arithmetic in float", small = "should be at least 6.5113e-20" + in_float;
  const std::string large = "should be at most 2.35866e+38 in magnitude" + in_float;
  expect_all<float>(GaussianKernel{.bandwidth = 1e-20}, "bandwidth is 1e-20, " + small);
  expect_all<float>(GaussianKernel{.bandwidth = 1e-200, .rows = Rows::normalized}, "bandwidth is 1e-200, " + small);
  expect_all<float>(SoftmaxKernel{.scale = 1e300}, "scale is 1e+300, " + large);
  expect_all<float>(AnyKernel{1e39, 0}, "scale is 1e+39, " + large);
  expect_all<float>(AnyKernel{-1e39, 0}, "scale is -1e+39, " + large);
  expect_all<float>(AnyKernel{1, 3e38}, "bias is 3e+38, " + large);  // times log2 e
  expect_all<float>(AnyKernel{1, test::kNaN<double>}, "bias is nan, should be finite");
  expect_all<Eigen::half>(GaussianKernel{.bandwidth = 1e-20}, "bandwidth is 1e-20, " + small);
  expect_all<Eigen::bfloat16>(SoftmaxKernel{.scale = 1e300}, "scale is 1e+300, " + large);
  expect_all<Eigen::half>(AnyKernel{1, 1e300}, "bias is 1e+300, " + large);

  expect_all<double>(GaussianKernel{.bandwidth = 1e-20}, "no error");
  expect_all<double>(SoftmaxKernel{.scale = 1e150}, "no error");
  expect_all<double>(AnyKernel{1e39, 1e39}, "no error");
  expect_all<Eigen::half>(AnyKernel{1, 1e6},
                          "no error");  // more than half holds, but not more than its arithmetic does
  expect_all<double>(GaussianKernel{.bandwidth = 1e-160},
                     "bandwidth is 1e-160, should be at least 8.95838e-155 for arithmetic in double");
  expect_all<double>(AnyKernel{1.5e308, 0},
                     "scale is 1.5e+308, should be at most 1.24607e+308 in magnitude for arithmetic in double");
}

TEST(Errors, TheSquareOfAScaleInSpectralShifting) {
  const auto error = [](attn::ShiftMode mode) {
    return error_of(attn::ShiftedNystrom<float>({.num_landmarks = 2}, {.mode = mode}, {.scale = 1e20}),
                    {.q = {6, 4}, .out = {6, 3}});
  };
  EXPECT_EQ(error(attn::ShiftMode::row),
            "shifted-nystrom: scale is 1e+20, should be at most 2.17194e+19 in magnitude for arithmetic in float");
  EXPECT_EQ(error(attn::ShiftMode::scalar), "no error");
}

/// A core of a user's, whose check knows no types.
struct OwnCore : attn::IterativePinv {
  void check(std::string_view who) const { attn::IterativePinv::check(who); }
};

TEST(Errors, GammaThatTheComputingTypeDoesNotHold) {
  using attn::PreconditionedPinv, attn::RidgeInverse, attn::Skyformer, attn::UniformSample;
  const auto error = []<class T>(T, const auto& core) {
    const Matrix<T> x = Matrix<T>::Ones(6, 4);
    Matrix<T> out(6, 4);
    Context context;
    return error_of([&] {
      Skyformer<T, UniformSample, std::decay_t<decltype(core)>>{{2}, core}.forward({x, x, x}, out, context);
    });
  };
  const std::string text =
      "skyformer: gamma is 1e+39, should be at most 1.01412e+31 in magnitude for arithmetic in float";
  EXPECT_EQ(error(float{}, PreconditionedPinv{.gamma = 1e39}), text);
  EXPECT_EQ(error(float{}, RidgeInverse{.gamma = 1e39}), text);
  EXPECT_EQ(error(Eigen::bfloat16{}, RidgeInverse{.gamma = 1e39}), text);
  EXPECT_EQ(error(double{}, RidgeInverse{.gamma = 1e39}), "no error");
  EXPECT_EQ(error(double{}, PreconditionedPinv{.gamma = 1e39}), "no error");
  EXPECT_EQ(error(float{}, RidgeInverse{.gamma = 1e31}), "no error");
  EXPECT_EQ(error(float{}, RidgeInverse{.gamma = test::kInf<double>}), "skyformer: gamma is inf, should be finite");
  EXPECT_EQ(error(float{}, OwnCore{}), "no error");
  EXPECT_EQ(error(float{}, OwnCore{{.iterations = 0}}), "skyformer: iterations is 0, should be at least 1");
  EXPECT_EQ(error_of(attn::LiftedSoftmax<float>({}, RidgeInverse{.gamma = 1e39}), Call{}),
            "lifted-softmax" + text.substr(9));
}

TEST(Errors, LengthOfLse) {
  const Matrix<float> q = Matrix<float>::Zero(6, 4), v = Matrix<float>::Zero(6, 3);
  Matrix<float> out(6, 3);
  std::vector<float> lse(5);
  Context context;
  EXPECT_EQ(error_of([&] {
              attn::kernel_matmul(SoftmaxKernel{}, Inputs<float>{.q = q, .k = q, .v = v}, out, std::span<float>(lse),
                                  context);
            }),
            "kernel_matmul: lse has 5 entries, q has 6 rows");
}

TEST(Errors, RowStates) {
  const Matrix<float> q = Matrix<float>::Zero(6, 4), v = Matrix<float>::Zero(6, 3);
  Matrix<float> weighted(6, 3), narrow(6, 2);
  std::vector<float> maximum(6), sum(6), few(5);
  Context context;
  const auto partial = [&](const attn::RowStates<float>& states) {
    return error_of(
        [&] { attn::kernel_matmul_partial(SoftmaxKernel{}, Inputs<float>{.q = q, .k = q, .v = v}, states, context); });
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
  EXPECT_EQ(error_of(Skyformer<float>({}, RidgeInverse{.gamma = -1}), Call{}),
            "skyformer: gamma is -1, should be at least 0");
  EXPECT_EQ(error_of(Skyformer<float>({}, RidgeInverse{.gamma = nan}), Call{}),
            "skyformer: gamma is nan, should be at least 0");
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
    EXPECT_EQ(error_of(attn::Skyformer<float>{}, {.mask = {.causal = causal}}),
              "skyformer: causal masks are not supported");
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
