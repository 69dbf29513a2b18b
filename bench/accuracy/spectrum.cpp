#include "accuracy/dense.hpp"
#include "accuracy/study.hpp"
#include "accuracy/tokens.hpp"

#include <attn/metrics.hpp>

#include <cmath>
#include <string>

namespace accuracy {
namespace {

/// The matrices whose spectra are compared: softmax(s q k^T); exp(s q k^T - its largest entry), which has no rows
/// divided; and Gaussian attention, which is the second with D_Q^-1/2 on its left and D_K^-1/2 on its right.
std::vector<std::pair<std::string, Matrix<double>>> matrices_of(const Tokens<double>& tokens) {
  Matrix<double> scores = tokens.q * tokens.k.transpose() / std::sqrt(static_cast<double>(kFeatures));
  scores.array() -= scores.maxCoeff();
  return {{"softmax", softmax_matrix(tokens.q, tokens.k)},
          {"exp", scores.array().exp()},
          {"gaussian", gaussian_matrix(tokens.q, tokens.k)}};
}

}  // namespace

std::vector<Table> study_spectrum(const Settings& settings) {
  const Index n = settings.quick ? 128 : 512;
  Table summary{"conditions", "Condition number, effective rank and norms of attention matrices, n tokens"};
  Table curves{"spectra", "Singular values sigma_i / sigma_1"};
  for (const std::string_view family : kFamilies) {
    std::vector<Row> points, lines;
    for (Index i = 1; i <= n; i *= 2) points.push_back({{{"family", std::string(family)}, {"n", n}, {"i", i}}});
    for (int seed = 0; seed < settings.seeds; ++seed) {
      const auto matrices = matrices_of(make_tokens<double>(family, n, static_cast<std::uint64_t>(seed)));
      for (std::size_t which = 0; which < matrices.size(); ++which) {
        const auto& [name, matrix] = matrices[which];
        if (seed == 0) lines.push_back({{{"family", std::string(family)}, {"n", n}, {"matrix", name}}});
        const Eigen::VectorXd values = singular_values(matrix);
        lines[which].add("condition", attn::condition_number(values));
        lines[which].add("effective rank", attn::effective_rank(values));
        lines[which].add("stable rank", attn::stable_rank(values.norm(), values[0]));
        for (Row& point : points) point.add(name, values[std::get<Index>(point.labels[2].second) - 1] / values[0]);
      }
    }
    summary.rows.insert(summary.rows.end(), lines.begin(), lines.end());
    curves.rows.insert(curves.rows.end(), points.begin(), points.end());
  }
  return {summary, curves};
}

}  // namespace accuracy
