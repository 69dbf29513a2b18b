/// half and bfloat16 in memory: against float and the double oracle on the same, already rounded inputs. Where results
/// are compared bit by bit with those of float, products are of float, see bfloat16_units_test.cpp.
#include <attn/attn.hpp>

#include "common/methods.hpp"
#include "common/rounding.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using test::Context;
using test::Family;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;

template <class T>
class Narrow : public ::testing::Test {
 protected:
  /// Of results that are rounded once.
  static constexpr double kTolerance = std::is_same_v<T, Eigen::half> ? 2e-3 : 1.6e-2;

  /// Tokens of T, and the same in float.
  struct Pair {
    explicit Pair(const test::Shape& shape, std::uint64_t seed) {
      const auto x = test::make_tokens<float>(Family::smooth, shape, seed);
      narrow = {x.q.template cast<T>(), x.k.template cast<T>(), x.v.template cast<T>()};
      wide = {narrow.q.template cast<float>(), narrow.k.template cast<float>(), narrow.v.template cast<float>()};
    }
    Inputs<T> inputs(const Mask& mask) const { return {.q = narrow.q, .k = narrow.k, .v = narrow.v, .mask = mask}; }
    Inputs<float> wide_inputs(const Mask& mask) const { return {.q = wide.q, .k = wide.k, .v = wide.v, .mask = mask}; }

    test::Tokens<T> narrow;
    test::Tokens<float> wide;
  };

  /// |a - b| / |b| of a result in T.
  static double error(const Matrix<T>& a, const Matrix<float>& b) {
    return test::relative_error<float>(a.template cast<float>(), b.template cast<double>());
  }
};

TYPED_TEST_SUITE(Narrow, test::NarrowScalars);

TYPED_TEST(Narrow, SoftmaxFollowsTheOracle) {
  for (const auto causal : {attn::Causal::none, attn::Causal::lower_right}) {
    const typename TestFixture::Pair x({70, 93, 33, 17}, 1);
    const Mask mask{.causal = causal};
    const Matrix<TypeParam> out =
        attn::attention(attn::SoftmaxAttention<TypeParam>{}, x.narrow.q, x.narrow.k, x.narrow.v, mask);
    const reference::Problem problem{x.wide.q.template cast<double>(), x.wide.k.template cast<double>(),
                                     x.wide.v.template cast<double>(), mask};
    const auto expected = reference::attend(reference::softmax_kernel(33), problem);
    EXPECT_LE(test::relative_error<float>(out.template cast<float>(), expected.out), TestFixture::kTolerance);
  }
}

TYPED_TEST(Narrow, EveryMethodIsThatOfFloatRoundedOnce) {
  const auto keep = test::random_keep(120, 0.8, 2);
  const typename TestFixture::Pair x({120, 120, 24, 10}, 3);
  for (const auto& entry : attn::methods<TypeParam>()) {
    const auto method = entry.make(test::of_size(20, {.products = attn::Products::float32}));
    const auto wide = attn::find_method<float>(entry.name).make(test::of_size(20));
    for (const Mask& mask : {Mask{}, Mask{.keep_key = keep, .keep_query = keep}}) {
      Context context;
      Matrix<TypeParam> out(120, 10);
      Matrix<float> expected(120, 10);
      ASSERT_TRUE(method.supports(x.inputs(mask))) << entry.name;
      method.forward(x.inputs(mask), out, context);
      wide.forward(x.wide_inputs(mask), expected, context);
      const bool by_float = entry.name != "automatic" || std::is_same_v<TypeParam, Eigen::half>;  // has no Products
      if (by_float) {
        EXPECT_TRUE(out == expected.template cast<TypeParam>()) << entry.name;
      }
    }
    const Mask causal{.causal = attn::Causal::upper_left};
    EXPECT_EQ(method.supports(x.inputs(causal)), wide.supports(x.wide_inputs(causal))) << entry.name;
  }
}

/// Neither number, or the same.
bool same(float a, float b) {
  return a == b || (std::isnan(a) && std::isnan(b));
}

