/// Every method that has a name, and a user's own: one added to the list is tested by this file as soon as it has a
/// line in kExpectations.
#include <attn/attn.hpp>

#include "common/methods.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

using attn::AnyApproximator;
using attn::Causal;
using test::Context;
using test::describe;
using test::Family;
using test::forward;
using test::in_both_precisions;
using test::Index;
using test::Inputs;
using test::Mask;
using test::MaskedInputs;
using test::Matrix;
using test::Padded;
using test::Shape;
using test::Tokens;

/// What a method approximates, and its largest relative error at a size of 64 on smooth inputs of 400 tokens.
struct Expectation {
  std::string_view name, exact;
  double error;
};

constexpr Expectation kExpectations[] = {{"softmax", "softmax", 0},      {"gaussian", "gaussian", 0},
                                         {"multipole", "softmax", 0.05}, {"automatic", "softmax", 0},
                                         {"nystrom", "softmax", 0.2},    {"shifted-nystrom", "softmax", 0.2},
                                         {"skyformer", "gaussian", 0.2}, {"lifted-softmax", "softmax", 0.3}};

class Methods : public test::MethodTest {
 protected:
  static const Expectation* expectation(std::string_view name) {
    const auto* found =
        std::find_if(std::begin(kExpectations), std::end(kExpectations), [&](const auto& e) { return e.name == name; });
    return found == std::end(kExpectations) ? nullptr : found;
  }
};

INSTANTIATE_TEST_SUITE_P(Every, Methods, ::testing::ValuesIn(test::method_names()), test::test_name);

constexpr std::pair<Index, Index> kLengths[] = {{1, 1},   {1, 50},  {50, 1},  {2, 2},    {7, 13},
                                                {33, 33}, {64, 64}, {65, 65}, {150, 61}, {131, 131}};

TEST_P(Methods, TakeEveryShapeThatTheySupport) {
  in_both_precisions([&]<class T>(T) {
    Context context;
    for (const auto& [n_q, n_k] : kLengths) {
      for (const auto& [d, d_v] : {std::pair<Index, Index>{1, 1}, {3, 16}, {16, 33}, {33, 3}, {64, 1}}) {
        const auto x = test::make_tokens<T>(Family::init, {n_q, n_k, d, d_v}, 101);
        const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
        SCOPED_TRACE(describe(in));
        for (const Index m : {1, 8, 33, 100}) {
          const auto method = make<T>(m);
          if (method.supports(in)) {
            EXPECT_TRUE(forward(method, in, context).allFinite()) << m << " landmarks";
          } else {
            EXPECT_NE(n_q, n_k) << "equal lengths without a mask are supported by all";
          }
        }
      }
    }
  });
}

TEST_P(Methods, TakeStridedViews) {
  in_both_precisions([&]<class T>(T) {
    Context context;
    const auto x = test::make_tokens<T>(Family::init, {67, 67, 17, 9}, 102);
    Padded<T> q(x.q, 3, test::kNaN<T>), k(x.k, 5, test::kNaN<T>), v(x.v, 1, test::kNaN<T>), out(67, 9, 4, T(-7));
    const auto method = make<T>(12);
    const Matrix<T> expected = forward(method, {.q = x.q, .k = x.k, .v = x.v}, context);
    method.forward({.q = q.view(), .k = k.view(), .v = v.view()}, out.view(), context);
    EXPECT_TRUE(test::bitwise_equal(out.matrix(), expected));
    EXPECT_TRUE(out.padding_untouched());
  });
}

TEST_P(Methods, WhatTheMasksDropHasNoInfluence) {
  in_both_precisions([&]<class T>(T) {
    Context context;
    for (const Index n_k : {140, 93}) {
      const MaskedInputs<T> inputs(n_k);
      for (const Inputs<T>& in : inputs.all()) {
        SCOPED_TRACE(describe(in));
        const auto method = make<T>(20);
        if (!method.supports(in)) continue;
        const Matrix<T> clean = forward(method, in, context);
        EXPECT_TRUE(clean.allFinite());
        for (const T poison : {test::kNaN<T>, test::kInf<T>, T(1e6)}) {
          const Tokens<T> y = inputs.poisoned(in, poison);
          EXPECT_TRUE(
              test::bitwise_equal(forward(method, {.q = y.q, .k = y.k, .v = y.v, .mask = in.mask}, context), clean))
              << poison;
        }
      }
    }
  });
}

