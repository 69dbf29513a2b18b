#include <attn/spectral_shift.hpp>

#include <attn/exact.hpp>
#include <attn/nystrom.hpp>

#include "common/support.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
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
    for (const double size : {-0.1, 1e-3, 0.1})
      EXPECT_GE(p.error(p.u + size * step, p.delta + size * step(0, 0)), best);
  }
}

/// delta = (tr A - tr(A^+ A^2)) / (m - rank A) has a numerator of 0 for every A, so it is 0, or 0 / 0 where A has full
/// rank.
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
    const auto error = [&](const auto& method) {
      return test::relative_error(attn::attention(method, x.q, x.k, x.v), exact);
    };
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

/// The modes' rules with every constant that they hold, over whole matrices.
struct ShiftRule {
  double least_others = 0.1, most_stretch = 2, errors = 1, alone = 2, diagonal = 1.5, reach = 2;  ///< of the row mode
  double least_available = 0.05;  ///< of the scalar mode
  double least_trace = 1e-6;      ///< of the paper mode
  double least = 0, most = 1;     ///< of a step or a shift
  Index num_probes = 32;
};

/// S, N = F Z B and v of one problem, and the modes' results by their definitions.
class DenseShift {
 public:
  DenseShift(const Dense& q, const Dense& k, const Dense& v, Index num_landmarks, int iterations = 6)
      : v_(v),
        a_(softmax_rows(reference::segment_means(q, num_landmarks), reference::segment_means(k, num_landmarks))) {
    s_ = softmax_rows(q, k);
    f_ = softmax_rows(q, reference::segment_means(k, num_landmarks));
    b_ = softmax_rows(reference::segment_means(q, num_landmarks), k);
    z_ = reference::iterated_inverse(a_, iterations);
    n_ = f_ * z_ * b_;
    exact_ = s_ * v_;
    nystrom_ = n_ * v_;
    estimate_diagonal(q, k, num_landmarks);
  }

  const Dense& exact() const { return exact_; }
  const Dense& nystrom() const { return nystrom_; }

  Dense paper(const ShiftRule& rule) const {
    const Dense residual = Dense::Identity(a_.rows(), a_.rows()) - z_ * a_;
    const double trace = residual.trace(), floor = rule.least_trace * static_cast<double>(a_.rows());
    const double delta = trace > floor ? std::clamp((residual * a_).trace() / trace, rule.least, rule.most) : 0;
    return f_ * ((z_ - delta * z_ * z_) * (b_ * v_)) + delta * v_;
  }

  Dense scalar(const ShiftRule& rule) const {
    double wanted = 0, available = 0;
    for (const Index i : probes(rule)) {
      wanted += s_(i, i) - n_(i, i);
      available += n_.row(i).sum() - n_(i, i);
    }
    const auto r = static_cast<double>(probes(rule).size());
    const double delta = std::clamp(wanted / r / std::max(available / r, rule.least_available), rule.least, rule.most);
    return (1 - delta) * nystrom() + delta * v_;
  }

  Dense row(const ShiftRule& rule) const {
    Dense moves(v_.rows(), v_.cols());
    for (Index i = 0; i < v_.rows(); ++i) moves.row(i) = full_move(rule, i);
    const Dense wanted = exact() - nystrom();
    std::vector<Term> rows, diagonal;
    double largest = 0;
    for (const Index i : probes(rule)) {
      const double g = n_(i, i);
      rows.push_back({moves.row(i).dot(wanted.row(i)), moves.row(i).squaredNorm()});
      diagonal.push_back({(own_[i] - g) * (s_(i, i) - g), (own_[i] - g) * (own_[i] - g)});
      largest = std::max(largest, wanted.row(i).norm());
    }
    double t = std::min(fit(rule, rows), rule.diagonal * fit(rule, diagonal));
    for (std::size_t j = 0; j < rows.size(); ++j) {
      std::vector<Term> others = rows;
      others.erase(others.begin() + static_cast<std::ptrdiff_t>(j));
      t = std::min(t, rule.alone * fit(rule, others));
    }
    Dense out = nystrom();
    for (Index i = 0; i < v_.rows(); ++i) {
      const double length = moves.row(i).norm();
      if (length > 0) out.row(i) += std::min(t, rule.reach * largest / length) * moves.row(i);
    }
    return out;
  }