TYPED_TEST(Narrow, EveryNumberConvertsAsEigenConvertsIt) {
  std::vector<TypeParam> narrow(65536 + 3), back(narrow.size());
  for (std::size_t i = 0; i < narrow.size(); ++i) {
    narrow[i] = Eigen::numext::bit_cast<TypeParam>(static_cast<std::uint16_t>(i));
  }
  std::vector<float> wide(narrow.size());
  attn::detail::convert_row(narrow.data(), wide.data(), static_cast<Index>(wide.size()));
  attn::detail::convert_row(wide.data(), back.data(), static_cast<Index>(wide.size()));
  for (std::size_t i = 0; i < narrow.size(); ++i) {
    ASSERT_TRUE(same(wide[i], static_cast<float>(narrow[i]))) << i;
    ASSERT_TRUE(same(static_cast<float>(back[i]), wide[i])) << i;
  }
}

TYPED_TEST(Narrow, RoundsToNearest) {
  std::vector<float> wide;
  for (std::uint32_t upper = 0; upper < 65536; ++upper) {
    // Amid two neighbours of either type, where the even one is the nearest, and just beside.
    for (const std::uint32_t lower : {0x0fffu, 0x1000u, 0x1001u, 0x3000u, 0x7fffu, 0x8000u, 0x8001u}) {
      wide.push_back(Eigen::numext::bit_cast<float>(upper << 16 | lower));
    }
  }
  std::vector<TypeParam> narrow(wide.size());
  attn::detail::convert_row(wide.data(), narrow.data(), static_cast<Index>(wide.size()));
  for (std::size_t i = 0; i < wide.size(); ++i) {
    if (std::abs(wide[i]) < std::numeric_limits<float>::min()) continue;  // Eigen makes some of them 0
    ASSERT_TRUE(same(static_cast<float>(narrow[i]), static_cast<float>(static_cast<TypeParam>(wide[i])))) << wide[i];
  }
}

/// Choices of landmarks that read matrices alone, as one's own may.
struct FirstRows {
  Index num_landmarks = 20;

  template <class T, class Keeps>
  attn::MatrixRef<T> select(const attn::ConstMatrixRef<T>& x, const Keeps&, attn::Scratch& scratch) const {
    attn::MatrixRef<T> land = scratch.matrix<T>(num_landmarks, x.cols());
    land = x.topRows(num_landmarks);
    return land;
  }

  template <class T>
  attn::MatrixRef<T> select(const Inputs<T>& in, attn::Scratch& scratch) const {
    return select<T>(in.k, 0, scratch);
  }
};

TYPED_TEST(Narrow, LandmarksOfOnesOwnReadFloats) {
  const typename TestFixture::Pair x({120, 120, 24, 10}, 3);
  Context context;
  Matrix<TypeParam> out(120, 10);
  Matrix<float> expected(120, 10);
  attn::Nystrom<TypeParam, FirstRows>{}.forward(x.inputs({}), out, context);
  attn::Nystrom<float, FirstRows>{}.forward(x.wide_inputs({}), expected, context);
  EXPECT_TRUE(out == expected.template cast<TypeParam>());
  attn::Skyformer<TypeParam, FirstRows>{}.forward(x.inputs({}), out, context);
  attn::Skyformer<float, FirstRows>{}.forward(x.wide_inputs({}), expected, context);
  EXPECT_TRUE(out == expected.template cast<TypeParam>());
}

