#include <attn/kernel_matmul.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using attn::Causal;
using attn::GaussianKernel;
using attn::kernel_matmul;
using attn::Rows;
using attn::RowStates;
using attn::SoftmaxKernel;
using test::Context;
using test::Family;
using test::Index;
using test::Inputs;
using test::Matrix;
using test::Padded;
using test::Tokens;

/// A kernel as a user would write it; its bias is not half its scale, as a Gaussian's is, nor 0, as softmax's is.
struct OwnKernel {
  double factor = 0.3, penalty = 0.1;
  Rows normalization = Rows::raw;

  double scale(Index d) const { return factor / std::sqrt(static_cast<double>(d)); }
  double bias(Index d) const { return penalty / std::sqrt(static_cast<double>(d)); }
  Rows rows() const { return normalization; }
};

reference::Kernel to_reference(const SoftmaxKernel& kernel, Index d) {
  return reference::softmax_kernel(d, kernel.scale);
}
reference::Kernel to_reference(const GaussianKernel& kernel, Index d) {
  return reference::gaussian_kernel(d, kernel.bandwidth, kernel.rows == Rows::normalized);
}
reference::Kernel to_reference(const OwnKernel& kernel, Index d) {
  return {kernel.scale(d), kernel.bias(d), kernel.rows() == Rows::normalized};
}

template <class T, class Kernel>
void expect_matches(const Kernel& kernel, const Inputs<T>& in, Context& context,
                    double tolerance = test::kExactTolerance<T>) {
  const reference::Kernel expected_kernel = to_reference(kernel, in.q.cols());
  const reference::Problem p = test::to_reference(in);
  const reference::Result expected = attend(expected_kernel, p);
  Padded<T> out(in.q.rows(), in.v.cols(), 3, test::kNaN<T>);
  out.view().setConstant(test::kNaN<T>);
  std::vector<T> lse(static_cast<std::size_t>(in.q.rows()), test::kNaN<T>);
  kernel_matmul(kernel, in, out.view(), std::span<T>(lse), context);
  test::expect_close(out.matrix(), expected, p, expected_kernel, tolerance);
  EXPECT_TRUE(out.padding_untouched());
  const double digits = std::max(tolerance, 100 * static_cast<double>(std::numeric_limits<T>::epsilon()));
  for (Index i = 0; i < in.q.rows(); ++i) {
    const auto actual = static_cast<double>(lse[static_cast<std::size_t>(i)]);
    if (expected.lse[i] == -test::kInf<double>) {
      ASSERT_EQ(actual, -test::kInf<double>) << "row " << i;
      for (Index c = 0; c < in.v.cols(); ++c) ASSERT_EQ(out.view()(i, c), T(0)) << "row " << i;
    } else {
      ASSERT_NEAR(actual, expected.lse[i], digits * (1 + std::abs(expected.lse[i]))) << "row " << i;
    }
  }
  Matrix<T> without_lse = Matrix<T>::Constant(in.q.rows(), in.v.cols(), test::kNaN<T>);
  kernel_matmul(kernel, in, without_lse, context);
  test::expect_close(without_lse, expected, p, expected_kernel, tolerance);
}

template <class T>
void expect_all_kernels_match(const Inputs<T>& in, Context& context) {
  SCOPED_TRACE(sizeof(T) == 4 ? "float" : "double");
  {
    SCOPED_TRACE("softmax");
    expect_matches(SoftmaxKernel{}, in, context);
  }
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    SCOPED_TRACE(rows == Rows::raw ? "raw Gaussian" : "normalized Gaussian");
    expect_matches(GaussianKernel{.rows = rows}, in, context);
  }
}

using MaskCase =
    std::tuple<Causal, double, double, double>;  // causal, kept keys, kept queries, biases: removed share or none