TEST_P(Methods, DroppedQueriesAreZero) {
  in_both_precisions([&]<class T>(T) {
    for (const Index n_k : {140, 93}) {
      const MaskedInputs<T> inputs(n_k);
      for (const Inputs<T>& in : inputs.all()) {
        const auto method = make<T>(20);
        if (!method.supports(in)) continue;
        const Matrix<T> out = forward(method, in);
        for (Index i = 0; i < out.rows(); ++i) {
          EXPECT_EQ((out.row(i).array() == T(0)).all(), !reference::kept(in.mask.keep_query, i))
              << describe(in) << ", row " << i;
        }
      }
    }
  });
}

TEST_P(Methods, NothingKeptGivesZeros) {
  in_both_precisions([&]<class T>(T) {
    const auto x = test::make_tokens<T>(Family::init, {40, 40, 8, 5}, 107);
    const std::vector<std::uint8_t> none(40, 0);
    for (const Mask& mask :
         {Mask{.keep_key = none}, Mask{.keep_query = none}, Mask{.keep_key = none, .keep_query = none}}) {
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask};
      const auto method = make<T>(6);
      if (!method.supports(in)) continue;
      EXPECT_TRUE((forward(method, in).array() == T(0)).all()) << describe(in);
    }
  });
}

TEST_P(Methods, PaddedIsTrimmed) {
  in_both_precisions([&]<class T>(T) {
    constexpr Index kLength = 110, kKept = 71;
    const double tolerance = sizeof(T) == 4 ? (GetParam() == "lifted-softmax" ? 1e-3 : 1e-5) : 1e-12;
    const auto x = test::make_tokens<T>(Family::init, {kLength, kLength, 16, 12}, 108);
    for (const Index padding : {Index{0}, kLength - kKept, Index{17}}) {  // how much of it comes first
      std::vector<std::uint8_t> keep(kLength, 0);
      std::fill_n(keep.begin() + padding, kKept, std::uint8_t{1});
      const Mask mask{.keep_key = keep, .keep_query = keep};
      const auto rows = [&](const Matrix<T>& m) { return attn::ConstMatrixRef<T>(m.middleRows(padding, kKept)); };
      for (const Index m : {9, 32, 71, 80}) {
        const auto method = make<T>(m);
        const Matrix<T> padded = forward(method, {.q = x.q, .k = x.k, .v = x.v, .mask = mask});
        const Matrix<T> trimmed = forward(method, {.q = rows(x.q), .k = rows(x.k), .v = rows(x.v)});
        const Matrix<T> inner = padded.middleRows(padding, kKept);
        EXPECT_LE(test::relative_error(inner, trimmed.template cast<double>()), tolerance)
            << m << " landmarks, " << padding << " before";
      }
    }
  });
}

TEST_P(Methods, BitwiseEqualWhateverTheWorkers) {
  in_both_precisions([&]<class T>(T) {
    const auto keep = test::random_keep(700, 0.9, 109);
    const auto x = test::make_tokens<T>(Family::init, {700, 700, 24, 20}, 110);
    for (const Mask& mask : {Mask{}, Mask{.keep_key = keep, .keep_query = keep}}) {
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = mask};
      for (const Index m : {30, 150}) {
        const auto method = make<T>(m);
        const Matrix<T> expected = forward(method, in);
        for (auto& [name, context] : test::contexts()) {
          EXPECT_TRUE(test::bitwise_equal(forward(method, in, context), expected)) << name << ", " << m << " landmarks";
          EXPECT_TRUE(test::bitwise_equal(forward(method, in, context), expected)) << name << ", a second time";
        }
      }
    }
  });
}