/// Many queries and many keys, few of the one or of the other: each has a path of its own; and every mode of the shift.
TYPED_TEST(Narrow, EveryPathIsThatOfFloatRoundedOnce) {
  Context context;
  for (const auto& [n_q, n_k] : {std::pair<Index, Index>{900, 40}, {5, 3000}, {700, 700}}) {
    const typename TestFixture::Pair x({n_q, n_k, 24, 10}, 10);
    const auto keep = test::random_keep(n_k, 0.8, 11);
    for (const Mask& mask : {Mask{}, Mask{.keep_key = keep}, Mask{.causal = attn::Causal::lower_right}}) {
      for (const auto rows : {attn::Rows::raw, attn::Rows::normalized}) {
        Matrix<TypeParam> out(n_q, 10);
        Matrix<float> expected(n_q, 10);
        const attn::GaussianKernel kernel{.rows = rows};
        const attn::GaussianAttention<TypeParam> method{attn::Products::float32, kernel};
        method.forward(x.inputs(mask), out, context);
        attn::GaussianAttention<float>{kernel}.forward(x.wide_inputs(mask), expected, context);
        EXPECT_TRUE(out == expected.template cast<TypeParam>()) << n_q << " " << n_k;
      }
    }
  }
  const typename TestFixture::Pair x({300, 300, 24, 10}, 12);
  for (const auto mode : {attn::ShiftMode::paper, attn::ShiftMode::scalar, attn::ShiftMode::row}) {
    Matrix<TypeParam> out(300, 10);
    Matrix<float> expected(300, 10);
    attn::ShiftedNystrom<TypeParam>{{.num_landmarks = 20}, {.mode = mode}}.forward(x.inputs({}), out, context);
    attn::ShiftedNystrom<float>{{.num_landmarks = 20}, {.mode = mode}}.forward(x.wide_inputs({}), expected, context);
    EXPECT_TRUE(out == expected.template cast<TypeParam>()) << static_cast<int>(mode);
  }
}

TYPED_TEST(Narrow, GradientsFollowThoseOfFloat) {
  const auto keep = test::random_keep(90, 0.8, 4);
  const typename TestFixture::Pair x({90, 90, 16, 8}, 5), seed({90, 90, 16, 8}, 6);
  const Mask mask{.keep_key = keep, .keep_query = keep};
  for (const auto& entry : attn::methods<TypeParam>()) {
    if (entry.name == "lifted-softmax") continue;  // its gradients are large where they cancel
    const auto method = entry.make(test::of_size(15));
    const auto wide = attn::find_method<float>(entry.name).make(test::of_size(15));
    Context context;
    Matrix<TypeParam> out(90, 8), dq(90, 16), dk(90, 16), dv(90, 8);
    Matrix<float> wide_out(90, 8), wide_dq(90, 16), wide_dk(90, 16), wide_dv(90, 8);
    typename attn::AnyApproximator<TypeParam>::Saved saved;
    attn::AnyApproximator<float>::Saved wide_saved;
    method.forward(x.inputs(mask), out, context, saved);
    method.backward(x.inputs(mask), out, seed.narrow.v, saved, {dq, dk, dv}, context);
    wide.forward(x.wide_inputs(mask), wide_out, context, wide_saved);
    wide.backward(x.wide_inputs(mask), wide_out, seed.wide.v, wide_saved, {wide_dq, wide_dk, wide_dv}, context);
    const double tolerance = 10 * TestFixture::kTolerance;  // out, which slopes are measured from, is rounded too
    EXPECT_LE(this->error(dq, wide_dq), tolerance) << entry.name;
    EXPECT_LE(this->error(dk, wide_dk), tolerance) << entry.name;
    EXPECT_LE(this->error(dv, wide_dv), tolerance) << entry.name;
  }
}

TYPED_TEST(Narrow, ThePrimitiveKeepsItsLogSumsInFloat) {
  const typename TestFixture::Pair x({40, 50, 8, 4}, 7);
  const attn::GaussianKernel kernel{.rows = attn::Rows::normalized};
  Context context;
  Matrix<TypeParam> out(40, 4);
  Matrix<float> expected(40, 4);
  std::vector<float> lse(40), expected_lse(40);
  attn::kernel_matmul(kernel, x.inputs({}), out, lse, context);
  attn::kernel_matmul(kernel, x.wide_inputs({}), expected, expected_lse, context);
  EXPECT_TRUE(out == expected.template cast<TypeParam>());
  EXPECT_EQ(lse, expected_lse);
  attn::kernel_matmul(kernel, x.inputs({}), out, context);
  EXPECT_TRUE(out == expected.template cast<TypeParam>());
}