class Masks : public ::testing::TestWithParam<MaskCase> {
 protected:
  template <class T>
  void check(const test::Shape& shape) {
    const auto [causal, kept_keys, kept_queries, removed] = GetParam();
    SCOPED_TRACE("n_q " + std::to_string(shape.n_q) + ", n_k " + std::to_string(shape.n_k));
    const auto x = test::make_tokens<T>(Family::unit, shape, 3);
    const auto keep_key = test::random_keep(shape.n_k, kept_keys, 4),
               keep_query = test::random_keep(shape.n_q, kept_queries, 5);
    const auto bias = test::random_key_bias<T>(shape.n_k, removed, 6);
    Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
    if (kept_keys < 1) in.mask.keep_key = keep_key;
    if (kept_queries < 1) in.mask.keep_query = keep_query;
    if (removed >= 0) in.key_bias = bias;
    Context context;
    expect_all_kernels_match<T>(in, context);
  }
};

TEST_P(Masks, OnEveryShape) {
  for (const auto& [n_q, n_k] :
       {std::pair<Index, Index>{37, 150}, {150, 37}, {600, 100}, {301, 301}, {600, 1111}, {5, 3000}, {1, 1}}) {
    check<float>({n_q, n_k, 16, 9});
    check<double>({n_q, n_k, 16, 9});
  }
}

INSTANTIATE_TEST_SUITE_P(KernelMatmul, Masks,
                         ::testing::Combine(::testing::Values(Causal::none, Causal::upper_left, Causal::lower_right),
                                            ::testing::Values(1.0, 0.7), ::testing::Values(1.0, 0.8),
                                            ::testing::Values(-1.0, 0.1)));

TEST(KernelMatmul, SparseKeys) {
  const auto x = test::make_tokens<float>(Family::unit, {50, 2000, 16, 9});
  Context context;
  for (const double kept : {0.01, 0.0}) {
    const auto keep = test::random_keep(2000, kept, 7);
    for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
      expect_all_kernels_match<float>({.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal, .keep_key = keep}},
                                      context);
    }
  }
}

/// More keys than are summed up at a time, for many queries and, where keys are split besides, for few.
TEST(KernelMatmul, KeysByTheThousands) {
  for (const auto& [n_q, n_k] : {std::pair<Index, Index>{200, 9000}, {3, 140000}}) {
    SCOPED_TRACE("n_q " + std::to_string(n_q) + ", n_k " + std::to_string(n_k));
    const auto x = test::make_tokens<float>(Family::unit, {n_q, n_k, 4, 3}, 8);
    Context context;
    for (const Causal causal : {Causal::none, Causal::lower_right}) {
      expect_all_kernels_match<float>({.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}}, context);
    }
  }
}

TEST(KernelMatmul, LargeBiases) {
  auto x = test::make_tokens<float>(Family::init, {50, 600, 16, 9});
  Context context;
  for (const float offset : {-80.0F, -1000.0F, 60.0F}) {
    SCOPED_TRACE(offset);
    auto bias = test::random_key_bias<float>(600, 0.1, 8);
    for (float& a : bias) a += offset;
    const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v, .key_bias = bias};
    const double tolerance = 1e-6 + static_cast<double>(std::abs(offset) * std::numeric_limits<float>::epsilon());
    expect_matches(GaussianKernel{.rows = Rows::normalized}, in, context, tolerance);
    if (offset > -100) expect_matches(GaussianKernel{}, in, context, tolerance);
  }
}

/// A weight of exp(200 - 190): neither factor is a float.
TEST(KernelMatmul, ALargeBiasMeetsALargeDistance) {
  auto x = test::make_tokens<float>(Family::init, {50, 600, 16, 9});
  x.k.row(17).setConstant(std::sqrt(190.0F * 2 * 4 / 16));
  std::vector<float> bias(600, 0.0F);
  bias[17] = 200;
  Context context;
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    expect_matches<float>(GaussianKernel{.rows = rows}, {.q = x.q, .k = x.k, .v = x.v, .key_bias = bias}, context,
                          1e-4);
  }
}