TEST_P(Methods, SupportsSaysWhatForwardRefuses) {
  in_both_precisions([&]<class T>(T) {
    const std::vector<std::uint8_t> some = test::random_keep(30, 0.7, 111), fewer = test::random_keep(21, 0.7, 112);
    const std::vector<T> biases = test::random_key_bias<T>(30, 0.1, 113);
    for (const Index n_k : {Index{30}, Index{21}}) {
      const auto x = test::make_tokens<T>(Family::init, {30, n_k, 8, 5}, 114);
      const std::span<const std::uint8_t> of_keys = n_k == 30 ? some : fewer;
      for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
        for (const int bits : {0, 1, 2, 3, 4, 7}) {
          Inputs<T> in{.q = x.q, .k = x.k, .v = x.v, .mask = {.causal = causal}};
          if ((bits & 1) != 0) in.mask.keep_key = of_keys;
          if ((bits & 2) != 0) in.mask.keep_query = some;
          if ((bits & 4) != 0) in.key_bias = std::span<const T>(biases).first(static_cast<std::size_t>(n_k));
          SCOPED_TRACE(describe(in) + (causal == Causal::none ? "" : ", causal") +
                       (in.key_bias.empty() ? "" : ", key_bias"));
          for (const Index m : {5, 64}) {
            const auto method = make<T>(m);
            Matrix<T> out = Matrix<T>::Constant(30, 5, T(-7));
            Context context;
            if (method.supports(in)) {
              EXPECT_NO_THROW(method.forward(in, out, context));
              EXPECT_TRUE(out.allFinite());
            } else {
              EXPECT_THROW(method.forward(in, out, context), std::invalid_argument);
              EXPECT_TRUE((out.array() == T(-7)).all());
            }
          }
        }
      }
    }
  });
}

TEST_P(Methods, OneToken) {
  in_both_precisions([&]<class T>(T) {
    const auto x = test::make_tokens<T>(Family::unit, {1, 1, 16, 7}, 115);
    for (const Index m : {1, 2, 64}) {
      const Matrix<T> out = forward(make<T>(m, {.rows = attn::Rows::normalized}), {.q = x.q, .k = x.k, .v = x.v});
      EXPECT_LE(test::relative_error(out, x.v.template cast<double>()), sizeof(T) == 4 ? 1e-5 : 1e-13) << m;
    }
  });
}

TEST_P(Methods, AsManyLandmarksAsTokensOrMore) {
  if (GetParam() == "mean-pooling") GTEST_SKIP() << "it does not follow exact attention";
  ASSERT_NE(expectation(GetParam()), nullptr) << "kExpectations lacks this method";
  const auto x = test::make_tokens<double>(Family::init, {60, 60, 16, 7}, 116);
  const Inputs<double> in{.q = x.q, .k = x.k, .v = x.v};
  const auto exact = forward(attn::make_approximator<double>(expectation(GetParam())->exact), in);
  for (const Index m : {60, 61, 120, 1000}) {
    EXPECT_LE(test::relative_error(forward(make<double>(m, {.gamma = 1e-9}), in), exact), m < 120 ? 0.2 : 1e-5) << m;
  }
}

TEST_P(Methods, FollowExactAttentionOnSmoothInputs) {
  if (GetParam() == "mean-pooling") GTEST_SKIP() << "it does not follow exact attention";
  ASSERT_NE(expectation(GetParam()), nullptr) << "kExpectations lacks this method";
  in_both_precisions([&]<class T>(T) {
    for (const std::uint64_t seed : {1U, 2U, 3U}) {
      const auto x = test::make_tokens<T>(Family::smooth, {400, 400, 32, 16}, seed);
      const Inputs<T> in{.q = x.q, .k = x.k, .v = x.v};
      const auto exact = forward(attn::make_approximator<T>(expectation(GetParam())->exact), in);
      const double error = test::relative_error(forward(make<T>(64), in), exact.template cast<double>());
      RecordProperty("error", std::to_string(error));
      EXPECT_LE(error, expectation(GetParam())->error);
    }
  });
}

TEST_P(Methods, StayFiniteOnLargeInputs) {
  in_both_precisions([&]<class T>(T) {
    for (const double size : {1e-6, 8.0, 30.0}) {
      const auto x = test::scaled(test::make_tokens<T>(Family::unit, {90, 90, 16, 7}, 117), size);
      for (const Index m : {1, 10, 90}) {
        EXPECT_TRUE(forward(make<T>(m), {.q = x.q, .k = x.k, .v = x.v}).allFinite())
            << size << ", " << m << " landmarks";
      }
    }
  });
}

TEST_P(Methods, AreTheMethodOfThatName) {
  const auto method = test::make_method<float>(GetParam());
  EXPECT_EQ(method.name(), GetParam());
  const auto x = test::make_tokens<float>(Family::init, {100, 100, 16, 7}, 118);
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
  const AnyApproximator<float> copy = method;
  EXPECT_TRUE(test::bitwise_equal(forward(copy, in), forward(method, in)));
}