 private:
  /// a.b and a.a of a step a and what is wanted, b.
  struct Term {
    double along, size;
  };

  std::vector<Index> probes(const ShiftRule& rule) const {
    return reference::strided_rows(v_.rows(), std::min(rule.num_probes, v_.rows()));
  }

  static double fit(const ShiftRule& rule, const std::vector<Term>& terms) {
    double along = 0, size = 0, squares = 0;
    for (const Term& x : terms) {
      along += x.along;
      size += x.size;
    }
    if (size == 0) return 0;
    for (const Term& x : terms) squares += std::pow(x.along - along / size * x.size, 2);
    const auto r = static_cast<double>(terms.size());
    return std::clamp((along - rule.errors * std::sqrt(squares * r / std::max(r - 1, 1.0))) / size, rule.least,
                      rule.most);
  }

  Eigen::RowVectorXd full_move(const ShiftRule& rule, Index i) const {
    const double g = n_(i, i), others = n_.row(i).sum() - g, s = own_[i];
    if (others <= 0) return Eigen::RowVectorXd::Zero(v_.cols());
    const Eigen::RowVectorXd y = nystrom_.row(i);
    const double alpha = (1 - s) / others;
    const double part = std::min(1.0, others / rule.least_others) *
                        (alpha > rule.most_stretch ? (rule.most_stretch - 1) / (alpha - 1) : 1.0);
    return part * (alpha * (y - g * v_.row(i)) + s * v_.row(i) - y);
  }

  /// S_ii ~ e_i / (e_i + sum_c w_ic l_c exp(s q_i.mean_c + s^2 / 2 sum_a q_ia^2 var_ca)).
  void estimate_diagonal(const Dense& q, const Dense& k, Index m) {
    const Index n = q.rows();
    const double scale = 1 / std::sqrt(static_cast<double>(q.cols()));
    Eigen::VectorXd others = Eigen::VectorXd::Zero(n);
    for (Index c = 0, first = 0; c < m; ++c) {
      const Index length = n / m + (c >= m - n % m ? 1 : 0);
      const Dense segment = k.middleRows(first, length);
      const Eigen::VectorXd mean = segment.colwise().mean();
      const Eigen::VectorXd variance = (segment.rowwise() - mean.transpose()).array().square().colwise().mean();
      for (Index i = 0; i < n; ++i) {
        const bool owns = i >= first && i < first + length;
        const double score = scale * q.row(i).dot(mean) + scale * scale / 2 * q.row(i).cwiseAbs2().dot(variance);
        others[i] += static_cast<double>(owns ? length - 1 : length) * std::exp(score - scale * q.row(i).dot(k.row(i)));
      }
      first += length;
    }
    own_ = (1 + others.array()).inverse();
  }

  Dense v_, a_, s_, f_, b_, z_, n_, exact_, nystrom_;
  Eigen::VectorXd own_;  // the estimate of S's diagonal
};