TEST(KernelMatmul, EveryKeyRemovedByItsBias) {
  const auto x = test::make_tokens<double>(Family::unit, {7, 300, 16, 9});
  const std::vector<double> bias(300, -test::kInf<double>);
  Context context;
  expect_all_kernels_match<double>({.q = x.q, .k = x.k, .v = x.v, .key_bias = bias}, context);
}

template <class T>
class KernelMatmulOf : public ::testing::Test {};
TYPED_TEST_SUITE(KernelMatmulOf, test::Scalars);

TYPED_TEST(KernelMatmulOf, TakesAKernelOfOnesOwn) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::unit, {75, 520, 24, 10});
  const auto bias = test::random_key_bias<T>(520, 0.1, 9);
  Context context;
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    for (const OwnKernel& kernel : {OwnKernel{0.3, 0.1, rows}, OwnKernel{0.3, 0, rows}, OwnKernel{0.2, 0.4, rows},
                                    OwnKernel{-0.3, 0.1, rows}, OwnKernel{0, 0.2, rows}, OwnKernel{0, 0, rows}}) {
      SCOPED_TRACE(std::to_string(kernel.factor) + ", " + std::to_string(kernel.penalty) +
                   (rows == Rows::raw ? ", raw" : ", normalized"));
      expect_matches<T>(kernel, {.q = x.q, .k = x.k, .v = x.v, .key_bias = bias}, context);
      expect_matches<T>(kernel, {.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = Causal::lower_right}}, context);
    }
  }
}

/// Three groups of tokens, apart in every feature, in numbers that T holds exactly: distances within a group have all
/// their digits, though there is no origin that is near all.
template <class T>
Tokens<T> tokens_in_groups(const test::Shape& shape, T apart) {
  Tokens<T> x = test::make_tokens<T>(Family::init, shape, 14);
  for (Matrix<T>* tokens : {&x.q, &x.k}) {
    for (Index i = 0; i < tokens->rows(); ++i) {
      tokens->row(i) =
          ((tokens->row(i) * T(256)).array().round() / T(256) + apart * static_cast<T>(i % 3 - 1)).matrix();
    }
  }
  return x;
}

/// In tiles, in parts that are split off and all keys at once, with sums of features that end amid a packet, under
/// every mask.
TYPED_TEST(KernelMatmulOf, GaussianKeepsItsDigitsWhereGroupsAreFarApart) {
  using T = TypeParam;
  for (const auto& [n_q, n_k, d] : {std::array<Index, 3>{70, 300, 16}, {130, 30, 16}, {90, 60, 37}, {400, 80, 3}}) {
    const auto keep_key = test::random_keep(n_k, 0.7, 15), keep_query = test::random_keep(n_q, 0.8, 16);
    const auto bias = test::random_key_bias<T>(n_k, 0.1, 17);
    for (const T apart : {T(3), T(30), T(1000)}) {
      const auto x = tokens_in_groups<T>({n_q, n_k, d, 5}, apart);
      for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
        for (const unsigned bits : {0U, 1U, 2U, 3U}) {
          SCOPED_TRACE("n_q " + std::to_string(n_q) + ", n_k " + std::to_string(n_k) + ", " + std::to_string(apart) +
                       " apart, causal " + std::to_string(static_cast<int>(causal)) + ", bits " + std::to_string(bits));
          Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
          if ((bits & 1U) != 0) in.mask = {.causal = causal, .keep_key = keep_key, .keep_query = keep_query};
          if ((bits & 2U) != 0) in.key_bias = bias;
          Context context;
          for (const Rows rows : {Rows::raw, Rows::normalized})
            expect_matches(GaussianKernel{.rows = rows}, in, context);
        }
      }
    }
  }
}