/// Row states of float, for the keys [first, last) of an input.
struct States {
  template <class T, class Kernel>
  States(const Kernel& kernel, const Inputs<T>& in, Index first, Index last, Context& context)
      : maximum(static_cast<std::size_t>(in.q.rows())), sum(maximum.size()), weighted(in.q.rows(), in.v.cols()) {
    const auto from = static_cast<std::size_t>(first), count = static_cast<std::size_t>(last - first);
    const Inputs<T> some{.q = in.q,
                         .k = in.k.middleRows(first, last - first),
                         .v = in.v.middleRows(first, last - first),
                         .key_bias = in.key_bias.subspan(from, count)};
    attn::kernel_matmul_partial(kernel, some, {maximum, sum, weighted}, context);
  }
  attn::RowStates<float> ref() { return {maximum, sum, weighted}; }

  std::vector<float> maximum, sum;
  Matrix<float> weighted;
};

TYPED_TEST(Narrow, StatesOfPartsMergeInFloatAndAreRoundedOnce) {
  using T = TypeParam;
  const typename TestFixture::Pair x({31, 700, 16, 300}, 21);
  const auto bias = test::random_key_bias<float>(700, 0.1, 22);
  std::vector<T> narrow_bias(700);
  std::transform(bias.begin(), bias.end(), narrow_bias.begin(), [](float b) { return static_cast<T>(b); });
  Inputs<T> in = x.inputs({});
  in.key_bias = narrow_bias;
  Context context;
  for (const auto rows : {attn::Rows::raw, attn::Rows::normalized}) {
    const attn::GaussianKernel kernel{.rows = rows};
    States all(kernel, in, 0, 300, context), more(kernel, in, 300, 700, context);
    merge(all.ref(), more.ref());
    const auto expected =
        reference::attend(reference::gaussian_kernel(16, {}, rows == attn::Rows::normalized), test::to_reference(in));
    Matrix<T> out(31, 300), wider = Matrix<T>::Zero(31, 302);
    std::vector<float> lse(31);
    finish(kernel, all.ref(), 16, out, lse);
    EXPECT_LE(test::share_beyond_one_rounding<T>(out, expected.out), test::kShareOfHardCases);
    for (Index i = 0; i < 31; ++i) EXPECT_NEAR(lse[static_cast<std::size_t>(i)], expected.lse[i], 1e-5);
    finish(kernel, all.ref(), 16, wider.leftCols(300));
    EXPECT_TRUE(wider.leftCols(300) == out);
    EXPECT_TRUE((wider.rightCols(2).array() == T(0)).all());
    EXPECT_EQ(test::error_of([&] { finish(kernel, all.ref(), 16, wider); }),
              "finish: weighted is 31 x 300, should be 31 x 302");
  }
}

TYPED_TEST(Narrow, ThePrimitivesGradientsAreRoundedOnce) {
  using T = TypeParam;
  const typename TestFixture::Pair x({60, 90, 16, 8}, 23), seed({60, 60, 16, 8}, 24);
  const auto keep = test::random_keep(90, 0.8, 26);
  const std::vector<T> bias(90, T(0.5F));
  Inputs<T> in = x.inputs({.keep_key = keep});
  in.key_bias = bias;
  Context context;
  Matrix<T> out(60, 8), dq(60, 16), dk(90, 16), dv(90, 8);
  std::vector<float> lse(60), dbias(90);
  std::vector<T> narrow_dbias(90);
  const auto problem = test::to_reference(in);
  const reference::Matrix dout = seed.narrow.v.template cast<double>();
  const attn::GaussianKernel raw;  // whose gradients do not depend on out, which is rounded
  attn::kernel_matmul(raw, in, out, context);
  attn::kernel_matmul_backward(raw, in, out, {}, seed.narrow.v, {dq, dk, dv}, context, dbias);
  const auto of_raw = reference::attend_backward(reference::gaussian_kernel(16), problem, dout);
  EXPECT_LE(test::share_beyond_one_rounding<T>(dq, of_raw.dq), 2 * test::kShareOfHardCases);
  EXPECT_LE(test::share_beyond_one_rounding<T>(dk, of_raw.dk), 2 * test::kShareOfHardCases);
  EXPECT_LE(test::share_beyond_one_rounding<T>(dv, of_raw.dv), 2 * test::kShareOfHardCases);
  for (std::size_t j = 0; j < 90; ++j) EXPECT_NEAR(dbias[j], of_raw.dbias[static_cast<Index>(j)], 1e-4);
  attn::kernel_matmul_backward(raw, in, out, {}, seed.narrow.v, {dq, dk, dv}, context, narrow_dbias);
  for (std::size_t j = 0; j < 90; ++j) EXPECT_EQ(narrow_dbias[j], static_cast<T>(dbias[j]));
  const attn::SoftmaxKernel softmax;
  attn::kernel_matmul(softmax, in, out, lse, context);
  attn::kernel_matmul_backward(softmax, in, out, lse, seed.narrow.v, {.dq = dq, .dk = dk, .dv = dv}, context);
  const auto of_softmax = reference::attend_backward(reference::softmax_kernel(16), problem, dout);
  EXPECT_LE(test::share_beyond_one_rounding<T>(dv, of_softmax.dv), 2 * test::kShareOfHardCases);
  EXPECT_LE(test::relative_error(dq, of_softmax.dq), 10 * TestFixture::kTolerance);
  EXPECT_LE(test::relative_error(dk, of_softmax.dk), 10 * TestFixture::kTolerance);
  EXPECT_EQ(test::error_of([&] {
              attn::kernel_matmul_backward(softmax, in, out, {}, seed.narrow.v, {dq, dk, dv}, context);
            }),
            "kernel_matmul_backward: lse is empty, should have 60 entries, for rows are normalized");
}

