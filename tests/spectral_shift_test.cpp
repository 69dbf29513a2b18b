#include <attn/spectral_shift.hpp>

#include <attn/exact.hpp>
#include <attn/nystrom.hpp>

#include "support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using attn::Nystrom;
using attn::SegmentMeans;
using attn::ShiftedNystrom;
using attn::ShiftMode;
using attn::SoftmaxAttention;
using attn::SpectralShift;
using reference::pseudo_inverse;
using test::Context;
using test::error_of;
using test::Family;
using test::Index;
using test::Inputs;
using test::Mask;
using test::Matrix;
using test::Tokens;

using Dense = Matrix<double>;

Dense random_matrix(Index rows, Index cols, std::uint64_t seed) {
  return test::Random(seed).normal(rows, cols);
}

/// Rows of softmax attention between two sets of tokens.
Dense softmax_rows(const Dense& q, const Dense& k) {
  return reference::attend(reference::softmax_kernel(q.cols()), {q, k, Dense::Identity(k.rows(), k.rows())}).out;
}

Dense means_of_four(const Dense& x) {
  Dense means(x.rows() / 4, x.cols());
  for (Index j = 0; j < means.rows(); ++j) means.row(j) = x.middleRows(4 * j, 4).colwise().mean();
  return means;
}

/// |S - F U B - delta I|_F^2 over all U and delta, for a Nystrom approximation of softmax attention.
struct ShiftProblem {
  explicit ShiftProblem(Family family) {
    const auto x = test::make_tokens<double>(family, {24, 24, 8, 1}, 201);
    s = softmax_rows(x.q, x.k);
    f = softmax_rows(x.q, means_of_four(x.k));
    b = softmax_rows(means_of_four(x.q), x.k);
    onto_f = f * pseudo_inverse(f);
    onto_b = pseudo_inverse(b) * b;
    room = 24 - (onto_f * onto_b).trace();
    delta = (s.trace() - (onto_f * s * onto_b).trace()) / room;
    u = pseudo_inverse(f) * (s - delta * eye) * pseudo_inverse(b);
  }

  double error(const Dense& u_, double delta_) const { return (s - f * u_ * b - delta_ * eye).squaredNorm(); }

  Dense s, f, b, onto_f, onto_b, u, eye = Dense::Identity(24, 24);
  double room = 0, delta = 0;
};

TEST(OptimalShift, HasTheErrorOfItsFormula) {
  for (const Family family : test::kFamilies) {
    const ShiftProblem p(family);
    const double unshifted = (p.s - p.onto_f * p.s * p.onto_b).squaredNorm();
    EXPECT_NEAR(p.error(p.u, p.delta), unshifted - p.delta * p.delta * p.room, 1e-10);
    EXPECT_LE(p.error(p.u, p.delta), unshifted);
  }
}

TEST(OptimalShift, IsTheLeastSquaresSolution) {
  for (const Family family : test::kFamilies) {
    const ShiftProblem p(family);
    const Index n = 24, m = p.f.cols();
    Dense columns(n * n, m * m + 1);  // what each entry of U, and delta, adds to the approximation
    for (Index i = 0; i < m; ++i) {
      for (Index j = 0; j < m; ++j) {
        const Dense outer = p.f.col(i) * p.b.row(j);
        columns.col(i * m + j) = outer.reshaped<Eigen::RowMajor>();
      }
    }
    columns.col(m * m) = p.eye.reshaped<Eigen::RowMajor>();
    const Eigen::VectorXd target = p.s.reshaped<Eigen::RowMajor>();
    const Eigen::VectorXd solution = reference::least_squares(columns, target);
    EXPECT_NEAR(solution[m * m], p.delta, 1e-8);
    EXPECT_NEAR((columns * solution - target).squaredNorm(), p.error(p.u, p.delta), 1e-10);
  }
}

TEST(OptimalShift, IsNeverBeatenNearby) {
  const ShiftProblem p(Family::self);
  EXPECT_GT(p.delta, 0.1) << "diagonal attention wants a shift";
  const double best = p.error(p.u, p.delta);
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const Dense step = random_matrix(p.u.rows(), p.u.cols(), seed);
    for (const double size : {-0.1, 1e-3, 0.1}) EXPECT_GE(p.error(p.u + size * step, p.delta + size * step(0, 0)), best);
  }
}