TYPED_TEST(KernelMatmulOf, IsTheSameOnEveryExecutor) {
  using T = TypeParam;
  for (const auto& shape : {test::Shape{700, 1300, 32, 16}, {3, 20'000, 16, 5}, {129, 2049, 7, 3}, {1, 1, 1, 1}}) {
    const auto x = test::make_tokens<T>(Family::unit, shape);
    const auto keep = test::random_keep(shape.n_k, 0.9, 10);
    for (const Causal causal : {Causal::none, Causal::lower_right}) {
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal, .keep_key = keep}};
      Matrix<T> first;
      for (auto& [name, context] : test::contexts()) {
        SCOPED_TRACE(name);
        Matrix<T> out(shape.n_q, shape.d_v + 1);
        std::vector<T> lse(static_cast<std::size_t>(shape.n_q));
        kernel_matmul(SoftmaxKernel{}, in, out.leftCols(shape.d_v), std::span<T>(lse), context);
        out.col(shape.d_v) = Eigen::Map<Eigen::VectorX<T>>(lse.data(), shape.n_q);
        if (first.size() == 0) first = out;
        EXPECT_TRUE(test::bitwise_equal(out, first));
        kernel_matmul(SoftmaxKernel{}, in, out.leftCols(shape.d_v), std::span<T>(lse), context);
        EXPECT_TRUE(test::bitwise_equal(out, first)) << "second call";
      }
    }
  }
}

TYPED_TEST(KernelMatmulOf, GaussianIsTheSameOnEveryExecutor) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::unit, {300, 3000, 16, 8});
  for (const Index n_q : {4, 300}) {
    for (const Rows rows : {Rows::raw, Rows::normalized}) {
      Matrix<T> first;
      for (auto& [name, context] : test::contexts()) {
        SCOPED_TRACE(name);
        Matrix<T> out(n_q, 8);
        kernel_matmul(GaussianKernel{.rows = rows}, Inputs<T>{.q = x.q.topRows(n_q), .k = x.k, .v = x.v}, out, context);
        if (first.size() == 0) first = out;
        EXPECT_TRUE(test::bitwise_equal(out, first));
      }
    }
  }
}

/// Row states with storage of their own.
template <class T>
struct States {
  States(Index n_q, Index d_v)
      : maximum(static_cast<std::size_t>(n_q), test::kNaN<T>),
        sum(static_cast<std::size_t>(n_q), test::kNaN<T>),
        weighted(n_q, d_v) {
    weighted.setConstant(test::kNaN<T>);
  }
  RowStates<T> ref() { return {maximum, sum, weighted}; }

  std::vector<T> maximum, sum;
  Matrix<T> weighted;
};

/// The states of keys [first, last) alone.
template <class T, class Kernel>
States<T> partial(const Kernel& kernel, const Inputs<T>& in, Index first, Index last, Context& context) {
  const auto at = static_cast<std::size_t>(first), n = static_cast<std::size_t>(last - first);
  Inputs<T> some{.q = in.q, .k = in.k.middleRows(first, last - first), .v = in.v.middleRows(first, last - first)};
  some.mask.keep_query = in.mask.keep_query;
  if (!in.mask.keep_key.empty()) some.mask.keep_key = in.mask.keep_key.subspan(at, n);
  if (!in.key_bias.empty()) some.key_bias = in.key_bias.subspan(at, n);
  States<T> states(in.q.rows(), in.v.cols());
  attn::kernel_matmul_partial(kernel, some, states.ref(), context);
  return states;
}