TYPED_TEST(Narrow, SkyformersGradientByTheKeyBiasIsThatOfFloat) {
  using T = TypeParam;
  const typename TestFixture::Pair x({60, 60, 16, 8}, 27), seed({60, 60, 16, 8}, 28);
  const std::vector<T> bias(60, T(0.5F));
  const std::vector<float> wide_bias(60, 0.5F);
  std::vector<float> dbias(60), wide_dbias(60);
  std::vector<T> narrow_dbias(60);
  Inputs<T> in = x.inputs({});
  in.key_bias = bias;
  Inputs<float> wide_in = x.wide_inputs({});
  wide_in.key_bias = wide_bias;
  const attn::Skyformer<T> method(attn::UniformSample{.num_landmarks = 12});
  const attn::Skyformer<float> wide(attn::UniformSample{.num_landmarks = 12});
  Context context;
  Matrix<T> out(60, 8), dq(60, 16), dk(60, 16), dv(60, 8);
  Matrix<float> wide_dq(60, 16), wide_dk(60, 16), wide_dv(60, 8);
  typename attn::Skyformer<T>::Saved saved;
  method.forward(in, out, context, saved);
  const Matrix<float> wide_out = out.template cast<float>();
  method.backward(in, out, seed.narrow.v, saved, {dq, dk, dv}, dbias, context);
  wide.backward(wide_in, wide_out, seed.wide.v, saved, {wide_dq, wide_dk, wide_dv}, wide_dbias, context);
  EXPECT_EQ(dbias, wide_dbias);
  EXPECT_TRUE(dk == wide_dk.template cast<T>());
  method.backward(in, out, seed.narrow.v, saved, {dq, dk, dv}, narrow_dbias, context);
  for (std::size_t j = 0; j < 60; ++j) EXPECT_EQ(narrow_dbias[j], static_cast<T>(dbias[j]));
}

