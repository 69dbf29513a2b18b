#include <attn/attn.hpp>
#include <attn/multipole.hpp>

#include "mean_pooling.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <string>
#include <type_traits>

namespace {

using attn::Approximator;
using attn::Causal;
using test::Context;
using test::Family;
using test::Index;
using test::Inputs;
using test::Matrix;

// Here rather than beside each method, where every program would compile them: a twentieth of what Eigen's header
// takes.
template <class T>
constexpr bool kEveryMethodIsOne =
    Approximator<attn::SoftmaxAttention<T>> && Approximator<attn::GaussianAttention<T>> &&
    Approximator<attn::Multipole<T>> && Approximator<attn::Multipole<T, attn::GaussianKernel>> &&
    Approximator<attn::Nystrom<T>> && Approximator<attn::ShiftedNystrom<T>> && Approximator<attn::Skyformer<T>> &&
    Approximator<attn::LiftedSoftmax<T>> && Approximator<attn::Automatic<T>> &&
    Approximator<attn::Automatic<T, attn::GaussianKernel>> && Approximator<attn::AnyApproximator<T>>;
static_assert(kEveryMethodIsOne<float> && kEveryMethodIsOne<double>);
static_assert(kEveryMethodIsOne<Eigen::half> && kEveryMethodIsOne<Eigen::bfloat16>);
static_assert(Approximator<attn::Skyformer<float, attn::StridedSample, attn::PreconditionedPinv>>);
template <class T>
constexpr bool kEveryPartIsOne =
    attn::Core<attn::RidgeInverse, T> && attn::Core<attn::IterativePinv, T> &&
    attn::Core<attn::PreconditionedPinv, T> && attn::JointLandmarks<attn::UniformSample, T> &&
    attn::JointLandmarks<attn::StridedSample, T> && attn::SplitLandmarks<attn::SegmentMeans, T>;
static_assert(kEveryPartIsOne<float> && kEveryPartIsOne<double>);
static_assert(!Approximator<int> && !Approximator<attn::SoftmaxKernel>);
static_assert(std::is_trivially_copyable_v<attn::SoftmaxAttention<float>>);

static_assert(Approximator<MeanPooling<float>>);

// A user's approximator that lacks one thing each.
struct WithoutName : MeanPooling<double> {
 private:
  static constexpr int kName = 0;
};
static_assert(!Approximator<WithoutName>);

struct WithoutSaved : MeanPooling<double> {
 private:
  struct Saved {};
};
static_assert(!Approximator<WithoutSaved>);

struct WithoutTraining : MeanPooling<double> {
  void forward(const Inputs<double>&, attn::MatrixRef<double>, Context&) const {}
};
static_assert(!Approximator<WithoutTraining>);

struct WithoutBackward : MeanPooling<double> {
 private:
  static void backward() {}
};
static_assert(!Approximator<WithoutBackward>);

TEST(Attention, IsForwardInOneLine) {
  const auto x = test::make_tokens<double>(Family::unit, {30, 40, 16, 12});
  const attn::Mask mask{.causal = Causal::lower_right};
  Matrix<double> expected(30, 12);
  Context context;
  attn::SoftmaxAttention<double>{}.forward({.q = x.q, .k = x.k, .v = x.v, .mask = mask}, expected, context);
  EXPECT_TRUE(test::bitwise_equal(attn::attention(attn::SoftmaxAttention<double>{}, x.q, x.k, x.v, mask), expected));
}

TEST(Attention, TakesBlocksOfAMatrix) {
  const Matrix<double> qkv = test::Random(1).normal(50, 48);
  const Matrix<double> q = qkv.leftCols(16), k = qkv.middleCols(16, 16), v = qkv.rightCols(16);
  const attn::SoftmaxAttention<double> method;
  EXPECT_TRUE(test::bitwise_equal(attn::attention(method, qkv.leftCols(16), qkv.middleCols(16, 16), qkv.rightCols(16)),
                                  attn::attention(method, q, k, v)));
}

TEST(Attention, TakesAnApproximatorOfOnesOwn) {
  const auto x = test::make_tokens<double>(Family::unit, {3, 40, 16, 12});
  EXPECT_LE((attn::attention(MeanPooling<double>{}, x.q, x.k, x.v).row(2) - x.v.colwise().mean()).norm(), 1e-15);
}

TEST(Attention, ApproximatorsAreCopyableValues) {
  const auto x = test::make_tokens<float>(Family::unit, {30, 40, 16, 12});
  const attn::Skyformer<float> method(attn::UniformSample{.num_landmarks = 16});
  const auto copy = method;
  EXPECT_TRUE(test::bitwise_equal(attn::attention(method, x.q, x.k, x.v), attn::attention(copy, x.q, x.k, x.v)));
}

}  // namespace