template <class T, class Kernel>
void expect_states_merge(const Kernel& kernel) {
  const Index n_q = 21, n_k = 1500, d_v = 7;
  const auto x = test::make_tokens<T>(Family::unit, {n_q, n_k, 16, d_v});
  auto keep_key = test::random_keep(n_k, 0.8, 11);
  std::fill_n(keep_key.begin() + 700, 300, std::uint8_t{0});  // the middle part below sees no key
  const auto keep_query = test::random_keep(n_q, 0.8, 12);
  const auto bias = test::random_key_bias<T>(n_k, 0.1, 13);
  const Inputs<T> in{
      .q = x.q, .k = x.k, .v = x.v, .mask = {.keep_key = keep_key, .keep_query = keep_query}, .key_bias = bias};
  Context context;
  auto a = partial(kernel, in, 0, 700, context), b = partial(kernel, in, 700, 1000, context),
       c = partial(kernel, in, 1000, n_k, context);
  auto left = a, right = b;  // (a b) c and a (b c)
  merge(left.ref(), b.ref());
  merge(left.ref(), c.ref());
  merge(right.ref(), c.ref());
  merge(a.ref(), right.ref());

  const reference::Kernel expected_kernel = to_reference(kernel, 16);
  const reference::Problem p = test::to_reference(in);
  const reference::Result expected = attend(expected_kernel, p);
  for (States<T>* states : {&left, &a}) {
    Matrix<T> out = Matrix<T>::Constant(n_q, d_v, test::kNaN<T>);
    std::vector<T> lse(static_cast<std::size_t>(n_q));
    finish(kernel, states->ref(), 16, out, lse);
    test::expect_close(out, expected, p, expected_kernel);
    for (Index i = 0; i < n_q; ++i) {
      if (expected.lse[i] == -test::kInf<double>) {
        EXPECT_EQ(lse[static_cast<std::size_t>(i)], -test::kInf<T>);
      } else {
        EXPECT_NEAR(static_cast<double>(lse[static_cast<std::size_t>(i)]), expected.lse[i],
                    sizeof(T) == 4 ? 1e-4 : 1e-13);
      }
    }
  }
}

TYPED_TEST(KernelMatmulOf, StatesOfPartsMergeInAnyOrder) {
  expect_states_merge<TypeParam>(SoftmaxKernel{});
  expect_states_merge<TypeParam>(GaussianKernel{});
  expect_states_merge<TypeParam>(GaussianKernel{.rows = Rows::normalized});
  expect_states_merge<TypeParam>(OwnKernel{});
}

TYPED_TEST(KernelMatmulOf, StatesOfNothingMergeToNothing) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::unit, {5, 40, 8, 3});
  const std::vector<std::uint8_t> none(40, 0);
  const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.keep_key = none}};
  Context context;
  auto a = partial(SoftmaxKernel{}, in, 0, 20, context), b = partial(SoftmaxKernel{}, in, 20, 40, context);
  merge(a.ref(), b.ref());
  Matrix<T> out(5, 3);
  finish(SoftmaxKernel{}, a.ref(), 8, out);
  EXPECT_TRUE((out.array() == T(0)).all());
}

/// Scores 0 of one key and -100, in units of log2, of another, whose value is 2^100 times as large: each adds 1 to
/// every row. The others weigh nothing.
template <class T>
struct TwoKeys {
  TwoKeys(Index n_q, Index n_k)
      : q(Matrix<T>::Ones(n_q, 1)), k(n_k, 1), v(n_k, 1), keep(static_cast<std::size_t>(n_k)) {}

  void place(Index first, Index second) {
    k.setConstant(T(-4000));
    v.setZero();
    k(first, 0) = 0;
    k(second, 0) = -100;
    v(first, 0) = 1;
    v(second, 0) = std::ldexp(T(1), 100);
    std::fill(keep.begin(), keep.end(), std::uint8_t{0});
    keep[static_cast<std::size_t>(first)] = keep[static_cast<std::size_t>(second)] = 1;
  }

  Matrix<T> q, k, v;
  std::vector<std::uint8_t> keep;
};

