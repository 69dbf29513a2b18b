/// NaN and infinity: they reach every row that sees them and no other, bit for bit; what a mask hides has no influence
/// at all.
#include <attn/exact.hpp>
#include <attn/kernel_matmul.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace {

using attn::Causal;
using attn::GaussianKernel;
using attn::Rows;
using attn::SoftmaxKernel;
using test::Context;
using test::Family;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;
using test::Tokens;

enum class Kind { softmax, raw_gaussian, normalized_gaussian };

template <class T>
Matrix<T> run(Kind kind, const Inputs<T>& in) {
  Matrix<T> out(in.q.rows(), in.v.cols());
  Context context;
  if (kind == Kind::softmax) {
    attn::kernel_matmul(SoftmaxKernel{}, in, out, context);
  } else {
    attn::kernel_matmul(GaussianKernel{.rows = kind == Kind::raw_gaussian ? Rows::raw : Rows::normalized}, in, out,
                        context);
  }
  return out;
}

/// NaNs of several payloads and signs.
template <class T>
std::vector<T> nans() {
  return {test::kNaN<T>, -test::kNaN<T>, static_cast<T>(std::nan("123")), static_cast<T>(std::nan("0x7ffffffffffff"))};
}

/// A problem with masks of its own.
template <class T>
struct Scene {
  Scene(Index n_q, Index n_k, Causal causal, bool masked, Index d_v = 6)
      : x(test::make_tokens<T>(Family::init, {n_q, n_k, 20, d_v}, 21)),
        keep_key(test::random_keep(n_k, 0.8, 22)),
        keep_query(test::random_keep(n_q, 0.8, 23)) {
    mask.causal = causal;
    if (masked) {
      mask.keep_key = keep_key;
      mask.keep_query = keep_query;
    }
  }
  Scene(const Scene&) = delete;
  Scene& operator=(const Scene&) = delete;

  Inputs<T> inputs() const { return {.q = x.q, .k = x.k, .v = x.v, .mask = mask}; }
  bool sees(Index i, Index j) const { return reference::visible(mask, x.q.rows(), x.k.rows(), i, j); }

  Tokens<T> x;
  std::vector<std::uint8_t> keep_key, keep_query;
  Mask mask{};
};

/// Calls body(scene, kind) for every kernel, causal alignment and shape, with padding masks and without.
template <class T, class Body>
void for_each_scene(const Body& body) {
  for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
    for (const bool masked : {false, true}) {
      for (const auto& [n_q, n_k] : {std::pair<Index, Index>{70, 300}, {260, 61}, {3, 3000}}) {
        for (const Kind kind : {Kind::softmax, Kind::raw_gaussian, Kind::normalized_gaussian}) {
          SCOPED_TRACE("causal " + std::to_string(static_cast<int>(causal)) + (masked ? ", masked" : "") + ", n_q " +
                       std::to_string(n_q) + ", kind " + std::to_string(static_cast<int>(kind)));
          const Scene<T> scene(n_q, n_k, causal, masked);
          body(scene, kind);
        }
      }
    }
  }
}

/// Rows for which poisoned(i) are NaN throughout, the others have the bits that they have in clean.
template <class T, class Poisoned>
void expect_confined(const Matrix<T>& out, const Matrix<T>& clean, const Poisoned& poisoned) {
  for (Index i = 0; i < out.rows(); ++i) {
    if (poisoned(i)) {
      ASSERT_TRUE(out.row(i).array().isNaN().all()) << "row " << i << " should be NaN: " << out.row(i);
    } else {
      ASSERT_TRUE(test::same_row(out, clean, i))
          << "row " << i << " should not change: " << out.row(i) << " from " << clean.row(i);
    }
  }
}

template <class T>
class Robustness : public ::testing::Test {};
TYPED_TEST_SUITE(Robustness, test::Scalars);

