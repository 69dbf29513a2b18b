#include "accuracy/matrices.hpp"

#include "accuracy/dense.hpp"
#include "accuracy/methods.hpp"

#include <attn/context.hpp>
#include <attn/core.hpp>
#include <attn/exact.hpp>
#include <attn/landmarks.hpp>

#include <nlohmann/json.hpp>

#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <vector>

namespace accuracy {
namespace {

using Json = nlohmann::ordered_json;

constexpr Index kTokens = 96, kLandmarks = 12;
constexpr std::uint64_t kSeed = 3;

/// (kTokens, 4): points along a smooth curve, which comes near itself once.
Matrix<float> curve(double radius, double ahead) {
  constexpr std::array<double, 4> kTurns{1.0, 1.5, 2.0, 0.5}, kStart{0.0, 0.1, 0.3, 0.7};
  Matrix<float> x(kTokens, 4);
  for (Index i = 0; i < x.rows(); ++i) {
    const double time = static_cast<double>(i) / static_cast<double>(kTokens);
    for (Index c = 0; c < x.cols(); ++c) {
      const auto at = static_cast<std::size_t>(c);
      const double turns = kTurns[at] * time + kStart[at] + ahead;
      x(i, c) = static_cast<float>(radius * std::sin(2 * std::numbers::pi * turns));
    }
  }
  return x;
}

Matrix<float> noise(Index columns) {
  return families::Random(kSeed).normal(kTokens, columns).cast<float>();
}

/// Queries on the curve, and keys a little ahead of them.
Tokens<float> smooth_tokens() {
  return {curve(1.6, 0), curve(1.44, 0.04), noise(32)};
}

/// q = k: the curve, in 4 of 32 features, and a part of each token's own in the others.
Tokens<float> tokens_with_parts_of_their_own() {
  Matrix<float> x(kTokens, 32);
  x << curve(2.7, 0), 0.7f * noise(28);
  return {x, x, noise(32)};
}

/// Rows of numbers with four decimals.
Json json_of(const Matrix<float>& a) {
  Json rows = Json::array();
  for (Index i = 0; i < a.rows(); ++i) {
    Json& row = rows.emplace_back(Json::array());
    for (Index j = 0; j < a.cols(); ++j) row.push_back(std::round(1e4 * static_cast<double>(a(i, j))) / 1e4);
  }
  return rows;
}

/// What stands for the inverse of a.
template <class Core>
Matrix<float> inverse(const Core& core, Matrix<float> a, attn::Context& context) {
  Matrix<float> x = Matrix<float>::Identity(a.rows(), a.rows());
  core.template apply<float>(a, x, context);
  return x;
}

Json softmax(const Tokens<float>& tokens, attn::Context& context) {
  const Matrix<float> identity = Matrix<float>::Identity(kTokens, kTokens);
  Matrix<float> causal(kTokens, kTokens);
  attn::SoftmaxAttention<float>{}.forward(
      {.q = tokens.q, .k = tokens.k, .v = identity, .mask = {.causal = attn::Causal::upper_left}}, causal, context);
  const Matrix<float> scores = tokens.q * tokens.k.transpose() / std::sqrt(static_cast<float>(tokens.q.cols()));
  return {
      {"scores", json_of(scores)}, {"S", json_of(method_matrix("softmax", 0, 0, tokens))}, {"causal", json_of(causal)}};
}

Json gaussian(const Tokens<float>& tokens) {
  const Matrix<float> c = method_matrix("gaussian", 0, 0, tokens);
  const Matrix<float> normalized = c.array().colwise() / c.rowwise().sum().array();
  return {{"C", json_of(c)}, {"normalized", json_of(normalized)}};
}

Json nystrom(const Tokens<float>& tokens, attn::Context& context) {
  const Matrix<float> q_land = segment_means(tokens.q, kLandmarks), k_land = segment_means(tokens.k, kLandmarks);
  return {{"F", json_of(softmax_matrix(tokens.q, k_land))},
          {"Z", json_of(inverse(attn::IterativePinv{}, softmax_matrix(q_land, k_land), context))},
          {"B", json_of(softmax_matrix(q_land, tokens.k))},
          {"N", json_of(method_matrix("nystrom", kLandmarks, 0, tokens))}};
}

Json shifted_nystrom(const Tokens<float>& tokens) {
  return {{"S", json_of(method_matrix("softmax", 0, 0, tokens))},
          {"N", json_of(method_matrix("nystrom", kLandmarks, 0, tokens))},
          {"R", json_of(method_matrix("shifted-nystrom", kLandmarks, 0, tokens))}};
}

/// The row of x that is equal to a landmark.
Index row_of(const Matrix<float>& x, const Eigen::RowVectorXf& landmark) {
  Index row = 0;
  (x.rowwise() - landmark).rowwise().squaredNorm().minCoeff(&row);
  return row;
}

Json skyformer(const Tokens<float>& tokens, attn::Context& context) {
  attn::Scratch scratch = context.scratch();
  const attn::Inputs<float> in{tokens.q, tokens.k, tokens.v};
  const Matrix<float> land = attn::UniformSample{.num_landmarks = kLandmarks, .seed = kSeed}.select(in, scratch);
  std::vector<Index> queries, keys;
  for (Index j = 0; j < kLandmarks / 2; ++j) {
    queries.push_back(row_of(tokens.q, land.row(j)));
    keys.push_back(row_of(tokens.k, land.row(kLandmarks / 2 + j)));
  }
  return {{"queries", queries},
          {"keys", keys},
          {"left", json_of(gaussian_matrix(tokens.q, land))},
          {"core", json_of(inverse(attn::RidgeInverse{}, gaussian_matrix(land, land), context))},
          {"right", json_of(gaussian_matrix(land, tokens.k))},
          {"product", json_of(method_matrix("skyformer", kLandmarks, kSeed, tokens))}};
}

Json lifted_softmax(const Tokens<float>& tokens) {
  const float scale = 1 / std::sqrt(static_cast<float>(tokens.k.cols()));
  return {{"log-weights", json_of(scale / 2 * tokens.k.rowwise().squaredNorm())},
          {"product", json_of(method_matrix("lifted-softmax", kLandmarks, kSeed, tokens))}};
}

}  // namespace

nlohmann::ordered_json method_matrices() {
  attn::Context context;
  const Tokens<float> smooth = smooth_tokens();
  return {
      {"softmax", softmax(smooth, context)},     {"gaussian", gaussian(smooth)},
      {"nystrom", nystrom(smooth, context)},     {"shifted-nystrom", shifted_nystrom(tokens_with_parts_of_their_own())},
      {"skyformer", skyformer(smooth, context)}, {"lifted-softmax", lifted_softmax(smooth)}};
}

}  // namespace accuracy
