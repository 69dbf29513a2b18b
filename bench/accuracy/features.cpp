#include "accuracy/dense.hpp"
#include "accuracy/methods.hpp"
#include "accuracy/study.hpp"
#include "accuracy/tokens.hpp"

#include <initializer_list>
#include <string>

namespace accuracy {
namespace {

/// Of one target: its exact matrix and what approximates it.
struct Matrices {
  std::string name;
  Matrix<float> exact;
  std::initializer_list<std::string_view> methods;
};

/// Adds to rows, one for each of landmarks, a sample of every error relative to |exact|_2: of the matrix that gives
/// every query the mean of v, of the best matrix of rank m, and of the methods.
void add_errors(std::vector<Row>& rows, const std::vector<Index>& landmarks, const Matrices& target,
                const Tokens<float>& tokens, std::uint64_t seed) {
  const Index n = target.exact.rows();
  const Eigen::VectorXd values = leading_values(target.exact, std::min(n, landmarks.back() + 1));
  const auto relative = [&](const Matrix<float>& a) { return spectral_norm(a - target.exact) / values[0]; };
  const double mean = relative(Matrix<float>::Constant(n, n, 1.0F / static_cast<float>(n)));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const Index m = landmarks[i];
    rows[i].add(target.name + " mean(v)", mean);
    rows[i].add(target.name + " best rank m", values[m] / values[0]);
    for (const std::string_view method : target.methods)
      rows[i].add(method, relative(method_matrix(method, m, seed, tokens)));
  }
}

void add_rows(std::vector<Row>& table, std::string_view family, Index n, const std::vector<Index>& landmarks,
              const Settings& settings) {
  std::vector<Row> rows;
  for (const Index m : landmarks) rows.push_back({{{"family", std::string(family)}, {"n", n}, {"m", m}}});
  for (int i = 0; i < settings.seeds; ++i) {
    const auto seed = static_cast<std::uint64_t>(i);
    const Tokens<float> tokens = make_tokens<float>(family, n, seed);
    add_errors(rows, landmarks,
               {"softmax", softmax_matrix(tokens.q, tokens.k), {"nystrom", "shifted-nystrom", "lifted-softmax"}},
               tokens, seed);
    add_errors(rows, landmarks, {"gaussian", gaussian_matrix(tokens.q, tokens.k), {"skyformer"}}, tokens, seed);
  }
  table.insert(table.end(), rows.begin(), rows.end());
}

}  // namespace

std::vector<Table> study_features(const Settings& settings) {
  const std::vector<Index> landmarks =
      settings.quick ? std::vector<Index>{16, 64} : std::vector<Index>{16, 32, 64, 128, 256};
  Table table{"features", "Relative error in the spectral norm, |A~ - A|_2 / |A|_2, with m landmarks"};
  if (settings.quick) {
    for (const std::string_view family : {"smooth", "init"}) add_rows(table.rows, family, 256, landmarks, settings);
    return {table};
  }
  for (const Index n : {512, 1024}) {
    for (const std::string_view family : kFamilies) add_rows(table.rows, family, n, landmarks, settings);
  }
  for (const std::string_view family : {"smooth", "words", "init"})
    add_rows(table.rows, family, 4096, landmarks, settings);
  return {table};
}

}  // namespace accuracy