TYPED_TEST(Robustness, NaNInAQueryStaysInItsRow) {
  for_each_scene<TypeParam>([](const auto& scene, Kind kind) {
    const auto clean = run(kind, scene.inputs());
    for (const auto nan : nans<TypeParam>()) {
      for (const Index row : {Index{0}, scene.x.q.rows() / 2, scene.x.q.rows() - 1}) {
        Matrix<TypeParam> q = scene.x.q;
        q(row, 7) = nan;
        auto in = scene.inputs();
        const auto out = run<TypeParam>(kind, {.q = q, .k = in.k, .v = in.v, .mask = in.mask});
        const bool sees_a_key = (clean.row(row).array() != 0).any();
        expect_confined(out, clean, [&](Index i) { return i == row && sees_a_key; });
      }
    }
  });
}

TYPED_TEST(Robustness, NaNInAKeyReachesTheRowsThatSeeIt) {
  for_each_scene<TypeParam>([](const auto& scene, Kind kind) {
    const auto clean = run(kind, scene.inputs());
    for (const auto nan : nans<TypeParam>()) {
      for (const Index row : {Index{0}, scene.x.k.rows() / 3, scene.x.k.rows() - 1}) {
        SCOPED_TRACE("key " + std::to_string(row));
        Matrix<TypeParam> k = scene.x.k;
        k(row, 7) = nan;
        auto in = scene.inputs();
        const auto out = run<TypeParam>(kind, {.q = in.q, .k = k, .v = in.v, .mask = in.mask});
        expect_confined(out, clean, [&](Index i) { return scene.sees(i, row); });
      }
    }
  });
}

TYPED_TEST(Robustness, NaNInAValueReachesTheRowsThatSeeItInItsColumn) {
  for_each_scene<TypeParam>([](const auto& scene, Kind kind) {
    const auto clean = run(kind, scene.inputs());
    for (const auto nan : nans<TypeParam>()) {
      for (const Index row : {Index{0}, scene.x.k.rows() / 3, scene.x.k.rows() - 1}) {
        Matrix<TypeParam> v = scene.x.v;
        v(row, 2) = nan;
        auto in = scene.inputs();
        const auto out = run<TypeParam>(kind, {.q = in.q, .k = in.k, .v = v, .mask = in.mask});
        expect_confined(Matrix<TypeParam>(out.col(2)), Matrix<TypeParam>(clean.col(2)),
                        [&](Index i) { return scene.sees(i, row); });
        EXPECT_TRUE(test::bitwise_equal(Matrix<TypeParam>(out.leftCols(2)), Matrix<TypeParam>(clean.leftCols(2))));
        EXPECT_TRUE(test::bitwise_equal(Matrix<TypeParam>(out.rightCols(3)), Matrix<TypeParam>(clean.rightCols(3))));
      }
    }
  });
}

/// Calls body(scene, kind) for causal scenes of few tokens, whose rows and columns can all be tried.
template <class T, class Body>
void for_each_small_scene(Index d_v, const Body& body) {
  for (const Causal causal : {Causal::upper_left, Causal::lower_right}) {
    for (const bool masked : {false, true}) {
      for (const auto& [n_q, n_k] : {std::pair<Index, Index>{40, 70}, {90, 50}, {2, 2}}) {
        const Scene<T> scene(n_q, n_k, causal, masked, d_v);
        for (const Kind kind : {Kind::softmax, Kind::raw_gaussian, Kind::normalized_gaussian}) {
          SCOPED_TRACE("causal " + std::to_string(static_cast<int>(causal)) + (masked ? ", masked" : "") + ", n_q " +
                       std::to_string(n_q) + ", kind " + std::to_string(static_cast<int>(kind)));
          body(scene, kind);
        }
      }
    }
  }
}