/// In one tile, in two, in parts that are summed up apart and, where queries are few, in parts that are split off.
TYPED_TEST(KernelMatmulOf, AKeyFarBelowTheMaximumCountsByItsValueWhereverItLies) {
  using T = TypeParam;
  constexpr Index kKeys = 17'000, kPlaces[] = {0, 100, 700, 5000, 8192, 16'000};
  const SoftmaxKernel softmax{.scale = std::log(2.0)};
  const GaussianKernel gaussian{.bandwidth = std::sqrt(50 / std::log(2.0)),
                                .rows = Rows::normalized};  // kappa(1, 101) = 2^-100
  for (const Index n_q : {1, 60, 420}) {
    TwoKeys<T> x(n_q, kKeys);
    for (const Index first : kPlaces) {
      for (const Index second : kPlaces) {
        if (first == second) continue;
        SCOPED_TRACE(std::to_string(n_q) + " queries, keys " + std::to_string(first) + " and " +
                     std::to_string(second));
        x.place(first, second);
        Matrix<T> out(n_q, 1);
        Context context;
        const auto expect_two = [&] {
          EXPECT_LE((out.array() - T(2)).abs().maxCoeff(), sizeof(T) == 4 ? T(1e-4) : T(1e-12));
        };
        for (const Causal causal : {Causal::none, Causal::lower_right}) {
          kernel_matmul(softmax, Inputs<T>{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}}, out, context);
          expect_two();
        }
        x.k(first, 0) = 1;
        x.k(second, 0) = 101;
        kernel_matmul(gaussian, Inputs<T>{.q = x.q, .k = x.k, .v = x.v, .mask = {.keep_key = x.keep}}, out, context);
        expect_two();
      }
    }
  }
}

TYPED_TEST(KernelMatmulOf, MergedStatesFarApartCountByTheirSums) {
  using T = TypeParam;
  TwoKeys<T> x(3, 2);
  x.place(0, 1);
  const SoftmaxKernel kernel{.scale = std::log(2.0)};
  const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
  Context context;
  for (const bool forwards : {true, false}) {
    States<T> a = partial(kernel, in, 0, 1, context), b = partial(kernel, in, 1, 2, context);
    States<T>& into = forwards ? a : b;
    merge(into.ref(), (forwards ? b : a).ref());
    Matrix<T> out(3, 1);
    finish(kernel, into.ref(), 1, out);
    EXPECT_LE((out.array() - T(2)).abs().maxCoeff(), sizeof(T) == 4 ? T(1e-4) : T(1e-12)) << forwards;
  }
  for (const int apart : {0, 1, 30, 60, 100}) {
    States<T> near(1, 2), far(1, 2);
    near.maximum = {T(3)};
    near.sum = {T(1)};
    near.weighted << 1, 5;
    far.maximum = {T(3 - apart)};
    far.sum = {std::ldexp(T(3), apart)};
    far.weighted << std::ldexp(T(7), apart), std::ldexp(T(-1), apart);
    for (const bool forwards : {true, false}) {
      States<T> into = forwards ? near : far, from = forwards ? far : near;
      merge(into.ref(), from.ref());
      Matrix<T> out(1, 2);
      std::vector<T> lse(1);
      finish(kernel, into.ref(), 1, out, lse);
      EXPECT_EQ(out(0, 0), T(2)) << apart;
      EXPECT_EQ(out(0, 1), T(1)) << apart;
      EXPECT_NEAR(static_cast<double>(lse[0]), 5 * std::log(2.0), 1e-6) << apart;
    }
  }
}

/// Rows whose sums are no numbers but 0: their logarithms are still known, from all keys at once and from parts of
/// them.
TYPED_TEST(KernelMatmulOf, LogSumsOfRawRowsDoNotUnderflow) {
  using T = TypeParam;
  auto x = test::make_tokens<T>(Family::init, {30, 200, 16, 3});
  x.q.array() += T(25);
  const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
  const reference::Result expected = attend(reference::gaussian_kernel(16), test::to_reference(in));
  Context context;
  Matrix<T> out(30, 3);
  std::vector<T> lse(30), of_parts(30);
  kernel_matmul(GaussianKernel{}, in, out, std::span<T>(lse), context);
  States<T> a = partial(GaussianKernel{}, in, 0, 120, context), b = partial(GaussianKernel{}, in, 120, 200, context);
  merge(a.ref(), b.ref());
  finish(GaussianKernel{}, a.ref(), 16, out, of_parts);
  for (Index i = 0; i < 30; ++i) {
    ASSERT_LT(expected.lse[i], -1000);
    const double digits = 2e-6 * std::abs(expected.lse[i]);
    EXPECT_NEAR(static_cast<double>(lse[static_cast<std::size_t>(i)]), expected.lse[i], digits);
    EXPECT_NEAR(static_cast<double>(of_parts[static_cast<std::size_t>(i)]), expected.lse[i], digits);
  }
}

