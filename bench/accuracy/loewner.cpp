#include "accuracy/dense.hpp"
#include "accuracy/study.hpp"
#include "accuracy/tokens.hpp"

#include <attn/context.hpp>
#include <attn/landmarks.hpp>

#include <Eigen/Cholesky>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace accuracy {
namespace {

/// Rows of [q; k], as Skyformer draws them.
Matrix<double> draw_landmarks(const Tokens<double>& tokens, Index m, std::uint64_t seed) {
  attn::Context context;
  attn::Scratch scratch = context.scratch();
  const attn::UniformSample sample{.num_landmarks = m, .seed = seed};
  return sample.select(attn::Inputs<double>{tokens.q, tokens.k, tokens.v}, scratch);
}

/// kappa(x, L) (kappa(L, L) + gamma I)^-1 kappa(L, x).
Matrix<double> lifted(const Matrix<double>& x, const Matrix<double>& landmarks, double gamma) {
  const Matrix<double> across = gaussian_matrix(x, landmarks);
  Matrix<double> between = gaussian_matrix(landmarks, landmarks);
  between.diagonal().array() += gamma;
  return across * Eigen::LLT<Eigen::MatrixXd>(between).solve(across.transpose());
}

/// A sample for every draw of landmarks of how far C - C~ reaches below and above 0, in units of |C|_2; and how often
/// it is between 0, but for rounding, and lambda I.
void add_draws(Row& row, const Tokens<double>& tokens, Index m, double gamma, int draws) {
  constexpr double kRounding = 1e-9;
  Matrix<double> x(2 * tokens.q.rows(), kFeatures);
  x << tokens.q, tokens.k;
  const Matrix<double> exact = gaussian_matrix(x, x);
  const double size = eigenvalues(exact).maxCoeff();
  std::vector<std::pair<double, double>> ranges;
  for (int draw = 0; draw < draws; ++draw) {
    const Matrix<double> landmarks = draw_landmarks(tokens, m, static_cast<std::uint64_t>(draw));
    const Eigen::VectorXd rest = eigenvalues(exact - lifted(x, landmarks, gamma)) / size;
    ranges.emplace_back(rest.minCoeff(), rest.maxCoeff());
    row.add("lowest", rest.minCoeff());
    row.add("highest", rest.maxCoeff());
  }
  for (const auto& [name, lambda] : {std::pair{"lambda .03", 0.03}, {"lambda .1", 0.1}, {"lambda .3", 0.3}}) {
    double held = 0;
    for (const auto& [lowest, highest] : ranges) held += lowest >= -kRounding && highest <= lambda ? 1 : 0;
    row.add(name, held / draws);
  }
}

}  // namespace

std::vector<Table> study_loewner(const Settings& settings) {
  const Index n = settings.quick ? 32 : 128;
  const int draws = settings.quick ? 4 : 40;
  Table table{"loewner", "C - C~ of [q; k] in units of |C|_2, and how often C~ <= C <= C~ + lambda |C|_2 I over draws"};
  for (const double gamma : {1e-4, 0.1}) {
    for (const std::string_view family : kFamilies) {
      const Tokens<double> tokens = make_tokens<double>(family, n, 0);
      for (Index m = n / 16; m <= 2 * n; m *= 2) {
        table.rows.push_back({{{"family", std::string(family)}, {"n", n}, {"gamma", gamma}, {"m", m}}});
        add_draws(table.rows.back(), tokens, m, gamma, draws);
      }
    }
  }
  return {table};
}

}  // namespace accuracy