/// Elements at any address that is even, rows any number of them apart.
TYPED_TEST(Narrow, TakesViewsAtAnyElement) {
  using T = TypeParam;
  const typename TestFixture::Pair x({50, 70, 16, 8}, 32);
  const auto unaligned = [](const Matrix<T>& m, std::vector<T>& memory) {
    memory.assign(static_cast<std::size_t>(m.rows() * (m.cols() + 1) + 1), T(7));
    attn::MatrixRef<T> view(memory.data() + 1, m.rows(), m.cols(), m.cols() + 1);
    view = m;
    return view;
  };
  std::vector<T> q_memory, k_memory, v_memory, out_memory;
  const Matrix<T> zero = Matrix<T>::Zero(50, 8);
  const attn::MatrixRef<T> q = unaligned(x.narrow.q, q_memory), k = unaligned(x.narrow.k, k_memory),
                           v = unaligned(x.narrow.v, v_memory), out = unaligned(zero, out_memory);
  const auto keep = test::random_keep(70, 0.8, 33);
  Context context;
  for (const auto& entry : attn::methods<T>()) {
    if (entry.name == "shifted-nystrom") continue;  // which needs as many queries as keys
    for (const Mask& mask : {Mask{}, Mask{.keep_key = keep}}) {
      const auto method = entry.make(test::of_size(12));
      method.forward({.q = q, .k = k, .v = v, .mask = mask}, out, context);
      EXPECT_TRUE(out == attn::attention(method, x.narrow.q, x.narrow.k, x.narrow.v, mask)) << entry.name;
      for (Index i = 0; i < 50; ++i) EXPECT_EQ(out.data()[i * 9 + 8], T(7)) << entry.name;
    }
  }
  EXPECT_EQ(attn::detail::TokenRows<float>(attn::ConstMatrixRef<T>(q)).row_or_null(1), nullptr);  // no float lies there
}

/// Asked of inputs with and without a bias, whose values are not read.
TYPED_TEST(Narrow, SupportsWhatTheSameMethodOfFloatSupports) {
  using T = TypeParam;
  const typename TestFixture::Pair x({12, 12, 4, 4}, 30);
  const std::vector<T> bias(12, T(0.5F));
  const std::vector<float> wide_bias(12, 0.5F);
  const auto keep = test::random_keep(12, 0.5, 31);
  for (const auto& entry : attn::methods<T>()) {
    const auto method = entry.make({});
    const auto wide = attn::make_approximator<float>(entry.name, {});
    for (const Mask& mask : {Mask{}, Mask{.causal = attn::Causal::upper_left}, Mask{.keep_key = keep}}) {
      Inputs<T> in = x.inputs(mask);
      Inputs<float> wide_in = x.wide_inputs(mask);
      EXPECT_EQ(method.supports(in), wide.supports(wide_in)) << entry.name;
      in.key_bias = bias;
      wide_in.key_bias = wide_bias;
      EXPECT_EQ(method.supports(in), wide.supports(wide_in)) << entry.name;
    }
  }
}

/// In the forward pass bit by bit; in the backward pass out is rounded, which slopes are measured from.
TYPED_TEST(Narrow, KeyBiasesOfEveryMethodAreThoseOfFloat) {
  const typename TestFixture::Pair x({90, 90, 16, 8}, 13), seed({90, 90, 16, 8}, 14);
  std::vector<TypeParam> bias(90);
  std::vector<float> wide_bias(90);
  for (std::size_t j = 0; j < 90; ++j) {
    bias[j] = static_cast<TypeParam>(j % 7 == 0 ? -test::kInf<float> : 0.5F * static_cast<float>(j % 5));
    wide_bias[j] = static_cast<float>(bias[j]);
  }
  Inputs<TypeParam> in = x.inputs({});
  Inputs<float> wide_in = x.wide_inputs({});
  in.key_bias = bias;
  wide_in.key_bias = wide_bias;
  for (const std::string name : {"softmax", "gaussian", "multipole", "skyformer", "lifted-softmax"}) {
    const attn::MethodOptions options{.gamma = 0.1, .products = attn::Products::float32};
    const auto method = attn::find_method<TypeParam>(name).make(test::of_size(15, options));
    const auto wide = attn::find_method<float>(name).make(test::of_size(15, options));
    Context context;
    Matrix<TypeParam> out(90, 8), dq(90, 16), dk(90, 16), dv(90, 8);
    Matrix<float> wide_out(90, 8), wide_dq(90, 16), wide_dk(90, 16), wide_dv(90, 8);
    typename attn::AnyApproximator<TypeParam>::Saved saved;
    attn::AnyApproximator<float>::Saved wide_saved;
    method.forward(in, out, context, saved);
    wide.forward(wide_in, wide_out, context, wide_saved);
    EXPECT_TRUE(out == wide_out.template cast<TypeParam>()) << name;
    method.backward(in, out, seed.narrow.v, saved, {dq, dk, dv}, context);
    wide.backward(wide_in, wide_out, seed.wide.v, wide_saved, {wide_dq, wide_dk, wide_dv}, context);
    EXPECT_LE(this->error(dv, wide_dv), 10 * TestFixture::kTolerance) << name;
    if (name == "lifted-softmax") continue;  // its gradients are large where they cancel
    EXPECT_LE(this->error(dq, wide_dq), 10 * TestFixture::kTolerance) << name;
    EXPECT_LE(this->error(dk, wide_dk), 10 * TestFixture::kTolerance) << name;
  }
}