/// delta = (tr A - tr(A^+ A^2)) / (m - rank A) has a numerator of 0 for every A, so it is 0, or 0 / 0 where A has full rank.
TEST(RecalledFormula, IsZeroOrUndefined) {
  constexpr Index m = 12;
  for (Index rank = 1; rank <= m; ++rank) {
    const Dense a = random_matrix(m, rank, 211) * random_matrix(rank, m, 212);
    EXPECT_NEAR((pseudo_inverse(a) * a * a).trace(), a.trace(), 1e-9 * a.norm()) << "rank " << rank;
  }
  const auto x = test::make_tokens<double>(Family::unit, {m, m, 16, 1}, 213);
  const Dense a = softmax_rows(x.q, x.k);
  EXPECT_NEAR((pseudo_inverse(a) * a * a).trace(), a.trace(), 1e-9);
  EXPECT_EQ(reference::rank(a), m) << "the divisor is 0 too";
}

template <class T>
ShiftedNystrom<T> shifted(Index num_landmarks, ShiftMode mode) {
  return ShiftedNystrom<T>(SegmentMeans{.num_landmarks = num_landmarks}, SpectralShift{.mode = mode});
}

/// Relative errors against exact attention.
struct Errors {
  template <class T>
  Errors(const Tokens<T>& x, Index num_landmarks) {
    const Dense exact = attn::attention(SoftmaxAttention<T>{}, x.q, x.k, x.v).template cast<double>();
    const auto error = [&](const auto& method) { return test::relative_error(attn::attention(method, x.q, x.k, x.v), exact); };
    nystrom = error(Nystrom<T>(SegmentMeans{.num_landmarks = num_landmarks}));
    scalar = error(shifted<T>(num_landmarks, ShiftMode::scalar));
    row = error(shifted<T>(num_landmarks, ShiftMode::row));
  }

  double nystrom, scalar, row;
};

/// 32 clusters of about equal size, query i and key i in the same one.
Tokens<double> paired_clusters(const test::Shape& s, std::uint64_t seed) {
  test::Random random(seed);
  const Dense centres = 1.2 * random.normal(32, s.d);
  Tokens<double> x{0.4 * random.normal(s.n_q, s.d), 0.4 * random.normal(s.n_q, s.d), random.normal(s.n_q, s.d_v)};
  std::vector<Index> cluster(static_cast<std::size_t>(s.n_q));
  for (Index i = 0; i < s.n_q; ++i) {
    const auto at = static_cast<std::size_t>(i), other = static_cast<std::size_t>(random.below(i + 1));
    cluster[at] = cluster[other];
    cluster[other] = i % 32;
  }
  x.q += centres(cluster, Eigen::indexing::all);
  x.k += centres(cluster, Eigen::indexing::all);
  return x;
}

TEST(ShiftedNystromErrors, NeverMuchAboveNystromsOwn) {
  test::Random random(221);
  const auto one_of = [&](std::initializer_list<Index> choices) { return choices.begin()[random.below(std::ssize(choices))]; };
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const Family family = test::kFamilies[seed % std::size(test::kFamilies)];
    const Index n = 128 + random.below(193), m = one_of({8, 12, 16, 31, 64}), d = one_of({8, 16, 32, 64});
    const test::Shape shape{n, n, d, one_of({16, 24, 48})};
    const bool clustered = family == Family::clusters;
    const Errors errors(clustered ? paired_clusters(shape, 1000 + seed) : test::make_tokens<double>(family, shape, 1000 + seed), m);
    const std::string configuration = "seed " + std::to_string(seed) + ", n " + std::to_string(n) + ", m " + std::to_string(m) +
                                      ", d " + std::to_string(d) + ", d_v " + std::to_string(shape.d_v);
    EXPECT_LE(errors.scalar, 1.01 * errors.nystrom) << configuration;
    EXPECT_LE(errors.row, 1.01 * errors.nystrom) << configuration;
  }
}

