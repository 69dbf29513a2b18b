#include "accuracy/methods.hpp"
#include "accuracy/study.hpp"
#include "accuracy/tokens.hpp"
#include "common/samples.hpp"

#include <attn/metrics.hpp>

#include <initializer_list>
#include <string>

namespace accuracy {
namespace {

/// A number of landmarks that stands for none.
constexpr Index kNone = 0;

/// out <- the method's result, and the least time of some calls in ms, after one that does not count.
double run(const attn::AnyApproximator<float>& method, const Tokens<float>& tokens, Matrix<float>& out) {
  attn::Context context;
  const attn::Inputs<float> in{tokens.q, tokens.k, tokens.v};
  return 1e3 * bench::least_seconds(4, [&] { method.forward(in, out, context); });
}

/// A target, by the name of its exact method, and its approximations.
struct Target {
  std::string_view exact;
  std::initializer_list<std::string_view> methods;
};

/// Numbers m to try: of landmarks and, for multipole, of near clusters.
struct Sizes {
  std::vector<Index> landmarks, near;

  const std::vector<Index>& of(std::string_view method) const { return method == "multipole" ? near : landmarks; }
};

/// The rows of one family and target: the exact method, mean(v), and each method of each size.
std::vector<Row> rows_of(std::string_view family, Index n, const Target& target, const Sizes& sizes) {
  std::vector<Row> rows;
  const auto add = [&](std::string_view method, Index m) {
    rows.push_back({{{"family", std::string(family)},
                     {"target", std::string(target.exact)},
                     {"method", std::string(method)},
                     {"n", n},
                     {"m", m}}});
  };
  add(target.exact, kNone);
  add("mean(v)", kNone);
  for (const std::string_view method : target.methods) {
    for (const Index m : sizes.of(method)) add(method, m);
  }
  return rows;
}

void add_samples(std::vector<Row>& rows, const Target& target, const Tokens<float>& tokens, std::uint64_t seed) {
  const Index n = tokens.q.rows();
  Matrix<float> exact(n, kFeatures), out(n, kFeatures);
  for (Row& row : rows) {
    const auto& method = std::get<std::string>(row.labels[2].second);
    const Index m = std::get<Index>(row.labels[4].second);
    if (method == "mean(v)") {
      out.rowwise() = tokens.v.colwise().mean();
      row.add("ms", 0);
    } else {
      row.add("ms", run(make_method(method, m == kNone ? n : m, seed), tokens, out));
    }
    if (method == target.exact) exact = out;
    row.add("error", attn::relative_frobenius_error(out, exact));
  }
}

/// Adds 1 to the rows of one family and target that no other of them beats in time and error, else 0.
void mark_front(std::vector<Row>& rows) {
  const auto median = [](const Row& row, std::size_t figure) {
    return bench::spread(row.figures[figure].samples).median;
  };
  std::vector<double> on_front;
  for (const Row& row : rows) {
    bool beaten = false;
    for (const Row& other : rows)
      beaten = beaten || (median(other, 0) < median(row, 0) && median(other, 1) <= median(row, 1));
    on_front.push_back(beaten ? 0 : 1);
  }
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i].add("front", on_front[i]);
}

}  // namespace

std::vector<Table> study_pareto(const Settings& settings) {
  const Index n = settings.quick ? 256 : 4096;
  const Sizes sizes = settings.quick ? Sizes{{16, 64}, {1, 4}} : Sizes{{16, 32, 64, 128, 256, 512}, {1, 4, 16, 64}};
  Table table{"pareto", "Time of a forward pass on one core, and relative error |out - exact|_F / |exact|_F"};
  for (const std::string_view family : kFamilies) {
    for (const Target& target : {Target{"softmax", {"multipole", "nystrom", "shifted-nystrom", "lifted-softmax"}},
                                 Target{"gaussian", {"skyformer"}}}) {
      std::vector<Row> rows = rows_of(family, n, target, sizes);
      for (int i = 0; i < settings.seeds; ++i) {
        const auto seed = static_cast<std::uint64_t>(i);
        add_samples(rows, target, make_tokens<float>(family, n, seed), seed);
      }
      mark_front(rows);
      table.rows.insert(table.rows.end(), rows.begin(), rows.end());
    }
  }
  return {table};
}

}  // namespace accuracy
