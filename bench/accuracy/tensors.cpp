#include "accuracy/contenders.hpp"
#include "accuracy/heads.hpp"
#include "accuracy/study.hpp"
#include "common/samples.hpp"

#include <attn/metrics.hpp>

#include <algorithm>
#include <iterator>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace accuracy {
namespace {

/// Where Row::figures has them.
constexpr std::size_t kMs = 0, kSpeedUp = 1, kError = 2;

double median(const Row& row, std::size_t figure) {
  return bench::quantile(row.figures[figure].samples, 0.5);
}

/// A contender of a head, and what it needs to run.
struct Entry {
  Contender contender;
  Row row;
  Forward forward{};
};

/// The contenders that take the head's inputs.
std::vector<Entry> entries_of(const Head& head) {
  std::vector<Entry> entries;
  for (Contender& contender : all_contenders()) {
    if (!make_forward(contender, 0, head.inputs())) continue;
    Row row{{{"tensor", head.name},
             {"model", head.model()},
             {"n", head.tokens.k.rows()},
             {"method", contender.method},
             {"m", contender.m}}};
    entries.push_back({std::move(contender), std::move(row)});
  }
  return entries;
}

/// Adds the times of a round, in which each entry runs once, after the exact methods; with first, the errors too, and
/// no times, for that call also fetches memory.
void add_round(const Head& head, std::vector<Entry>& entries, bool first) {
  const attn::Inputs<float> in = head.inputs();
  Matrix<float> out(in.q.rows(), in.v.cols());
  std::vector<std::pair<Matrix<float>, double>> exact;
  const auto exact_of = [&](const Contender& c) -> auto& { return exact[c.target() == "softmax" ? 0 : 1]; };
  for (Entry& entry : entries) {
    const double ms = 1e3 * bench::seconds_of(1, [&] { entry.forward(in, out); });
    if (exact.size() < 2) exact.emplace_back(out, ms);
    const auto& [result, exact_ms] = exact_of(entry.contender);
    if (first) {
      entry.row.add("error", attn::relative_frobenius_error(out, result));
    } else {
      entry.row.add("ms", ms);
      entry.row.add("speed-up", exact_ms / ms);
    }
  }
}

/// The rows of one head: an error for each seed, and times of some rounds, in which all take turns.
std::vector<Row> rows_of(const Head& head, const Settings& settings) {
  const int rounds = settings.quick ? 1 : 4;
  std::vector<Entry> entries = entries_of(head);
  for (Entry& entry : entries) entry.row.figures = {{"ms", {}}, {"speed-up", {}}, {"error", {}}};
  for (int seed = 0; seed < settings.seeds; ++seed) {
    for (Entry& entry : entries) {
      entry.forward = make_forward(entry.contender, static_cast<std::uint64_t>(seed), head.inputs());
    }
    for (int round = 0; round <= rounds; ++round) add_round(head, entries, round == 0);
  }
  std::vector<Row> rows;
  for (Entry& entry : entries) rows.push_back(std::move(entry.row));
  return rows;
}

template <class T>
const T& label(const Row& row, std::string_view name) {
  return std::get<T>(std::ranges::find(row.labels, name, [](const auto& l) { return l.first; })->second);
}

/// Of every contender the median and the 90th percentile over heads, of whose samples the medians count.
Table summary_of(const std::vector<std::vector<Row>>& heads, std::string_view name, std::string_view which) {
  Table table{std::string(name), "The same over the " + std::to_string(heads.size()) + std::string(which) +
                                     ": median and 90th percentile of errors, medians of times and speed-ups"};
  for (std::size_t i = 0; !heads.empty() && i < heads[0].size(); ++i) {
    const auto over_heads = [&](std::size_t figure, double fraction) {
      std::vector<double> values;
      for (const auto& rows : heads) values.push_back(median(rows[i], figure));
      return bench::quantile(values, fraction);
    };
    Row row{{{"method", label<std::string>(heads[0][i], "method")}, {"m", label<Index>(heads[0][i], "m")}}};
    row.add("error", over_heads(kError, 0.5));
    row.add("error 90 %", over_heads(kError, 0.9));
    row.add("ms", over_heads(kMs, 0.5));
    row.add("speed-up", over_heads(kSpeedUp, 0.5));
    table.rows.push_back(std::move(row));
  }
  return table;
}

/// Multipole by itself against the least error of a rival that takes no more time.
std::optional<Row> comparison_of(const std::vector<Row>& rows) {
  constexpr std::string_view kRivals[] = {"nystrom", "lifted-softmax", kWildCat, kBinnedWildCat};
  const auto method = [](const Row& row) -> const std::string& { return label<std::string>(row, "method"); };
  const auto own = std::ranges::find_if(
      rows, [&](const Row& row) { return method(row) == "multipole" && label<Index>(row, "m") == 0; });
  const Row* best = nullptr;
  for (const Row& row : rows) {
    if (std::ranges::find(kRivals, method(row)) == std::end(kRivals)) continue;
    if (median(row, kMs) > median(*own, kMs)) continue;
    if (best == nullptr || median(row, kError) < median(*best, kError)) best = &row;
  }
  if (best == nullptr) return std::nullopt;
  Row row{{own->labels[0], own->labels[2], {"best", method(*best)}, {"m", label<Index>(*best, "m")}}};
  row.figures = {{"its ms", best->figures[kMs].samples},
                 {"multipole's ms", own->figures[kMs].samples},
                 {"its error", best->figures[kError].samples},
                 {"multipole's error", own->figures[kError].samples}};
  row.add("quotient", median(*own, kError) / median(*best, kError));
  return row;
}

}  // namespace

std::vector<Table> study_tensors(const Settings& settings) {
  constexpr Index kShort = 512;
  Table table{"tensors",
              "Trained models' tokens: time of a forward pass on one core, speed-up over exact attention, and relative "
              "error; m landmarks, sampled keys or near clusters (0: multipole's own choice)"};
  Table comparison{"tensor_comparison",
                   "Multipole by itself beside the best of nystrom, lifted-softmax and wildcat that takes no more "
                   "time, and the quotient of their errors"};
  std::vector<std::vector<Row>> whole, causal;
  for (const Head& head : read_heads(settings.tensors, settings.quick ? kShort : std::numeric_limits<Index>::max())) {
    if (!make_forward({"multipole"}, 0, head.inputs())) continue;
    std::vector<Row> rows = rows_of(head, settings);
    table.rows.insert(table.rows.end(), rows.begin(), rows.end());
    if (std::optional<Row> row = comparison_of(rows)) comparison.rows.push_back(*std::move(row));
    (head.causal ? causal : whole).push_back(std::move(rows));
  }
  std::vector<Table> tables{std::move(table), summary_of(whole, "tensor_summary", " heads that see all keys"),
                            summary_of(causal, "tensor_causal", " causal heads"), std::move(comparison)};
  std::erase_if(tables, [](const Table& found) { return found.rows.empty(); });
  if (tables.empty()) throw std::runtime_error("no head of the study tensors can be measured");
  return tables;
}

}  // namespace accuracy