TYPED_TEST(Narrow, BitwiseEqualWhateverTheWorkers) {
  const typename TestFixture::Pair x({700, 700, 16, 8}, 8);
  const attn::Nystrom<TypeParam> method{attn::SegmentMeans{.num_landmarks = 30}};
  Context serial;
  Matrix<TypeParam> expected(700, 8), out(700, 8);
  method.forward(x.inputs({}), expected, serial);
  for (auto& [name, context] : test::contexts()) {
    method.forward(x.inputs({}), out, context);
    EXPECT_TRUE(test::bitwise_equal(out, expected)) << name;
  }
}

/// Whatever the types of the arguments.
TYPED_TEST(Narrow, WhatIsWrittenOverlapsNothing) {
  using T = TypeParam;
  const typename TestFixture::Pair x({10, 10, 4, 4}, 34);
  std::vector<T> bias(10, T(0.5F));
  Inputs<T> in = x.inputs({});
  in.key_bias = bias;
  Matrix<T> out(10, 4), dout(10, 4), dq(10, 4), dk(10, 4), dv(10, 4);
  Matrix<float> weighted(10, 4);
  std::vector<float> maximum(10), sum(10), lse(10);
  Context context;
  const attn::GaussianKernel kernel;
  EXPECT_EQ(test::error_of([&] {
              attn::kernel_matmul_backward(kernel, in, out, {}, dout, {dq, dk, dv}, context, bias);
            }),
            "kernel_matmul_backward: dbias overlaps key_bias");
  EXPECT_EQ(test::error_of([&] {
              attn::kernel_matmul_backward(kernel, in, out, lse, dout, {dq, dk, dv}, context, lse);
            }),
            "kernel_matmul_backward: dbias overlaps lse");
  EXPECT_EQ(test::error_of([&] {
              attn::kernel_matmul_partial(kernel, in, {maximum, maximum, weighted}, context);
            }),
            "kernel_matmul: sum overlaps maximum");
  const attn::MatrixRef<T> in_place(reinterpret_cast<T*>(weighted.data()), 10, 4, 8);
  EXPECT_EQ(test::error_of([&] {
              finish(kernel, {maximum, sum, weighted}, 4, in_place);
            }),
            "finish: out overlaps weighted");
  const attn::Skyformer<T> method(attn::UniformSample{.num_landmarks = 4});
  typename attn::Skyformer<T>::Saved saved;
  method.forward(in, out, context, saved);
  EXPECT_EQ(test::error_of([&] {
              method.backward(in, out, dout, saved, {dq, dk, dv}, bias, context);
            }),
            "skyformer: dbias overlaps key_bias");
  const attn::ExactOperator<T, attn::SoftmaxKernel> op({}, x.narrow.q, x.narrow.k, {}, context);
  EXPECT_EQ(
      test::error_of([&] { op.apply(out, attn::MatrixRef<T>(const_cast<T*>(x.narrow.q.data()), 10, 4, 4), context); }),
      "exact operator: y overlaps q");
}

TYPED_TEST(Narrow, ErrorsNameTheMethod) {
  const typename TestFixture::Pair x({10, 12, 4, 4}, 9);
  Matrix<TypeParam> out(9, 4);
  Context context;
  try {
    attn::SoftmaxAttention<TypeParam>{}.forward(x.inputs({}), out, context);
    ADD_FAILURE();
  } catch (const std::invalid_argument& e) {
    EXPECT_STREQ(e.what(), "softmax: out is 9 x 4, should be 10 x 4");
  }
}

}  // namespace
