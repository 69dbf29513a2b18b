#include "accuracy/dense.hpp"
#include "accuracy/study.hpp"
#include "accuracy/tokens.hpp"

#include <attn/context.hpp>
#include <attn/core.hpp>

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace accuracy {
namespace {

/// For Z after each number of steps: |I - A Z|_F / sqrt(m), how far Z is from an inverse; |Z|_2, what it can amplify;
/// and |F Z B - S|_F / |S|_F.
void add_samples(std::vector<Row>& rows, const std::vector<int>& steps, Index m, const Tokens<double>& tokens) {
  attn::Context context;
  const Matrix<double> q_land = segment_means(tokens.q, m), k_land = segment_means(tokens.k, m);
  const Matrix<double> s = softmax_matrix(tokens.q, tokens.k), f = softmax_matrix(tokens.q, k_land);
  const Matrix<double> a = softmax_matrix(q_land, k_land), b = softmax_matrix(q_land, tokens.k);
  for (std::size_t i = 0; i < steps.size(); ++i) {
    Matrix<double> z(m, m);
    attn::IterativePinv{.iterations = steps[i]}.invert<double>(a, z, context);
    const Matrix<double> residual = Matrix<double>::Identity(m, m) - a * z;
    rows[i].add("|I - A Z|", residual.norm() / std::sqrt(static_cast<double>(m)));
    rows[i].add("|Z|", singular_values(z)[0]);
    rows[i].add("error", (f * z * b - s).norm() / s.norm());
  }
}

}  // namespace

std::vector<Table> study_iterations(const Settings& settings) {
  const Index n = settings.quick ? 256 : 1024, m = settings.quick ? 16 : 64;
  const std::vector<int> steps = settings.quick ? std::vector{3, 6} : std::vector{1, 3, 5, 6, 7, 8, 10, 12, 15, 20, 30};
  Table table{"iterations",
              "Steps of Nystromformer's inverse, n = " + std::to_string(n) + ", m = " + std::to_string(m)};
  for (const std::string_view family : kFamilies) {
    std::vector<Row> rows;
    for (const int count : steps) rows.push_back({{{"family", std::string(family)}, {"steps", Index{count}}}});
    for (int i = 0; i < settings.seeds; ++i) {
      add_samples(rows, steps, m, make_tokens<double>(family, n, static_cast<std::uint64_t>(i)));
    }
    table.rows.insert(table.rows.end(), rows.begin(), rows.end());
  }
  return {table};
}

}  // namespace accuracy
