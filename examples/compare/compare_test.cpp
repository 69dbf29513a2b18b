#include "compare/mean_of_values.hpp"
#include "compare/measure.hpp"
#include "compare/methods.hpp"
#include "compare/recommend.hpp"
#include "compare/report.hpp"
#include "compare/sequences.hpp"

#include <attn/attn.hpp>

#include "common/npy_file.hpp"
#include "common/reference.hpp"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using attn::Causal;
using attn::Index;
using attn::Matrix;
using test::bytes_of;
using test::npy_header;
using test::NpyFile;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// count numbers that all differ, in [-1, 1].
std::vector<float> numbers(Index count, float seed) {
  std::vector<float> x;
  for (Index i = 0; i < count; ++i) x.push_back(std::sin(seed + static_cast<float>(i)));
  return x;
}

NpyFile float_file(const std::string& shape, const std::vector<float>& values) {
  return NpyFile(npy_header("<f4", "False", shape), bytes_of(values));
}

Options options_for(const NpyFile& q, const NpyFile& k, const NpyFile& v) {
  Options options;
  options.q = q.path().string();
  options.k = k.path().string();
  options.v = v.path().string();
  options.landmarks = {4};
  options.near = {4};
  options.repetitions = 1;
  return options;
}

std::string error_of(const Options& options) {
  try {
    load(options);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

TEST(Sequences, OfSeveralHeadsAreViewsOfTheFiles) {
  const auto q_values = numbers(2 * 4 * 5 * 3, 0), k_values = numbers(2 * 2 * 6 * 3, 1),
             v_values = numbers(2 * 2 * 6 * 7, 2);
  const NpyFile q = float_file("(2, 4, 5, 3)", q_values), k = float_file("(2, 2, 6, 3)", k_values),
                v = float_file("(2, 2, 6, 7)", v_values);
  const Sequences s = load(options_for(q, k, v));
  ASSERT_EQ(s.num_heads(), 8);
  for (Index head = 0; head < 8; ++head) {
    const attn::Inputs<float> in = s.inputs(head);
    const Index of_k = head / 2;  // two heads of q for each of k, in either batch item
    EXPECT_EQ(in.q, Eigen::Map<const Matrix<float>>(q_values.data() + head * 15, 5, 3));
    EXPECT_EQ(in.k, Eigen::Map<const Matrix<float>>(k_values.data() + of_k * 18, 6, 3));
    EXPECT_EQ(in.v, Eigen::Map<const Matrix<float>>(v_values.data() + of_k * 42, 6, 7));
    EXPECT_TRUE(in.mask.keep_key.empty() && in.mask.keep_query.empty());
  }
}

TEST(Sequences, TakeAMaskForAllOrForEachBatchItem) {
  const NpyFile x = float_file("(2, 1, 3, 2)", numbers(12, 0)), longer = float_file("(2, 1, 4, 2)", numbers(16, 0));
  Options options = options_for(x, x, x);
  const auto keep_of = [&](Index head) {
    const Sequences s = load(options);
    const attn::Mask mask = s.inputs(head).mask;
    EXPECT_EQ(std::vector(mask.keep_key.begin(), mask.keep_key.end()),
              std::vector(mask.keep_query.begin(), mask.keep_query.end()));
    return std::vector<std::uint8_t>(mask.keep_key.begin(), mask.keep_key.end());
  };
  const NpyFile shared(npy_header("|b1", "False", "(3,)"), bytes_of<std::uint8_t>({1, 0, 1}));
  options.mask = shared.path().string();
  EXPECT_EQ(keep_of(0), (std::vector<std::uint8_t>{1, 0, 1}));
  EXPECT_EQ(keep_of(1), (std::vector<std::uint8_t>{1, 0, 1}));
  const NpyFile each(npy_header("<i8", "False", "(2, 3)"), bytes_of<std::int64_t>({1, 0, 1, 0, 1, -1}));
  options.mask = each.path().string();
  EXPECT_EQ(keep_of(0), (std::vector<std::uint8_t>{1, 0, 1}));
  EXPECT_EQ(keep_of(1), (std::vector<std::uint8_t>{0, 1, 1}));
  options.mask.reset();
  options.keep_length = 2;
  EXPECT_EQ(keep_of(1), (std::vector<std::uint8_t>{1, 1, 0}));
  const Sequences cross = load([&] {
    Options other = options_for(longer, x, x);
    other.keep_length = 2;
    return other;
  }());
  EXPECT_EQ(cross.inputs(1).mask.keep_key.size(), 3U);
  EXPECT_TRUE(cross.inputs(1).mask.keep_query.empty());
}

/// The tokens of three that a mask keeps, or what load says of it.
struct ReadMask {
  ReadMask(const std::string& type, const std::string& bytes) {
    const NpyFile x = float_file("(3, 2)", numbers(6, 0)), mask(npy_header(type, "False", "(3,)"), bytes);
    Options options = options_for(x, x, x);
    options.mask = mask.path().string();
    try {
      keep = load(options).keep;
    } catch (const std::runtime_error& e) {
      error = std::string(e.what()).substr(options.mask->size());
    }
  }

  std::vector<std::uint8_t> keep;
  std::string error;
};

TEST(Masks, OfBooleansAndIntegersDropZeros) {
  const std::vector<std::uint8_t> kept{1, 0, 1};
  EXPECT_EQ(ReadMask("|b1", bytes_of<std::uint8_t>({1, 0, 1})).keep, kept);
  EXPECT_EQ(ReadMask("|u1", bytes_of<std::uint8_t>({1, 0, 255})).keep, kept);
  EXPECT_EQ(ReadMask("<i4", bytes_of<std::int32_t>({1, 0, 2})).keep, kept);
  EXPECT_EQ(ReadMask("<i8", bytes_of<std::int64_t>({1, 0, -1})).keep, kept);
  EXPECT_EQ(ReadMask("|b1", bytes_of<std::uint8_t>({0, 0, 0})).keep, (std::vector<std::uint8_t>{0, 0, 0}));
}

TEST(Masks, OfFloatsAreUnderstoodByTheirValues) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const std::vector<std::uint8_t> kept{1, 0, 1};
  EXPECT_EQ(ReadMask("<f4", bytes_of<float>({1, 0, 1})).keep, kept);
  EXPECT_EQ(ReadMask("<f4", bytes_of<float>({1, 1, 1})).keep, (std::vector<std::uint8_t>{1, 1, 1}));
  for (const double dropped : {-kInfinity, -1e4, -65504.0, -1e9, std::numeric_limits<double>::lowest()}) {
    EXPECT_EQ(ReadMask("<f8", bytes_of<double>({0, dropped, 0})).keep, kept) << dropped;
    EXPECT_EQ(ReadMask("<f4", bytes_of<float>({0, static_cast<float>(std::max(dropped, -3.4e38)), -0.0F})).keep, kept)
        << dropped;
  }
  EXPECT_EQ(ReadMask("<f4", bytes_of<float>({0, -std::numeric_limits<float>::infinity(), 0})).keep, kept);
  EXPECT_EQ(ReadMask("<f2", bytes_of<std::uint16_t>({0, 0xfc00, 0})).keep, kept);
  EXPECT_EQ(ReadMask("<f8", bytes_of<double>({-kInfinity, -kInfinity, -kInfinity})).keep,
            (std::vector<std::uint8_t>{0, 0, 0}));
}

TEST(Masks, ThatCouldMeanEitherAreRefused) {
  const std::string expected =
      ": expected a mask of 1 to keep and 0 to drop, or of floating-point 0 to keep and -infinity, or at most -10000, "
      "to drop, found ";
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(ReadMask("<f4", bytes_of<float>({0, 0, 0})).error, expected + "zeros alone, which could be either");
  EXPECT_EQ(ReadMask("<f4", bytes_of<float>({0, 0.5F, 1})).error, expected + "0.5");
  EXPECT_EQ(ReadMask("<f4", bytes_of<float>({0, -1, 0})).error, expected + "-1");
  EXPECT_EQ(ReadMask("<f4", bytes_of<float>({0, -9999, 0})).error, expected + "-9999");
  EXPECT_EQ(ReadMask("<f4", bytes_of<float>({0, 1, -kInfinity})).error, expected + "-inf");
  EXPECT_EQ(ReadMask("<f4", bytes_of<float>({0, 1, kInfinity})).error, expected + "inf");
  EXPECT_EQ(ReadMask("<f8", bytes_of<double>({0, 1e-300, 1})).error, expected + "1e-300");
  EXPECT_EQ(ReadMask("<i8", bytes_of<std::int64_t>({0, -10000, 0})).error, expected + "-10000");
  EXPECT_EQ(ReadMask("<f4", bytes_of<float>({0, kNaN, 0})).error, ": expected numbers, found NaN");
}

TEST(Sequences, RefuseFilesThatDoNotFit) {
  const NpyFile a = float_file("(2, 4, 3)", numbers(24, 0)), wide = float_file("(2, 4, 4)", numbers(32, 0));
  const NpyFile three = float_file("(3, 4, 3)", numbers(36, 0)), shorter = float_file("(2, 3, 3)", numbers(18, 0));
  const NpyFile batch = float_file("(2, 2, 4, 3)", numbers(48, 0)), flat = float_file("(24,)", numbers(24, 0));
  const NpyFile empty = float_file("(0, 3)", {});
  const auto expect_error = [](const Options& options, const NpyFile& named, const std::string& what) {
    EXPECT_EQ(error_of(options), named.path().string() + ": " + what);
  };
  const std::string of_a = " as in " + a.path().string();
  expect_error(options_for(a, wide, a), wide, "expected 3 features" + of_a + ", found 4");
  expect_error(options_for(a, batch, a), batch, "expected 1 batch items" + of_a + ", found 2");
  expect_error(options_for(a, a, shorter), shorter, "expected 4 tokens" + of_a + ", found 3");
  expect_error(options_for(a, a, three), three, "expected 2 heads" + of_a + ", found 3");
  expect_error(options_for(a, a, batch), batch, "expected 1 batch items" + of_a + ", found 2");
  expect_error(options_for(a, three, three), three,
               "expected a number of heads that divides the 2 of " + a.path().string() + ", found 3");
  expect_error(options_for(flat, a, a), flat,
               "expected shape (n, d), (heads, n, d) or (batch, heads, n, d), found (24,)");
  expect_error(options_for(a, empty, a), empty, "expected a shape without 0, found (0, 3)");
  Options masked = options_for(a, a, a);
  masked.mask = wide.path().string();
  expect_error(masked, wide, "expected (4,) or (1, 4), an entry for each key, found (2, 4, 4)");
}

TEST(Sequences, RefuseNaNAndInfinityInTokensThatAreKept) {
  std::vector<float> values = numbers(24, 0);
  values[2 * 3 * 2 + 2 * 2 + 1] = kNaN;  // head 2, token 2, feature 1
  const NpyFile good = float_file("(4, 3, 2)", numbers(24, 0)), bad = float_file("(4, 3, 2)", values);
  const std::string error =
      bad.path().string() + ": expected finite numbers of float's range, found NaN in head 2, token 2, feature 1";
  EXPECT_EQ(error_of(options_for(bad, good, good)), error);
  EXPECT_EQ(error_of(options_for(good, bad, good)), error);
  EXPECT_EQ(error_of(options_for(good, good, bad)), error);
  Options dropped = options_for(bad, bad, bad);
  dropped.keep_length = 2;
  EXPECT_EQ(error_of(dropped), "no error");
  const NpyFile large(npy_header("<f8", "False", "(1, 2)"), bytes_of<double>({1, -1e300}));
  EXPECT_EQ(error_of(options_for(large, large, large)),
            large.path().string() +
                ": expected finite numbers of float's range, found an infinity in head 0, token 0, feature 1");
}

TEST(Sequences, LookForNaNWithTheMaskOfEachBatchItem) {
  std::vector<float> values = numbers(2 * 2 * 3 * 1, 0);
  values[3 * 3 + 2] = kNaN;  // batch item 1, head 1, token 2
  const NpyFile x = float_file("(2, 2, 3, 1)", values);
  const NpyFile keep(npy_header("|u1", "False", "(2, 3)"), bytes_of<std::uint8_t>({1, 1, 1, 1, 1, 0}));
  const NpyFile others(npy_header("|u1", "False", "(2, 3)"), bytes_of<std::uint8_t>({1, 1, 0, 1, 1, 1}));
  Options options = options_for(x, x, x);
  options.mask = keep.path().string();
  EXPECT_EQ(error_of(options), "no error");
  options.mask = others.path().string();
  EXPECT_NE(error_of(options).find("found NaN in head 3, token 2, feature 0"), std::string::npos) << error_of(options);
}

TEST(MeanOfValues, IsSoftmaxAttentionOfEqualScores) {
  const auto x = families::make_tokens<float>(families::Family::unit, {30, 40, 4, 5});
  std::vector<std::uint8_t> keep_key(40, 1), keep_query(30, 1);
  for (const std::size_t i : {0U, 1U, 7U}) keep_key[i] = keep_query[i + 3] = 0;
  keep_key[38] = keep_key[39] = keep_query[29] = 0;  // which lower_right does not count
  for (const Causal causal : {Causal::none, Causal::upper_left, Causal::lower_right}) {
    const attn::Mask mask{.causal = causal, .keep_key = keep_key, .keep_query = keep_query};
    const Matrix<float> mean = mean_of_values({x.q, x.k, x.v, mask});
    const Matrix<float> expected =
        attn::attention(attn::SoftmaxAttention<float>(attn::SoftmaxKernel{.scale = 0.0}), x.q, x.k, x.v, mask);
    EXPECT_LE((mean - expected).cwiseAbs().maxCoeff(), 1e-6F);
  }
}

TEST(Methods, AllOfTheLibrarysAreKnown) {
  for (const auto& method : attn::methods<float>()) EXPECT_EQ(facts_of(method.name).name, method.name);
  EXPECT_THROW(facts_of("performer"), std::logic_error);
  EXPECT_EQ(target_name(Target::softmax), "softmax");
  EXPECT_EQ(target_name(Target::gaussian), "gaussian");
}

const Row& row_of(const Comparison& comparison, const std::string& method, Index m) {
  for (const Row& row : comparison.rows) {
    if (row.method == method && row.size == m) return row;
  }
  throw std::logic_error("no row of " + method);
}

TEST(Compare, AveragesHeadsAndKeepsTheWorst) {
  std::vector<float> queries = numbers(480, 0);
  for (std::size_t i = 0; i < 240; ++i) queries[i] *= 4;  // the first head is the harder one
  const NpyFile q = float_file("(2, 60, 4)", queries), k = float_file("(2, 60, 4)", numbers(480, 1));
  const NpyFile v = float_file("(2, 60, 3)", numbers(360, 2));
  const Options options = options_for(q, k, v);
  const Sequences s = load(options);
  const Comparison comparison = compare(options, s);
  const auto skyformer = make_method(facts_of("skyformer"), 4, 0);
  double total = 0, worst = 0, total_softmax = 0;
  for (Index head = 0; head < 2; ++head) {
    const attn::Inputs<float> in = s.inputs(head);
    const Matrix<double> out = attn::attention(skyformer, in.q, in.k, in.v).cast<double>();
    const Matrix<double> gaussian =
        attn::attention(make_method(facts_of("gaussian"), 0, 0), in.q, in.k, in.v).cast<double>();
    const Matrix<double> softmax =
        attn::attention(make_method(facts_of("softmax"), 0, 0), in.q, in.k, in.v).cast<double>();
    const double error = (out - gaussian).norm() / gaussian.norm();
    total += error;
    if (head == 0) worst = error;
    total_softmax += (out - softmax).norm() / softmax.norm();
  }
  const Row& row = row_of(comparison, "skyformer", 4);
  EXPECT_NEAR(row.error, total / 2, 1e-9);
  EXPECT_NEAR(row.worst_head, worst, 1e-9);
  EXPECT_NEAR(row.softmax_error, total_softmax / 2, 1e-9);
  EXPECT_GT(worst, 1.1 * total / 2);
  EXPECT_GT(row.milliseconds, 0);
  EXPECT_GT(row.scratch_bytes, 0U);
  EXPECT_EQ(row_of(comparison, "gaussian", 0).error, 0);
  EXPECT_EQ(row_of(comparison, "softmax", 0).speed_up, 1);
  EXPECT_TRUE(comparison.not_supported.empty());
}

/// The dense matrix of an operator.
template <class Operator>
Matrix<float> dense(const Operator& op) {
  attn::Context context;
  const Matrix<float> eye = Matrix<float>::Identity(op.cols(), op.cols());
  Matrix<float> a(op.rows(), op.cols());
  op.apply(eye, a, context);
  return a;
}

template <class Operator>
void expect_transpose(const Operator& op) {
  attn::Context context;
  const Matrix<float> eye = Matrix<float>::Identity(op.rows(), op.rows());
  Matrix<float> transposed(op.cols(), op.rows());
  op.apply_transpose(eye, transposed, context);
  EXPECT_LE((transposed.transpose() - dense(op)).norm(), 1e-5F * transposed.norm());
}

TEST(MeanOfValues, AsAnOperator) {
  const auto x = families::make_tokens<float>(families::Family::unit, {30, 40, 4, 5});
  std::vector<std::uint8_t> keep_key(40, 1), keep_query(30, 1);
  for (const std::size_t i : {0U, 1U, 7U}) keep_key[i] = keep_query[i + 3] = 0;
  keep_query[20] = 0;
  for (const attn::Mask& mask : {attn::Mask{}, attn::Mask{.keep_key = keep_key, .keep_query = keep_query}}) {
    const attn::Inputs<float> in{x.q, x.k, x.v, mask};
    EXPECT_LE((dense(MeanOperator(in)) * x.v - mean_of_values(in)).norm(), 1e-5F);
    expect_transpose(MeanOperator(in));
  }
}

TEST(FrozenShift, IsTheMethodAtItsOwnValuesAndLinear) {
  const auto x = families::make_tokens<float>(families::Family::self, {70, 70, 8, 6});
  std::vector<std::uint8_t> keep(70, 1);
  for (const std::size_t i : {0U, 9U, 69U}) keep[i] = 0;
  const attn::Mask mask{.keep_key = keep, .keep_query = keep};
  attn::Context context;
  for (const Index m : {12, 70}) {  // 70: exact
    const MethodFacts &shifted = facts_of("shifted-nystrom"), &nystrom = facts_of("nystrom");
    const AnyOperator frozen = matrix_of(shifted, m, 0, {x.q, x.k, x.v, mask}, context);
    const Matrix<float> out = attn::attention(make_method(shifted, m, 0), x.q, x.k, x.v, mask);
    EXPECT_LE((dense(frozen) * x.v - out).norm(), 1e-5F * out.norm());
    expect_transpose(frozen);
    const Matrix<float> plain = attn::attention(make_method(nystrom, m, 0), x.q, x.k, x.v, mask);
    EXPECT_EQ((out - plain).norm() > 0.1F * out.norm(), m == 12);  // there is a shift to freeze
  }
}

TEST(FrozenNearField, IsTheMethodAtItsOwnValuesAndLinear) {
  const auto x = families::make_tokens<float>(families::Family::clusters, {300, 300, 8, 6});
  std::vector<std::uint8_t> keep(300, 1);
  for (const std::size_t i : {0U, 9U, 299U}) keep[i] = 0;
  const attn::Mask mask{.keep_key = keep, .keep_query = keep};
  attn::Context context;
  for (const Index near : {2, 300}) {  // 300: exact
    const MethodFacts& multipole = facts_of("multipole");
    const AnyOperator frozen = matrix_of(multipole, near, 0, {x.q, x.k, x.v, mask}, context);
    const Matrix<float> out = attn::attention(make_method(multipole, near, 0), x.q, x.k, x.v, mask);
    EXPECT_LE((dense(frozen) * x.v - out).norm(), 1e-5F * out.norm());
    expect_transpose(frozen);
  }
}

TEST(Compare, MeasuresTheSpectralErrorOfTheWorstHead) {
  std::vector<float> queries = numbers(480, 0);
  for (std::size_t i = 0; i < 240; ++i) queries[i] *= 4;  // the first head is the harder one
  const NpyFile q = float_file("(2, 60, 4)", queries), k = float_file("(2, 60, 4)", numbers(480, 1));
  const NpyFile v = float_file("(2, 60, 3)", numbers(360, 2));
  Options options = options_for(q, k, v);
  options.spectral_seconds = 1e6;  // enough on any machine
  const Sequences s = load(options);
  const Comparison comparison = compare(options, s);
  const Matrix<float> eye = Matrix<float>::Identity(60, 60);
  const auto expect_spectral = [&](const std::string& name, Index m, const auto& matrix, const std::string& target) {
    double worst = 0;
    for (Index head = 0; head < 2; ++head) {
      const attn::Inputs<float> in = s.inputs(head);
      const Matrix<double> exact =
          attn::attention(make_method(facts_of(target), 0, 0), in.q, in.k, eye).template cast<double>();
      const Matrix<double> difference = matrix(in).template cast<double>() - exact;
      worst = std::max(worst, reference::singular_values(difference)[0] / reference::singular_values(exact)[0]);
    }
    EXPECT_NEAR(row_of(comparison, name, m).spectral / worst, 1, 0.02) << name;
  };
  const auto of_method = [&](const std::string& name) {
    return [&eye, name](const attn::Inputs<float>& in) {
      return attn::attention(make_method(facts_of(name), 4, 0), in.q, in.k, eye);
    };
  };
  const auto frozen = [](const std::string& name) {
    return [name](const attn::Inputs<float>& in) {
      attn::Context context;
      return dense(matrix_of(facts_of(name), 4, 0, in, context));
    };
  };
  const auto mean = [](const attn::Inputs<float>&) -> Matrix<float> {
    return Matrix<float>::Constant(60, 60, 1 / 60.0F);
  };
  expect_spectral("mean(v)", 0, mean, "softmax");
  expect_spectral("multipole", 4, frozen("multipole"), "softmax");
  expect_spectral("nystrom", 4, of_method("nystrom"), "softmax");
  expect_spectral("shifted-nystrom", 4, frozen("shifted-nystrom"), "softmax");
  expect_spectral("skyformer", 4, of_method("skyformer"), "gaussian");
  EXPECT_EQ(row_of(comparison, "softmax", 0).spectral, 0);
}

TEST(Compare, LeavesTheSpectralErrorOutWhereThereIsNoTimeForIt) {
  Options options;
  options.n = 50;
  options.d = 4;
  options.landmarks = {4};
  options.spectral_seconds = 0;
  for (const Row& row : compare(options, load(options)).rows) EXPECT_TRUE(std::isnan(row.spectral));
}

TEST(Compare, ListsMethodsThatDoNotTakeTheMask) {
  Options options;
  options.n = 50;
  options.d = 4;
  options.landmarks = {4, 8};
  options.causal = "lower_right";
  const Comparison comparison = compare(options, load(options));
  ASSERT_EQ(comparison.not_supported.size(), 4U);
  EXPECT_EQ(comparison.not_supported[0].reason, "nystrom: causal masks are not supported");
  EXPECT_EQ(comparison.rows.size(), 4U + options.near.size());
}

TEST(Compare, TriesEveryNumberOfNearClusters) {
  Options options;
  options.n = 300;
  options.d = 4;
  options.near = {0, 2, 300};
  options.methods = {"multipole"};
  const Sequences s = load(options);
  const Comparison comparison = compare(options, s);
  ASSERT_EQ(comparison.rows.size(), 5U);
  EXPECT_EQ(row_of(comparison, "multipole", 2).error,
            attn::relative_frobenius_error(
                attn::attention(attn::Multipole<float>({.num_near = 2}), s.inputs(0).q, s.inputs(0).k, s.inputs(0).v),
                attn::attention(attn::SoftmaxAttention<float>(), s.inputs(0).q, s.inputs(0).k, s.inputs(0).v)));
  EXPECT_EQ(row_of(comparison, "multipole", 300).error, 0);
  const Recommendation any{recommend(comparison.rows, {.target = Target::softmax, .budget_ms = {}, .max_error = 1}),
                           ""};
  const auto json = nlohmann::json::parse(json_report(comparison, s, 1, any));
  EXPECT_TRUE(json["rows"][2]["near"].is_null());
  EXPECT_EQ(json["rows"][3]["near"], 2);
  EXPECT_TRUE(json["rows"][3]["landmarks"].is_null());
  EXPECT_NE(csv_report(comparison).find("\nmultipole,,2,softmax,"), std::string::npos);
}

TEST(Report, WritesTheRowsAsJson) {
  Options options;
  options.n = 50;
  options.d = 4;
  options.landmarks = {4};
  options.methods = {"nystrom"};
  const Sequences s = load(options);
  const Comparison comparison = compare(options, s);
  const Recommendation advice{
      recommend(comparison.rows, {.target = Target::softmax, .budget_ms = {}, .max_error = 1e-9}), "line"};
  const auto json = nlohmann::json::parse(json_report(comparison, s, 1, advice));
  EXPECT_EQ(json["inputs"]["n_q"], 50);
  ASSERT_EQ(json["rows"].size(), 3U);
  EXPECT_TRUE(json["rows"][1]["ms"].is_null());
  EXPECT_EQ(json["rows"][2]["method"], "nystrom");
  EXPECT_EQ(json["rows"][2]["error"], comparison.rows[2].error);
  EXPECT_EQ(json["recommendation"]["method"], "softmax");
  EXPECT_EQ(json["recommendation"]["line"], "line");
  EXPECT_EQ(json["recommendation"]["fits"], true);
}

TEST(Compare, TimesHeadsAsMultiHeadRunsThemAndNamesTheWorstRow) {
  const NpyFile q = float_file("(2, 2, 60, 4)", numbers(960, 0)), k = float_file("(2, 1, 60, 4)", numbers(480, 1));
  const NpyFile v = float_file("(2, 1, 60, 3)", numbers(360, 2));
  Options options = options_for(q, k, v);
  options.methods = {"nystrom"};
  options.threads = 2;
  const Sequences s = load(options);
  ASSERT_EQ(s.masks().size(), 2U);
  const Row row = row_of(compare(options, s), "nystrom", 4);
  double worst = 0;
  Index worst_head = 0, worst_token = 0;
  for (Index head = 0; head < 4; ++head) {
    const attn::Inputs<float> in = s.inputs(head);
    const Matrix<float> exact = attn::attention(attn::SoftmaxAttention<float>{}, in.q, in.k, in.v);
    const Matrix<float> out = attn::attention(make_method(facts_of("nystrom"), 4, 0), in.q, in.k, in.v);
    const double of_head = attn::worst_row_error(out, exact);
    if (of_head <= worst) continue;
    worst = of_head;
    worst_head = head;
    (out - exact).rowwise().norm().maxCoeff(&worst_token);
  }
  EXPECT_EQ(row.worst_row, worst);
  EXPECT_EQ(row.head_of_worst_row, worst_head);
  EXPECT_EQ(row.token_of_worst_row, worst_token);
  EXPECT_GE(row.spread, 1);
  EXPECT_NE(text_report(compare(options, s), s).find("\nms: all heads by multi_head, "), std::string::npos);
}

TEST(Sequences, OfMoreTokensThanFitAreRefusedInASentence) {
  Options options;
  options.n = options.d = 10'000'000;
  const std::string error = error_of(options);
  EXPECT_EQ(error.find("--n: 10000000 tokens of 10000000 features take "), 0U) << error;
  EXPECT_NE(error.find("; try a smaller --n"), std::string::npos) << error;
}

TEST(Report, SaysWhereTimesVaryWidely) {
  const auto note = [](double spread) {
    Options options;
    options.n = 50;
    options.d = 4;
    const Sequences s = load(options);
    return text_report({{{.method = "nystrom", .size = 32, .milliseconds = 1, .speed_up = 1, .spread = spread}}, {}},
                       s);
  };
  EXPECT_NE(note(2.34).find("\nTimes vary: the slowest run of nystrom with 32 landmarks took 2.3 times as long as the "
                            "fastest."),
            std::string::npos);
  EXPECT_EQ(note(1.1).find("Times vary"), std::string::npos);
}

TEST(Recommend, SaysWhatToLookAtBeforeTheErrorIsRelied) {
  const Row row{.method = "nystrom", .size = 4, .worst_row = 0.5, .head_of_worst_row = 2, .token_of_worst_row = 7};
  EXPECT_EQ(before_trusting(row, true, false)
                .find("Its worst row is query 7 of head 2, off by 0.5000 of an ordinary "
                      "row. Before you rely on the error, measure other inputs"),
            0U);
  EXPECT_NE(before_trusting(row, false, true).find("is query 7, off by"), std::string::npos);
  EXPECT_NE(before_trusting(row, false, true).find("These tokens are made"), std::string::npos);
  EXPECT_EQ(before_trusting({.method = "softmax", .exact = true}, true, false), "");
}

/// Rows as compare gives them, of these figures.
std::vector<Row> some_rows() {
  const auto row = [](const char* method, Index m, Target target, double ms, double worst_head) {
    return Row{.method = method,
               .target = target,
               .exact = ms > 0 && m == 0,
               .size = m,
               .milliseconds = ms > 0 ? ms : Row::kNone,
               .error = worst_head / 2,
               .worst_head = worst_head};
  };
  return {
      row("softmax", 0, Target::softmax, 100, 0),          row("mean(v)", 0, Target::softmax, 0, 0.8),
      row("nystrom", 32, Target::softmax, 5, 0.3),         row("nystrom", 64, Target::softmax, 10, 0.1),
      row("lifted-softmax", 64, Target::softmax, 1, 0.9),  row("lifted-softmax", 128, Target::softmax, 2, Row::kNone),
      row("shifted-nystrom", 32, Target::softmax, 6, 0.1), row("gaussian", 0, Target::gaussian, 90, 0),
      row("mean(v)", 0, Target::gaussian, 0, 0.9),         row("skyformer", 32, Target::gaussian, 4, 0.01)};
}

std::string advised(const Wish& wish) {
  const Advice advice = recommend(some_rows(), wish);
  return (advice.fits ? "" : "nearest: ") + advice.row.method + " " + std::to_string(advice.row.size);
}

TEST(Recommend, TheFastestWithinAnErrorOrTheMostAccurateWithinABudget) {
  EXPECT_EQ(advised({.target = Target::softmax, .budget_ms = {}, .max_error = 0.5}), "nystrom 32");
  EXPECT_EQ(advised({.target = Target::softmax, .budget_ms = {}, .max_error = 0.2}), "shifted-nystrom 32");
  EXPECT_EQ(advised({.target = Target::softmax, .budget_ms = {}, .max_error = 0.01}), "softmax 0");
  EXPECT_EQ(advised({.target = Target::softmax, .budget_ms = 5.5, .max_error = {}}), "nystrom 32");
  EXPECT_EQ(advised({.target = Target::softmax, .budget_ms = 50, .max_error = {}}), "shifted-nystrom 32");
  EXPECT_EQ(advised({.target = Target::softmax, .budget_ms = 1000, .max_error = {}}), "softmax 0");
  EXPECT_EQ(advised({.target = Target::softmax, .budget_ms = 5.5, .max_error = 0.5}), "nystrom 32");
  EXPECT_EQ(advised({.target = Target::softmax, .budget_ms = 5.5, .max_error = 0.2}),
            "nearest: shifted-nystrom 32");  // 6 ms of 5.5, where nystrom 32 has an error of 0.3 of 0.2
  EXPECT_EQ(advised({.target = Target::gaussian, .budget_ms = {}, .max_error = 0.5}), "skyformer 32");
}

TEST(Recommend, TheExactMethodRatherThanOneThatIsTheSame) {
  std::vector<Row> rows = some_rows();
  rows.push_back({.method = "multipole", .milliseconds = 99, .error = 0, .worst_head = 0});
  const Advice advice = recommend(rows, {.target = Target::softmax, .budget_ms = {}, .max_error = 1e-3});
  EXPECT_EQ(advice.row.method, "softmax");
}

TEST(Recommend, SaysWhatASizeCounts) {
  std::vector<Row> rows = some_rows();
  const auto with_multipole = [&](Index near) {
    rows.resize(some_rows().size());
    rows.push_back({.method = "multipole", .size = near, .milliseconds = 3, .error = 0.02, .worst_head = 0.02});
    return recommend(rows, {.target = Target::softmax, .budget_ms = {}, .max_error = 0.03}).reason;
  };
  EXPECT_EQ(with_multipole(8),
            "The fastest with an error of at most 0.03: multipole with 8 near clusters, error 0.0200, 3.00 ms");
  EXPECT_EQ(with_multipole(0), "The fastest with an error of at most 0.03: multipole, error 0.0200, 3.00 ms");
}

TEST(Recommend, NothingThatMeanOfValuesBeats) {
  // lifted-softmax is within both limits, with an error above that of mean(v), or none at all
  EXPECT_EQ(advised({.target = Target::softmax, .budget_ms = 2.5, .max_error = {}}), "nearest: nystrom 32");
  EXPECT_EQ(advised({.target = Target::softmax, .budget_ms = {}, .max_error = 0.95}), "nystrom 32");
  EXPECT_EQ(recommend(some_rows(), {.target = Target::softmax, .budget_ms = 2.5, .max_error = {}}).reason,
            "No method that beats mean(v) has a time of at most 2.5 ms; the nearest: nystrom with 32 landmarks, error "
            "0.3000, 5.00 ms");
  EXPECT_EQ(recommend(some_rows(), {.target = Target::softmax, .budget_ms = {}, .max_error = 0.95}).reason,
            "The fastest with an error of at most 0.95: nystrom with 32 landmarks, error 0.3000, 5.00 ms\n"
            "mean(v), which costs next to nothing, is within that error too: 0.8000");
}

}  // namespace