template <class T>
class ShiftedNystromOf : public ::testing::Test {};
TYPED_TEST_SUITE(ShiftedNystromOf, test::Scalars);

TYPED_TEST(ShiftedNystromOf, RescuesAttentionToItself) {
  const Errors errors(test::make_tokens<TypeParam>(Family::self, {1024, 1024, 64, 64}, 13), 64);
  EXPECT_GT(errors.nystrom, 0.95);
  EXPECT_LT(errors.scalar, errors.nystrom / 2);
  EXPECT_LT(errors.row, 0.05);
}

TYPED_TEST(ShiftedNystromOf, ScalarShiftKeepsUnitRowSums) {
  using T = TypeParam;
  auto x = test::make_tokens<T>(Family::self, {200, 200, 16, 1}, 231);
  x.v.setOnes();
  const Matrix<T> plain = attn::attention(Nystrom<T>(SegmentMeans{.num_landmarks = 16}), x.q, x.k, x.v);
  const Matrix<T> out = attn::attention(shifted<T>(16, ShiftMode::scalar), x.q, x.k, x.v);
  EXPECT_LE((out.array() - T(1)).abs().maxCoeff(), (plain.array() - T(1)).abs().maxCoeff() + T(1e-5));
}

TYPED_TEST(ShiftedNystromOf, TakesAnyNumberOfProbes) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::self, {150, 150, 16, 20}, 232);
  const Dense exact = attn::attention(SoftmaxAttention<T>{}, x.q, x.k, x.v).template cast<double>();
  const double unshifted =
      test::relative_error(attn::attention(Nystrom<T>(SegmentMeans{.num_landmarks = 16}), x.q, x.k, x.v), exact);
  for (const ShiftMode mode : {ShiftMode::scalar, ShiftMode::row}) {
    for (const int probes : {1, 2, 33, 150, 1000}) {
      const ShiftedNystrom<T> method(SegmentMeans{.num_landmarks = 16}, SpectralShift{.mode = mode, .num_probes = probes});
      const Matrix<T> out = attn::attention(method, x.q, x.k, x.v);
      ASSERT_TRUE(out.allFinite());
      EXPECT_LE(test::relative_error(out, exact), 1.05 * unshifted) << probes << " probes";
    }
  }
}

TYPED_TEST(ShiftedNystromOf, IsExactWhenTheLandmarksSuffice) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::unit, {60, 60, 16, 7}, 233);
  const Matrix<T> exact = attn::attention(SoftmaxAttention<T>{}, x.q, x.k, x.v);
  for (const ShiftMode mode : {ShiftMode::paper, ShiftMode::scalar, ShiftMode::row}) {
    for (const Index m : {60, 61, 500}) {
      EXPECT_TRUE(test::bitwise_equal(attn::attention(shifted<T>(m, mode), x.q, x.k, x.v), exact)) << m;
    }
  }
}

/// Every mode's masked result is the trimmed sequence's, wherever the dropped tokens stand.
TYPED_TEST(ShiftedNystromOf, SeesKeptTokensAlone) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::self, {180, 180, 16, 20}, 234);
  const auto keep = test::random_keep(180, 0.6, 235);
  std::vector<Index> rows;
  for (Index i = 0; i < 180; ++i) {
    if (reference::kept(keep, i)) rows.push_back(i);
  }
  const Matrix<T> q = x.q(rows, Eigen::indexing::all), k = x.k(rows, Eigen::indexing::all), v = x.v(rows, Eigen::indexing::all);
  for (const ShiftMode mode : {ShiftMode::paper, ShiftMode::scalar, ShiftMode::row}) {
    const Matrix<T> out = attn::attention(shifted<T>(13, mode), x.q, x.k, x.v, {.keep_key = keep, .keep_query = keep});
    const Matrix<T> trimmed = attn::attention(shifted<T>(13, mode), q, k, v), kept = out(rows, Eigen::indexing::all);
    EXPECT_LE(test::relative_error(kept, trimmed.template cast<double>()), sizeof(T) == 4 ? 1e-5 : 1e-12);
  }
}