TEST(MethodList, HasNamesDescriptionsAndExpectations) {
  ASSERT_EQ(attn::methods<float>().size(), attn::methods<double>().size());
  for (std::size_t i = 0; i < attn::methods<float>().size(); ++i) {
    EXPECT_EQ(attn::methods<float>()[i].name, attn::methods<double>()[i].name);
    EXPECT_FALSE(attn::methods<float>()[i].description.empty());
    EXPECT_EQ(attn::methods<float>()[i].description.find('\n'), std::string_view::npos);
  }
  EXPECT_EQ(test::method_names().size() - 1, std::size(kExpectations)) << "all but a user's own";
}

/// Documented defaults, which results depend on.
TEST(MethodList, DefaultsAreThoseOfThePapers) {
  EXPECT_EQ(attn::SegmentMeans{}.num_landmarks, 64);
  EXPECT_EQ(attn::StridedSample{}.num_landmarks, 128);
  EXPECT_EQ(attn::UniformSample{}.num_landmarks, 128);
  EXPECT_EQ(attn::UniformSample{}.seed, 0U);
  EXPECT_EQ(attn::IterativePinv{}.iterations, 6);
  EXPECT_EQ(attn::RidgeInverse{}.gamma, 0.1);
  EXPECT_EQ(attn::PreconditionedPinv{}.gamma, 0.1);
  EXPECT_EQ(attn::PreconditionedPinv{}.iterations, 6);
  EXPECT_EQ(attn::SpectralShift{}.mode, attn::ShiftMode::row);
  EXPECT_EQ(attn::SpectralShift{}.iterations, 6);
  EXPECT_EQ(attn::SpectralShift{}.num_probes, 32);
}

/// By its name a method is the one of its type, with and without options; and each option changes the result.
class MethodsByName : public ::testing::Test {
 protected:
  Matrix<double> named(std::string_view name, const attn::MethodOptions& options) const {
    return attn::attention(attn::make_approximator<double>(name, options), x_.q, x_.k, x_.v);
  }
  Matrix<double> typed(const auto& method) const { return attn::attention(method, x_.q, x_.k, x_.v); }

  void expect(std::string_view name, const attn::MethodOptions& options, const auto& method) const {
    EXPECT_TRUE(test::bitwise_equal(named(name, options), typed(method))) << name;
  }
  void expect_to_matter(std::string_view name, const std::vector<attn::MethodOptions>& options) const {
    const Matrix<double> usual = named(name, {});
    for (std::size_t i = 0; i < options.size(); ++i)
      EXPECT_FALSE(test::bitwise_equal(named(name, options[i]), usual)) << name << ", option " << i;
  }

 private:
  Tokens<double> x_ = test::make_tokens<double>(Family::self, {300, 300, 8, 5}, 119);
};

TEST_F(MethodsByName, ExactOnes) {
  using attn::GaussianKernel, attn::Rows;
  expect("softmax", {}, attn::SoftmaxAttention<double>{});
  expect("softmax", {.scale = 0.2}, attn::SoftmaxAttention<double>({.scale = 0.2}));
  expect("gaussian", {}, attn::GaussianAttention<double>{});
  const GaussianKernel kernel{.bandwidth = 1.3, .rows = Rows::normalized};
  expect("gaussian", {.bandwidth = 1.3, .rows = Rows::normalized}, attn::GaussianAttention<double>(kernel));
  expect_to_matter("softmax", {{.scale = 0.2}});
  expect_to_matter("gaussian", {{.bandwidth = 1.3}, {.rows = Rows::normalized}});
}

TEST_F(MethodsByName, ThroughClusters) {
  using attn::Multipole;
  expect("multipole", {}, Multipole<double>{});
  const attn::Clusters clusters{.num_clusters = 20, .num_groups = 9, .num_near = 3};
  expect("multipole", {.num_clusters = 20, .num_groups = 9, .num_near = 3, .scale = 0.2},
         Multipole<double>(clusters, {.scale = 0.2}));
  expect_to_matter(
      "multipole",
      {{.num_clusters = 40}, {.num_groups = 9}, {.num_near = 3}, {.num_branches = 5}, {.num_open = 2}, {.scale = 0.2}});
}

TEST_F(MethodsByName, WithinAnError) {
  expect("automatic", {}, attn::Automatic<double>{});
  expect("automatic", {.max_error = 0.2, .scale = 0.2, .seed = 4},
         attn::Automatic<double>{.max_error = 0.2, .kernel = {.scale = 0.2}, .seed = 4});
  expect_to_matter("automatic", {{.scale = 0.2}});
}

