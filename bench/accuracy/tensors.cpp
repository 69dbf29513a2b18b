#include "accuracy/methods.hpp"
#include "accuracy/study.hpp"
#include "accuracy/tokens.hpp"
#include "common/npy.hpp"
#include "common/samples.hpp"

#include <attn/exact.hpp>
#include <attn/metrics.hpp>

#include <nlohmann/json.hpp>

#include <filesystem>
#include <fstream>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace accuracy {
namespace {

/// A head of a trained model.
struct Head {
  std::string name;
  Tokens<float> tokens;
};

/// The heads of a folder that are not causal; with quick, the short ones.
std::vector<Head> read_heads(const std::filesystem::path& folder, bool quick) {
  constexpr Index kShort = 512;
  std::ifstream file(folder / "index.json");
  if (!file) throw std::runtime_error((folder / "index.json").string() + ": cannot be opened");
  std::vector<Head> heads;
  for (const auto& entry : nlohmann::json::parse(file)) {
    if (entry.at("causal") || (quick && entry.at("n_k") > kShort)) continue;
    const std::string name = entry.at("name");
    const auto read = [&](const char* part) { return npy::read_matrix<float>(folder / (name + part)); };
    heads.push_back({name, {read("_q.npy"), read("_k.npy"), read("_v.npy")}});
  }
  return heads;
}

/// Attention to m keys drawn without replacement, each of which stands for n / m: a weight that is the same for all and
/// cancels.
void attend_to_sample(const Tokens<float>& tokens, Index m, std::uint64_t seed, Matrix<float>& out,
                      attn::Context& context) {
  families::Random random(seed);
  std::vector<Index> order(static_cast<std::size_t>(tokens.k.rows()));
  std::iota(order.begin(), order.end(), Index{0});
  m = std::min(m, tokens.k.rows());
  Matrix<float> k(m, tokens.k.cols()), v(m, tokens.v.cols());
  for (Index i = 0; i < m; ++i) {
    const auto at = static_cast<std::size_t>(i);
    std::swap(order[at], order[static_cast<std::size_t>(i + random.below(tokens.k.rows() - i))]);
    k.row(i) = tokens.k.row(order[at]);
    v.row(i) = tokens.v.row(order[at]);
  }
  make_method("softmax", 0, seed).forward({tokens.q, k, v}, out, context);
}

/// A line of the study: a method, and its landmarks, sampled keys or near clusters.
struct Contender {
  std::string_view method;
  Index m;
};

constexpr std::string_view kMean = "mean(v)", kSample = "sampled keys";

/// out <- the contender's result, and its time in ms. m = 0: an exact method, mean(v), or multipole's own counts.
double run(const Contender& contender, const Tokens<float>& tokens, std::uint64_t seed, Matrix<float>& out) {
  constexpr int kCalls = 4;
  attn::Context context;
  const auto ms = [&](const auto& call) { return 1e3 * bench::least_seconds(kCalls, call); };
  if (contender.method == kMean) return ms([&] { out.rowwise() = tokens.v.colwise().mean(); });
  if (contender.method == kSample) return ms([&] { attend_to_sample(tokens, contender.m, seed, out, context); });
  const auto method = contender.m == 0 ? attn::make_approximator<float>(contender.method)
                                       : make_method(contender.method, contender.m, seed);
  return ms([&] { method.forward({tokens.q, tokens.k, tokens.v}, out, context); });
}

const std::vector<Contender> kContenders{
    {"softmax", 0},          {kMean, 0},       {kSample, 64},    {kSample, 128},         {kSample, 256},
    {"nystrom", 64},         {"nystrom", 128}, {"nystrom", 256}, {"lifted-softmax", 64}, {"lifted-softmax", 128},
    {"lifted-softmax", 256}, {"multipole", 0}, {"multipole", 4}, {"multipole", 8},       {"multipole", 32},
    {"multipole", 64}};

/// The rows of one head, a sample for each seed.
std::vector<Row> rows_of(const Head& head, int seeds) {
  std::vector<Row> rows;
  for (const auto& [method, m] : kContenders) {
    rows.push_back({{{"tensor", head.name}, {"n", head.tokens.k.rows()}, {"method", std::string(method)}, {"m", m}}});
  }
  Matrix<float> exact(head.tokens.q.rows(), head.tokens.v.cols()), out = exact;
  for (int seed = 0; seed < seeds; ++seed) {
    double exact_ms = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const double ms = run(kContenders[i], head.tokens, static_cast<std::uint64_t>(seed), out);
      if (i == 0) {
        exact = out;
        exact_ms = ms;
      }
      rows[i].add("ms", ms);
      rows[i].add("speed-up", exact_ms / ms);
      rows[i].add("error", attn::relative_frobenius_error(out, exact));
    }
  }
  return rows;
}

/// Of every contender the median and the 90th percentile over heads, of whose samples the medians count.
Table summary_of(const std::vector<std::vector<Row>>& heads) {
  Table table{"tensor_summary", "The same over heads: median and 90th percentile of errors, median of speed-ups"};
  for (std::size_t i = 0; i < kContenders.size(); ++i) {
    const auto over_heads = [&](std::size_t figure) {
      std::vector<double> values;
      for (const auto& rows : heads) values.push_back(bench::quantile(rows[i].figures[figure].samples, 0.5));
      return values;
    };
    Row row{{{"method", std::string(kContenders[i].method)}, {"m", kContenders[i].m}}};
    row.add("error", bench::quantile(over_heads(2), 0.5));
    row.add("error 90 %", bench::quantile(over_heads(2), 0.9));
    row.add("speed-up", bench::quantile(over_heads(1), 0.5));
    table.rows.push_back(std::move(row));
  }
  return table;
}

}  // namespace

std::vector<Table> study_tensors(const Settings& settings) {
  Table table{"tensors",
              "Trained models' tokens: time of a forward pass on one core, speed-up over exact attention, and relative "
              "error; m landmarks, sampled keys or near clusters (0: multipole's own choice)"};
  std::vector<std::vector<Row>> heads;
  for (const Head& head : read_heads(settings.tensors, settings.quick)) {
    heads.push_back(rows_of(head, settings.seeds));
    table.rows.insert(table.rows.end(), heads.back().begin(), heads.back().end());
  }
  if (heads.empty()) throw std::runtime_error(settings.tensors + ": no head is listed that is not causal");
  return {table, summary_of(heads)};
}

}  // namespace accuracy