/// Of every key, and in every column of several packets and a tail: near the diagonal one tile holds queries that see
/// the key and others that do not.
TYPED_TEST(Robustness, ANonFiniteValueReachesOneColumnOfTheRowsThatSeeIt) {
  using T = TypeParam;
  constexpr Index kColumns = 37;
  for_each_small_scene<T>(kColumns, [](const auto& scene, Kind kind) {
    const Matrix<T> clean = run(kind, scene.inputs());
    for (Index row = 0; row < scene.x.k.rows(); ++row) {
      const Index column = 11 * row % kColumns;
      Inputs<T> in = scene.inputs();
      Matrix<T> v = in.v;
      v(row, column) = row % 2 == 0 ? test::kNaN<T> : test::kInf<T>;
      const Matrix<T> out = run<T>(kind, {.q = in.q, .k = in.k, .v = v, .mask = in.mask});
      for (Index i = 0; i < out.rows(); ++i) {
        const Matrix<T> expected = clean.row(i);
        Matrix<T> found = out.row(i);
        if (scene.sees(i, row)) {
          ASSERT_FALSE(std::isfinite(found(0, column))) << "row " << i << ", key " << row << ", column " << column;
          found(0, column) = expected(0, column);
        }
        ASSERT_TRUE(test::bitwise_equal(found, expected)) << "row " << i << ", key " << row << ", column " << column;
      }
    }
  });
}

/// Rows that see no key, amid others that see some, stay zero.
TYPED_TEST(Robustness, NaNInAnyQueryStaysInItsRow) {
  using T = TypeParam;
  for_each_small_scene<T>(3, [](const auto& scene, Kind kind) {
    const Matrix<T> clean = run(kind, scene.inputs());
    for (Index row = 0; row < scene.x.q.rows(); ++row) {
      Inputs<T> in = scene.inputs();
      Matrix<T> q = in.q;
      q(row, row % q.cols()) = test::kNaN<T>;
      const Matrix<T> out = run<T>(kind, {.q = q, .k = in.k, .v = in.v, .mask = in.mask});
      const bool sees_a_key = (clean.row(row).array() != 0).any();
      expect_confined(out, clean, [&](Index i) { return i == row && sees_a_key; });
    }
  });
}

TYPED_TEST(Robustness, WhatTheMasksDropHasNoInfluence) {
  using T = TypeParam;
  for_each_scene<T>([](const auto& scene, Kind kind) {
    const auto clean = run(kind, scene.inputs());
    for (const T poison : {test::kNaN<T>, static_cast<T>(std::nan("123")), test::kInf<T>, -test::kInf<T>, T(1e30)}) {
      Tokens<T> x = scene.x;
      auto in = scene.inputs();
      for (Index i = 0; i < x.q.rows(); ++i) {
        if (!reference::kept(in.mask.keep_query, i)) x.q.row(i).setConstant(poison);
      }
      for (Index j = 0; j < x.k.rows(); ++j) {
        if (reference::kept(in.mask.keep_key, j)) continue;
        x.k.row(j).setConstant(poison);
        x.v.row(j).setConstant(poison);
      }
      EXPECT_TRUE(test::bitwise_equal(run<T>(kind, {.q = x.q, .k = x.k, .v = x.v, .mask = in.mask}), clean)) << poison;
    }
  });
}

TYPED_TEST(Robustness, TheFutureHasNoInfluence) {
  using T = TypeParam;
  for_each_scene<T>([](const auto& scene, Kind kind) {
    if (scene.mask.causal == Causal::none) return;
    const auto clean = run(kind, scene.inputs());
    const Index future = scene.x.k.rows() / 2;
    for (const T poison : {test::kNaN<T>, test::kInf<T>, T(1e30), T(3)}) {
      Tokens<T> x = scene.x;
      x.k.bottomRows(x.k.rows() - future).setConstant(poison);
      x.v.bottomRows(x.v.rows() - future).setConstant(poison);
      const auto out = run<T>(kind, {.q = x.q, .k = x.k, .v = x.v, .mask = scene.mask});
      for (Index i = 0; i < out.rows(); ++i) {
        bool sees_the_future = false;
        for (Index j = future; j < x.k.rows(); ++j) sees_the_future = sees_the_future || scene.sees(i, j);
        if (!sees_the_future) {
          ASSERT_TRUE(test::same_row(out, clean, i)) << "row " << i << ", poison " << poison;
        }
      }
    }
  });
}