/// In scalar and paper mode the result is linear in v; in row mode the gate depends on v, but not on its size.
TYPED_TEST(ShiftedNystromOf, ScalesWithTheValues) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::self, {140, 140, 16, 20}, 236);
  const Matrix<T> four_times = T(4) * x.v;
  for (const ShiftMode mode : {ShiftMode::paper, ShiftMode::scalar, ShiftMode::row}) {
    const Matrix<T> expected = T(4) * attn::attention(shifted<T>(16, mode), x.q, x.k, x.v);
    EXPECT_TRUE(test::bitwise_equal(attn::attention(shifted<T>(16, mode), x.q, x.k, four_times), expected));
  }
}

/// In row mode rows are treated some thousands at a time.
TYPED_TEST(ShiftedNystromOf, TakesLongSequencesInParts) {
  const Errors errors(test::make_tokens<TypeParam>(Family::self, {2500, 2500, 64, 16}, 237), 40);
  EXPECT_LT(errors.row, 0.1);
}

template <class Method>
std::string error_of(const Method& method, Index n_q, Index n_k, const Mask& mask = {}, const std::vector<float>& key_bias = {}) {
  const Matrix<float> q = Matrix<float>::Zero(n_q, 4), k = Matrix<float>::Zero(n_k, 4), v = Matrix<float>::Zero(n_k, 3);
  Matrix<float> out(n_q, 3);
  Context context;
  const Inputs<float> in{.q = q, .k = k, .v = v, .mask = mask, .key_bias = key_bias};
  const std::string error = error_of([&] { method.forward(in, out, context); });
  EXPECT_EQ(error == "no error", method.supports(in));
  return error;
}

TEST(ShiftedNystromRefuses, UnequalLengthsAndMasks) {
  const ShiftedNystrom<float> method;
  const std::vector<std::uint8_t> some{1, 0, 1, 1, 0, 1}, same{9, 0, 2, 1, 0, 1}, other{1, 0, 1, 1, 1, 1};
  EXPECT_EQ(error_of(method, 6, 6), "no error");
  EXPECT_EQ(error_of(method, 6, 6, {.keep_key = some, .keep_query = same}), "no error");
  EXPECT_EQ(error_of(method, 5, 6), "shifted-nystrom: q has 5 rows, k has 6, should be as many");
  const std::string differ = "shifted-nystrom: keep_query and keep_key differ, should be equal";
  EXPECT_EQ(error_of(method, 6, 6, {.keep_key = some, .keep_query = other}), differ);
  EXPECT_EQ(error_of(method, 6, 6, {.keep_key = some}), differ);
  EXPECT_EQ(error_of(method, 6, 6, {.keep_query = some}), differ);
}

TEST(ShiftedNystromRefuses, CausalMasksAndBiases) {
  const std::vector<float> bias(6, 0.0F);
  for (const auto causal : {attn::Causal::upper_left, attn::Causal::lower_right}) {
    EXPECT_EQ(error_of(ShiftedNystrom<float>{}, 6, 6, {.causal = causal}), "shifted-nystrom: causal masks are not supported");
    EXPECT_EQ(error_of(Nystrom<float>{}, 6, 6, {.causal = causal}), "nystrom: causal masks are not supported");
  }
  EXPECT_EQ(error_of(ShiftedNystrom<float>{}, 6, 6, {}, bias), "shifted-nystrom: key biases are not supported");
  EXPECT_EQ(error_of(Nystrom<float>{}, 6, 6, {}, bias), "nystrom: key biases are not supported");
}

TEST(ShiftedNystromRefuses, OptionsOutOfRange) {
  const Matrix<float> x = Matrix<float>::Zero(6, 4);
  const auto text = [&](Index num_landmarks, const SpectralShift& shift) {
    return error_of([&] { attn::attention(ShiftedNystrom<float>(SegmentMeans{num_landmarks}, shift), x, x, x); });
  };
  EXPECT_EQ(text(0, {}), "shifted-nystrom: num_landmarks is 0, should be at least 1");
  EXPECT_EQ(text(2, {.iterations = 0}), "shifted-nystrom: iterations is 0, should be at least 1");
  EXPECT_EQ(text(2, {.num_probes = 0}), "shifted-nystrom: num_probes is 0, should be at least 1");
}

}  // namespace