TEST_F(MethodsByName, ThroughSegmentMeans) {
  using attn::ShiftMode;
  expect("nystrom", {}, attn::Nystrom<double>{});
  expect("nystrom", {.num_landmarks = 9, .iterations = 3, .scale = 0.2},
         attn::Nystrom<double>({9}, {3}, {.scale = 0.2}));
  expect("shifted-nystrom", {}, attn::ShiftedNystrom<double>{});
  expect(
      "shifted-nystrom",
      {.num_landmarks = 9, .iterations = 3, .num_probes = 7, .scale = 0.2, .mode = ShiftMode::scalar},
      attn::ShiftedNystrom<double>({9}, {.mode = ShiftMode::scalar, .iterations = 3, .num_probes = 7}, {.scale = 0.2}));
  expect_to_matter("nystrom", {{.num_landmarks = 9}, {.iterations = 3}, {.scale = 0.2}});
  expect_to_matter(
      "shifted-nystrom",
      {{.num_landmarks = 9}, {.iterations = 3}, {.num_probes = 7}, {.scale = 0.2}, {.mode = ShiftMode::scalar}});
}

TEST_F(MethodsByName, ThroughSampledTokens) {
  using attn::Rows, attn::Skyformer, attn::LiftedSoftmax;
  expect("skyformer", {}, Skyformer<double>{});
  expect("skyformer", {.num_landmarks = 9, .gamma = 0.2, .bandwidth = 1.3, .seed = 4, .rows = Rows::normalized},
         Skyformer<double>({9, 4}, {0.2}, {.bandwidth = 1.3, .rows = Rows::normalized}));
  expect("lifted-softmax", {}, LiftedSoftmax<double>{});
  expect("lifted-softmax", {}, LiftedSoftmax<double>({}, {.gamma = 1e-3}));
  expect("lifted-softmax", {.num_landmarks = 9, .gamma = 0.2, .scale = 0.2, .seed = 4},
         LiftedSoftmax<double>({9, 4}, {0.2}, {.scale = 0.2}));
  expect_to_matter("skyformer",
                   {{.num_landmarks = 9}, {.gamma = 0.2}, {.bandwidth = 1.3}, {.seed = 4}, {.rows = Rows::normalized}});
  expect_to_matter("lifted-softmax", {{.num_landmarks = 9}, {.gamma = 0.2}, {.scale = 0.2}, {.seed = 4}});
}

/// Options that differ from their defaults, each alone, by their names.
std::vector<std::pair<std::string, attn::MethodOptions>> every_option() {
  return {{"num_landmarks", {.num_landmarks = 9}},
          {"num_clusters", {.num_clusters = 9}},
          {"num_groups", {.num_groups = 9}},
          {"num_near", {.num_near = 9}},
          {"num_branches", {.num_branches = 9}},
          {"num_open", {.num_open = 9}},
          {"iterations", {.iterations = 5}},
          {"num_probes", {.num_probes = 9}},
          {"gamma", {.gamma = 0.2}},
          {"scale", {.scale = 0.2}},
          {"bandwidth", {.bandwidth = 1.3}},
          {"seed", {.seed = 4}},
          {"rows", {.rows = attn::Rows::normalized}},
          {"mode", {.mode = attn::ShiftMode::scalar}},
          {"products", {.products = attn::Products::float32}}};
}

TEST(MethodList, OptionsThatAMethodDoesNotHaveAreRefused) {
  for (const auto& method : attn::methods<float>()) {
    for (const auto& [option, options] : every_option()) {
      const std::string refused = "make_approximator: " + std::string(method.name) + " has no option " + option +
                                  "; it has " + std::string(method.options);
      std::string said;
      try {
        attn::make_approximator<float>(method.name, options);
      } catch (const std::invalid_argument& e) {
        said = e.what();
      }
      EXPECT_EQ(said, method.takes(option) ? "" : refused);
      EXPECT_EQ(method.make(options).name(), method.name);
    }
  }
}

TEST(MethodList, UnknownNamesAreRefusedWithAllNames) {
  std::string names;
  for (const auto& method : attn::methods<float>()) names += (names.empty() ? "" : ", ") + std::string(method.name);
  for (const std::string& name : {std::string("performer"), std::string(), std::string("Softmax")}) {
    try {
      attn::make_approximator<float>(name);
      ADD_FAILURE() << name;
    } catch (const std::invalid_argument& e) {
      EXPECT_EQ(e.what(), "make_approximator: no method is called \"" + name + "\"; there are " + names);
    }
  }
}

}  // namespace