/// Limits count rows of the call's own keys: a part that all queries see, and the part in which they differ.
TYPED_TEST(KernelMatmulOf, StatesOfACausalPartMerge) {
  using T = TypeParam;
  const Index n_q = 70, n_k = 300, before = n_k - n_q;
  const auto x = test::make_tokens<T>(Family::unit, {n_q, n_k, 16, 5});
  const reference::Problem p =
      test::to_reference<T>({.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = Causal::lower_right}});
  for (const Rows rows : {Rows::raw, Rows::normalized}) {
    const GaussianKernel kernel{.rows = rows};
    Context context;
    States<T> states = partial(kernel, Inputs<T>{.q = x.q, .k = x.k, .v = x.v}, 0, before, context), own(n_q, 5);
    const Inputs<T> last{
        .q = x.q, .k = x.k.bottomRows(n_q), .v = x.v.bottomRows(n_q), .mask = {.causal = Causal::upper_left}};
    attn::kernel_matmul_partial(kernel, last, own.ref(), context);
    merge(states.ref(), own.ref());
    std::vector<T> lse(static_cast<std::size_t>(n_q));
    finish(kernel, states.ref(), 16, states.weighted, lse);  // in place
    const reference::Kernel expected_kernel = to_reference(kernel, 16);
    const reference::Result expected = attend(expected_kernel, p);
    test::expect_close(states.weighted, expected, p, expected_kernel);
    for (Index i = 0; i < n_q; ++i)
      EXPECT_NEAR(static_cast<double>(lse[static_cast<std::size_t>(i)]), expected.lse[i],
                  sizeof(T) == 4 ? 1e-4 : 1e-12);
  }
}

/// Between views that are wider than their rows.
TYPED_TEST(KernelMatmulOf, StatesMayBeStrided) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::unit, {6, 40, 8, 3});
  const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
  Context context;
  States<T> into = partial(SoftmaxKernel{}, in, 0, 20, context), from = partial(SoftmaxKernel{}, in, 20, 40, context);
  Padded<T> wide_into(into.weighted, 3, test::kNaN<T>), wide_from(from.weighted, 2, test::kNaN<T>), out(6, 3, 4, T(-7));
  merge(RowStates<T>{into.maximum, into.sum, wide_into.view()}, RowStates<T>{from.maximum, from.sum, wide_from.view()});
  finish(SoftmaxKernel{}, RowStates<T>{into.maximum, into.sum, wide_into.view()}, 8, out.view());
  const reference::Problem p = test::to_reference(in);
  const reference::Kernel kernel = reference::softmax_kernel(8);
  test::expect_close(out.matrix(), attend(kernel, p), p, kernel);
  EXPECT_TRUE(out.padding_untouched() && wide_into.padding_untouched());
  Padded<T> written(6, 3, 5, T(-7));
  attn::kernel_matmul_partial(SoftmaxKernel{}, in, {into.maximum, into.sum, written.view()}, context);
  Matrix<T> dense(6, 3);
  attn::kernel_matmul_partial(SoftmaxKernel{}, in, {into.maximum, into.sum, dense}, context);
  EXPECT_TRUE(test::bitwise_equal(written.matrix(), dense));
  EXPECT_TRUE(written.padding_untouched());
}

TYPED_TEST(KernelMatmulOf, ValuesMayLieInTheSameMatrixAsKeys) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::unit, {20, 70, 24, 24});
  Matrix<T> qkv(70, 72);
  qkv << x.k, x.v, x.k;
  const Inputs<T> packed{.q = qkv.middleCols(48, 24), .k = qkv.leftCols(24), .v = qkv.middleCols(24, 24)};
  Context context;
  expect_all_kernels_match<T>(packed, context);
}

}  // namespace