TYPED_TEST(Robustness, TheBiasOfAFutureKeyHasNoInfluence) {
  using T = TypeParam;
  const Scene<T> scene(70, 70, Causal::upper_left, false);
  const std::vector<T> none(70, T(0));
  for (const Kind kind : {Kind::softmax, Kind::raw_gaussian, Kind::normalized_gaussian}) {
    SCOPED_TRACE(static_cast<int>(kind));
    auto in = scene.inputs();
    in.key_bias = none;
    const auto clean = run(kind, in);
    for (const T a : {T(1), T(500), test::kNaN<T>, test::kInf<T>}) {
      auto bias = none;
      bias.back() = a;
      in.key_bias = bias;
      const auto out = run(kind, in);
      EXPECT_LE(test::relative_error(Matrix<T>(out.topRows(69)), clean.topRows(69).template cast<double>()),
                test::kExactTolerance<T>)
          << a;
    }
  }
}

/// Biases are counted from the largest of them; one that a mask drops is not among these.
TYPED_TEST(Robustness, TheBiasOfADroppedKeyHasNoInfluence) {
  using T = TypeParam;
  for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
    for (const auto& [n_q, n_k] : {std::pair<Index, Index>{40, 70}, {200, 30}}) {
      const Scene<T> scene(n_q, n_k, causal, true);
      auto bias = test::random_key_bias<T>(n_k, 0, 25);
      Inputs<T> in = scene.inputs();
      for (const Kind kind : {Kind::softmax, Kind::raw_gaussian, Kind::normalized_gaussian}) {
        in.key_bias = bias;
        const Matrix<T> clean = run(kind, in);
        for (const T poison : {T(1e9), T(-1e9), test::kNaN<T>, test::kInf<T>}) {
          auto poisoned = bias;
          for (Index j = 0; j < n_k; ++j) {
            if (!reference::kept(scene.keep_key, j)) poisoned[static_cast<std::size_t>(j)] = poison;
          }
          in.key_bias = poisoned;
          EXPECT_TRUE(test::bitwise_equal(run(kind, in), clean)) << poison << ", kind " << static_cast<int>(kind);
        }
      }
    }
  }
}

/// In every bit, whatever the key holds: origins are chosen among keys that all queries see.
TYPED_TEST(Robustness, AnyKeyStaysWithTheRowsThatSeeIt) {
  using T = TypeParam;
  for_each_small_scene<T>(3, [](const auto& scene, Kind kind) {
    const Matrix<T> clean = run(kind, scene.inputs());
    for (Index row = 0; row < scene.x.k.rows(); ++row) {
      for (const T poison : {T(3), test::kNaN<T>}) {
        Inputs<T> in = scene.inputs();
        Matrix<T> k = in.k;
        k.row(row).setConstant(poison);
        const Matrix<T> out = run<T>(kind, {.q = in.q, .k = k, .v = in.v, .mask = in.mask});
        for (Index i = 0; i < out.rows(); ++i) {
          if (scene.sees(i, row)) continue;
          ASSERT_TRUE(test::same_row(out, clean, i)) << "row " << i << ", key " << row << ", " << poison;
        }
      }
    }
  });
}

TYPED_TEST(Robustness, AKeyRemovedByItsBiasHasNoInfluence) {
  using T = TypeParam;
  for (const Kind kind : {Kind::softmax, Kind::raw_gaussian, Kind::normalized_gaussian}) {
    SCOPED_TRACE(static_cast<int>(kind));
    Scene<T> scene(40, 300, Causal::none, false);
    const auto bias = test::random_key_bias<T>(300, 0.3, 24);
    auto in = scene.inputs();  // views of what is poisoned below
    in.key_bias = bias;
    const reference::Matrix clean = run(kind, in).template cast<double>();
    for (Index j = 0; j < 300; ++j) {
      if (std::isfinite(bias[static_cast<std::size_t>(j)])) continue;
      scene.x.k.row(j).setConstant(test::kNaN<T>);
      scene.x.v.row(j).setConstant(test::kNaN<T>);
    }
    EXPECT_LE(test::relative_error(run(kind, in), clean), test::kExactTolerance<T>);
  }
}