TEST(ShiftedNystromErrors, NeverMuchAboveNystromsOwn) {
  test::Random random(221);
  const auto one_of = [&](std::initializer_list<Index> choices) {
    return choices.begin()[random.below(std::ssize(choices))];
  };
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const Family family = test::kFamilies[seed % std::size(test::kFamilies)];
    const Index n = 128 + random.below(193), m = one_of({8, 12, 16, 31, 64}), d = one_of({8, 16, 32, 64});
    const test::Shape shape{n, n, d, one_of({16, 24, 48})};
    const bool clustered = family == Family::clusters;
    const Errors errors(
        clustered ? paired_clusters(shape, 1000 + seed) : test::make_tokens<double>(family, shape, 1000 + seed), m);
    const std::string configuration = "seed " + std::to_string(seed) + ", n " + std::to_string(n) + ", m " +
                                      std::to_string(m) + ", d " + std::to_string(d) + ", d_v " +
                                      std::to_string(shape.d_v);
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
      const ShiftedNystrom<T> method(SegmentMeans{.num_landmarks = 16},
                                     SpectralShift{.mode = mode, .num_probes = probes});
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
  const Matrix<T> q = x.q(rows, Eigen::indexing::all), k = x.k(rows, Eigen::indexing::all),
                  v = x.v(rows, Eigen::indexing::all);
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

/// Values that probed rows may not speak for.
Dense hard_values(int kind, Index n, std::uint64_t seed) {
  test::Random random(seed);
  if (kind == 0) return Dense::Ones(n, 1);
  if (kind == 1) return random.normal(n, 12);
  if (kind == 2) return 10 + random.normal(n, 12).array();
  if (kind == 3) return Dense::Identity(n, n).rightCols(7);
  Dense tailed = random.normal(n, 3);
  return tailed.array().cube() * tailed.array().square();
}

/// Tokens times size, seeded.
struct RuleCase {
  Family family;
  double size;
  Index n, m, d;
  int values, iterations;
  std::uint64_t seed;
};

/// Such that every constant of every mode changes the result of at least one.
constexpr RuleCase kRuleCases[] = {
    {Family::self, 1, 150, 16, 8, 1, 6, 261},    {Family::self, 3, 200, 16, 8, 0, 6, 262},
    {Family::smooth, 1, 150, 16, 8, 1, 6, 270},  {Family::clusters, 1, 150, 16, 8, 1, 6, 267},
    {Family::clusters, 3, 122, 32, 16, 2, 6, 4}, {Family::clusters, 5, 114, 36, 8, 2, 6, 24},
    {Family::clusters, 5, 119, 32, 4, 2, 6, 64}, {Family::init, 5, 51, 36, 4, 2, 6, 15},
    {Family::self, 1, 52, 32, 8, 3, 6, 141},     {Family::self, 2, 45, 36, 16, 3, 6, 23},
    {Family::self, 6, 60, 59, 16, 1, 6, 204},    {Family::self, 2, 66, 64, 16, 1, 1, 1093},
    {Family::self, 3, 56, 8, 4, 1, 9, 118},      {Family::clusters, 2, 31, 8, 8, 1, 9, 123},
};

Tokens<double> tokens_of(const RuleCase& c) {
  const auto x = test::make_tokens<double>(c.family, {c.n, c.n, c.d, 1}, c.seed);
  return {c.size * x.q, c.size * x.k, hard_values(c.values, c.n, c.seed + 100)};
}

Dense by_rule(const DenseShift& dense, ShiftMode mode, const ShiftRule& rule) {
  if (mode == ShiftMode::paper) return dense.paper(rule);
  return mode == ShiftMode::scalar ? dense.scalar(rule) : dense.row(rule);
}

TEST(ShiftRules, AreTheLibrarys) {
  for (const RuleCase& c : kRuleCases) {
    const Tokens<double> x = tokens_of(c);
    const DenseShift dense(x.q, x.k, x.v, c.m, c.iterations);
    for (const ShiftMode mode : {ShiftMode::paper, ShiftMode::scalar, ShiftMode::row}) {
      const SpectralShift shift{.mode = mode, .iterations = c.iterations};
      const Dense out =
          attn::attention(ShiftedNystrom<double>(SegmentMeans{.num_landmarks = c.m}, shift), x.q, x.k, x.v);
      EXPECT_LE(test::relative_error(out, by_rule(dense, mode, {})), 1e-8)
          << "seed " << c.seed << ", mode " << static_cast<int>(mode);
    }
  }
}

/// So that the test above fails where one of the library's is another.
TEST(ShiftRules, HaveNoConstantThatTheseCasesDoNotShow) {
  using enum ShiftMode;
  struct Change {
    ShiftMode mode;
    const char* what;
    ShiftRule rule;
    double effect = 0;
  };
  Change changes[] = {{row, "least_others", {.least_others = 0.11}},
                      {row, "most_stretch", {.most_stretch = 2.1}},
                      {row, "errors", {.errors = 1.1}},
                      {row, "alone", {.alone = 2.1}},
                      {row, "diagonal", {.diagonal = 1.6}},
                      {row, "reach", {.reach = 2.1}},
                      {row, "least", {.least = -1}},
                      {row, "most", {.most = 1.1}},
                      {row, "num_probes", {.num_probes = 31}},
                      {scalar, "least_available", {.least_available = 0.06}},
                      {scalar, "least", {.least = -1}},
                      {scalar, "most", {.most = 1.1}},
                      {scalar, "num_probes", {.num_probes = 31}},
                      {paper, "a smaller least_trace", {.least_trace = 5e-7}},
                      {paper, "a larger least_trace", {.least_trace = 2e-6}},
                      {paper, "least", {.least = -1}}};
  for (const RuleCase& c : kRuleCases) {
    const Tokens<double> x = tokens_of(c);
    const DenseShift dense(x.q, x.k, x.v, c.m, c.iterations);
    for (Change& change : changes) {
      const Dense expected = by_rule(dense, change.mode, {});
      change.effect = std::max(change.effect, test::relative_error(by_rule(dense, change.mode, change.rule), expected));
    }
  }
  for (const Change& change : changes)
    EXPECT_GT(change.effect, 1e-5) << change.what << " in mode " << static_cast<int>(change.mode);
}

/// Values of which Nystrom gives each row its own sum, or of which probed rows see little: what N had is not lost.
TEST(ShiftedNystromErrors, StayNearNystromsOwnForHardValues) {
  for (const double size : {1.0, 2.0, 3.0, 5.0}) {
    for (const Index d : {Index{8}, Index{32}}) {
      for (int values = 0; values < 5; ++values) {
        auto x = test::scaled(
            test::make_tokens<double>(Family::self, {200, 200, d, 1}, 280 + static_cast<std::uint64_t>(values)), size);
        x.v = hard_values(values, 200, 290);
        const DenseShift dense(x.q, x.k, x.v, 16);
        const double nystrom = test::relative_error(dense.nystrom(), dense.exact());
        for (const ShiftMode mode : {ShiftMode::scalar, ShiftMode::row}) {
          if (mode == ShiftMode::scalar && values > 2)
            continue;  // one shift for all rows is not for values in few of them
          const Dense out = attn::attention(shifted<double>(16, mode), x.q, x.k, x.v);
          EXPECT_LE(test::relative_error(out, dense.exact()), 1.01 * nystrom + 1e-14)
              << "size " << size << ", d " << d << ", values " << values << ", mode " << static_cast<int>(mode);
        }
      }
    }
  }
}

/// Of values that are the same in all rows: no row's sum is further from 1 than Nystrom's.
TYPED_TEST(ShiftedNystromOf, LosesNothingOfConstantValues) {
  using T = TypeParam;
  for (const double size : {1.0, 3.0}) {
    for (const Index d : {Index{4}, Index{8}, Index{32}}) {
      for (std::uint64_t seed = 300; seed < 310; ++seed) {
        auto x = test::scaled(test::make_tokens<T>(Family::self, {200, 200, d, 1}, seed), size);
        x.v.setOnes();
        const Matrix<T> plain = attn::attention(Nystrom<T>(SegmentMeans{.num_landmarks = 16}), x.q, x.k, x.v);
        const Matrix<T> out = attn::attention(shifted<T>(16, ShiftMode::row), x.q, x.k, x.v);
        const auto missing = [](const Matrix<T>& y) { return (y.array() - T(1)).abs().eval(); };
        EXPECT_LE((missing(out) - missing(plain)).maxCoeff(), sizeof(T) == 4 ? 1e-5 : 1e-13)
            << "seed " << seed << ", d " << d;
      }
    }
  }
}

/// The values' size is a factor of the result and nothing else, whatever it is; columns may differ in it.
TYPED_TEST(ShiftedNystromOf, IsTheSameForValuesOfAnySize) {
  using T = TypeParam;
  const auto x = test::make_tokens<T>(Family::self, {150, 150, 16, 20}, 238);
  for (const ShiftMode mode : {ShiftMode::paper, ShiftMode::scalar, ShiftMode::row}) {
    const Matrix<T> expected = attn::attention(shifted<T>(16, mode), x.q, x.k, x.v);
    for (const int exponent :
         sizeof(T) == 4 ? std::vector<int>{-120, -60, 34, 60, 100, 120} : std::vector<int>{-1000, -300, 300, 1000}) {
      const T size = std::ldexp(T(1), exponent);
      const Matrix<T> scaled = attn::attention(shifted<T>(16, mode), x.q, x.k, Matrix<T>(size * x.v));
      EXPECT_LE(test::relative_error(Matrix<T>(scaled / size), expected.template cast<double>()),
                sizeof(T) == 4 ? 1e-6 : 1e-14)
          << "2^" << exponent << ", mode " << static_cast<int>(mode);
    }
  }
}

TYPED_TEST(ShiftedNystromOf, SeesTheLargestColumnsWhereTheirSizesDiffer) {
  using T = TypeParam;
  auto x = test::make_tokens<T>(Family::self, {150, 150, 16, 20}, 239);
  const Matrix<T> expected = attn::attention(shifted<T>(16, ShiftMode::row), x.q, x.k, Matrix<T>(x.v.leftCols(10)));
  x.v.rightCols(10) *= std::ldexp(T(1), sizeof(T) == 4 ? -100 : -900);
  x.v.leftCols(10) *= std::ldexp(T(1), 20);
  const Matrix<T> out = attn::attention(shifted<T>(16, ShiftMode::row), x.q, x.k, x.v);
  EXPECT_LE(test::relative_error(Matrix<T>(out.leftCols(10) * std::ldexp(T(1), -20)), expected.template cast<double>()),
            sizeof(T) == 4 ? 1e-6 : 1e-14);
}

/// Where tr(I - Z A) is as small as what float rounds away, and where more steps leave none of it.
TEST(PaperShift, InFloatIsAsInDouble) {
  for (const Family family : test::kFamilies) {
    for (const double size : {1.0, 2.0, 4.0}) {
      for (const int iterations : {6, 10, 12}) {
        const auto x = test::scaled(test::make_tokens<float>(family, {64, 64, 8, 4}, 7), size);
        const SpectralShift shift{.mode = ShiftMode::paper, .iterations = iterations};
        const Dense q = x.q.cast<double>(), k = x.k.cast<double>(), v = x.v.cast<double>();
        const Matrix<float> out =
            attn::attention(ShiftedNystrom<float>(SegmentMeans{.num_landmarks = 8}, shift), x.q, x.k, x.v);
        EXPECT_LE(test::relative_error(out, DenseShift(q, k, v, 8, iterations).paper({})), 1e-4)
            << "size " << size << ", " << iterations << " iterations";
      }
    }
  }
}

template <class Method>
std::string error_of(const Method& method, Index n_q, Index n_k, const Mask& mask = {},
                     const std::vector<float>& key_bias = {}) {
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
    EXPECT_EQ(error_of(ShiftedNystrom<float>{}, 6, 6, {.causal = causal}),
              "shifted-nystrom: causal masks are not supported");
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
