#include "accuracy/contenders.hpp"
#include "accuracy/heads.hpp"
#include "accuracy/study.hpp"
#include "common/samples.hpp"

#include <attn/metrics.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace accuracy {
namespace {

/// Tokens of any length, by the name of a family or of a head that is tiled.
class Source {
 public:
  Source(const std::string& name, const std::vector<std::string>& folders) : name_(name) {
    if (std::ranges::find(kFamilies, name) != kFamilies.end()) return;
    for (Head& head : read_heads(folders, std::numeric_limits<Index>::max())) {
      if (head.name == name && !head.causal) head_ = std::move(head.tokens);
    }
    if (head_.k.rows() == 0) throw std::runtime_error("no family and no head that sees all keys is called " + name);
  }

  const std::string& name() const { return name_; }

  Tokens<float> draw(Index n, std::uint64_t seed) const {
    return head_.k.rows() == 0 ? make_tokens<float>(name_, n, seed) : tiled(head_, n, seed);
  }

 private:
  std::string name_;
  Tokens<float> head_{};
};

/// Evenly spaced rows of x, at most count.
Matrix<float> spaced_rows(const Matrix<float>& x, Index count) {
  const Index rows = std::min(count, x.rows());
  Matrix<float> some(rows, x.cols());
  for (Index i = 0; i < rows; ++i) some.row(i) = x.row((2 * i + 1) * x.rows() / (2 * rows));
  return some;
}

/// Adds multipole's time and error, and exact attention's time, in turn, for a second or so. Exact attention is
/// computed for kQueries of the queries; its time is in proportion to their number.
void add_samples(Row& row, const Tokens<float>& tokens, bool quick) {
  constexpr Index kQueries = 512;
  constexpr int kRounds = 4;
  constexpr double kSeconds = 1;
  const attn::Inputs<float> in{.q = tokens.q, .k = tokens.k, .v = tokens.v};
  const Matrix<float> some = spaced_rows(tokens.q, kQueries);
  const attn::Inputs<float> sample{.q = some, .k = tokens.k, .v = tokens.v};
  const Forward multipole = make_forward({"multipole"}, 0, in), softmax = make_forward({"softmax"}, 0, sample);
  Matrix<float> out(tokens.q.rows(), tokens.v.cols()), exact(some.rows(), tokens.v.cols());
  multipole(in, out);
  softmax(sample, exact);
  double spent = 0;
  for (int round = 0; round < (quick ? 1 : kRounds) && (round == 0 || spent < kSeconds); ++round) {
    const double seconds = bench::seconds_of(1, [&] { multipole(in, out); });
    const double exact_seconds = bench::seconds_of(1, [&] { softmax(sample, exact); }) *
                                 static_cast<double>(tokens.q.rows()) / static_cast<double>(some.rows());
    row.add("ms", 1e3 * seconds);
    row.add("exact ms", 1e3 * exact_seconds);
    row.add("speed-up", exact_seconds / seconds);
    spent += seconds;
  }
  row.add("error", attn::relative_frobenius_error(spaced_rows(out, kQueries), exact));
  out.topRows(some.rows()).rowwise() = tokens.v.colwise().mean();
  row.add("of mean(v)", attn::relative_frobenius_error(out.topRows(some.rows()), exact));
}

/// Of n in the time, by least squares of the logarithms.
double exponent(const std::vector<std::pair<Index, double>>& times) {
  double x = 0, y = 0, xx = 0, xy = 0;
  for (const auto& [n, time] : times) {
    const double log_n = std::log(static_cast<double>(n)), log_time = std::log(time);
    x += log_n;
    y += log_time;
    xx += log_n * log_n;
    xy += log_n * log_time;
  }
  const auto count = static_cast<double>(times.size());
  return (count * xy - x * y) / (count * xx - x * x);
}

}  // namespace

std::vector<Table> study_growth(const Settings& settings) {
  constexpr Index kLengths[] = {1024, 3073, 16384, 65536, 262144, 1048576}, kFittedFrom = 16384, kFewSeeds = 262144;
  const Index longest = settings.quick ? kLengths[1] : settings.longest;
  const Index fitted_from = settings.quick ? 0 : kFittedFrom;
  Table table{
      "tensor_growth",
      "Multipole by itself as tokens grow, and exact attention, whose time is that of 512 queries times n / 512; "
      "errors are of those queries; heads are tiled with a tenth of their size as noise"};
  Table exponents{"tensor_growth_exponents", "How the time grows: as n to this power"};
  for (const std::string& name : settings.growth) {
    const Source source(name, settings.tensors);
    std::vector<std::pair<Index, double>> times;
    for (const Index n : kLengths) {
      if (n > longest) break;
      Row row{{{"tokens", name}, {"n", n}}};
      for (int seed = 0; seed < (n < kFewSeeds ? settings.seeds : 1); ++seed) {
        add_samples(row, source.draw(n, static_cast<std::uint64_t>(seed)), settings.quick);
      }
      if (n >= fitted_from) times.emplace_back(n, bench::quantile(row.figures[0].samples, 0.5));
      table.rows.push_back(std::move(row));
    }
    if (times.size() < 2) continue;
    Row row{{{"tokens", name}, {"n from", times.front().first}, {"to", times.back().first}}};
    row.add("exponent", exponent(times));
    exponents.rows.push_back(std::move(row));
  }
  return exponents.rows.empty() ? std::vector{table} : std::vector{table, exponents};
}

}  // namespace accuracy