TYPED_TEST(Robustness, ARowThatSeesNoKeyIsZero) {
  using T = TypeParam;
  for (const Kind kind : {Kind::softmax, Kind::raw_gaussian, Kind::normalized_gaussian}) {
    SCOPED_TRACE(static_cast<int>(kind));
    const Scene<T> scene(100, 61, Causal::lower_right, false);
    EXPECT_TRUE((run(kind, scene.inputs()).topRows(39).array() == T(0)).all());
    const std::vector<std::uint8_t> none(61, 0);
    auto in = scene.inputs();
    in.mask = {.keep_key = none};
    EXPECT_TRUE((run(kind, in).array() == T(0)).all());
  }
}

TYPED_TEST(Robustness, InfiniteEntriesStayInTheRowsThatSeeThem) {
  using T = TypeParam;
  for_each_scene<T>([](const auto& scene, Kind kind) {
    const auto clean = run(kind, scene.inputs());
    for (const T infinity : {test::kInf<T>, -test::kInf<T>}) {
      Tokens<T> x = scene.x;
      const Index row = x.k.rows() / 3;
      x.k(row, 4) = infinity;
      const auto out = run<T>(kind, {.q = x.q, .k = x.k, .v = x.v, .mask = scene.mask});
      for (Index i = 0; i < out.rows(); ++i) {
        if (!scene.sees(i, row)) {
          ASSERT_TRUE(test::same_row(out, clean, i)) << "row " << i;
        }
      }
      x = scene.x;
      x.q(1, 4) = infinity;
      const auto query = run<T>(kind, {.q = x.q, .k = x.k, .v = x.v, .mask = scene.mask});
      for (Index i = 0; i < out.rows(); ++i) {
        if (i != 1) {
          ASSERT_TRUE(test::same_row(query, clean, i)) << "row " << i;
        }
      }
      x = scene.x;
      x.v(row, 4) = infinity;
      const auto value = run<T>(kind, {.q = x.q, .k = x.k, .v = x.v, .mask = scene.mask});
      for (Index i = 0; i < out.rows(); ++i) {
        if (!scene.sees(i, row)) {
          ASSERT_TRUE(test::same_row(value, clean, i)) << "row " << i;
        } else if (kind == Kind::softmax) {
          ASSERT_EQ(value(i, 4), infinity) << "row " << i;
        }
      }
    }
  });
}

/// A key of infinite Gaussian distance weighs nothing; rows whose score is -infinity at one key are those of the other
/// keys.
TYPED_TEST(Robustness, LogitsBeyondTheRangeOfExpAreFinite) {
  using T = TypeParam;
  for (const T size : {T(1e4), T(1e15)}) {
    auto x = test::make_tokens<T>(Family::unit, {50, 300, 20, 6});
    x.q *= size;
    x.k *= size == T(1e4) ? T(1) : size;
    for (const Kind kind : {Kind::softmax, Kind::raw_gaussian}) {
      const auto out = run<T>(kind, {.q = x.q, .k = x.k, .v = x.v});
      ASSERT_TRUE(out.allFinite()) << size << ", kind " << static_cast<int>(kind);
      EXPECT_LE(out.cwiseAbs().maxCoeff(), x.v.cwiseAbs().maxCoeff() * (1 + T(1e-5)));
    }
  }
}

TYPED_TEST(Robustness, ConstantAndRepeatedTokens) {
  using T = TypeParam;
  auto x = test::make_tokens<T>(Family::unit, {50, 300, 20, 6});
  x.q.setConstant(T(2));
  x.k.setConstant(T(2));
  const reference::Matrix mean = x.v.template cast<double>().colwise().mean().replicate(50, 1);
  EXPECT_LE(test::relative_error(run<T>(Kind::softmax, {.q = x.q, .k = x.k, .v = x.v}), mean),
            10 * test::kExactTolerance<T>);
  EXPECT_LE(test::relative_error(run<T>(Kind::raw_gaussian, {.q = x.q, .k = x.k, .v = x.v}), 300 * mean),
            10 * test::kExactTolerance<T>);
  x.q.setZero();
  EXPECT_LE(test::relative_error(run<T>(Kind::softmax, {.q = x.q, .k = x.k, .v = x.v}), mean),
            10 * test::kExactTolerance<T>);
}

}  // namespace
