#include "compare/report.hpp"

#include "common/number.hpp"
#include "common/table.hpp"

#include <attn/version.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <utility>
#include <vector>

namespace {

using attn::Index;
using Cells = std::vector<std::string>;

std::string size_text(Index size) {
  return size > 0 ? std::to_string(size) : "";
}

/// What a row's size is a number of, and 0 of the other.
Index landmarks(const Row& row) {
  return has_clusters(row.method) ? 0 : row.size;
}
Index near(const Row& row) {
  return row.size - landmarks(row);
}

/// Which columns a table has that another has not.
struct Columns {
  bool worst_head, spectral;
};

Columns columns_of(const Comparison& comparison, const Sequences& s) {
  const bool spectral = std::ranges::any_of(comparison.rows, [](const Row& row) { return !std::isnan(row.spectral); });
  return {s.num_heads() > 1, spectral};
}

/// A line of the table. With several heads there is a column for the worst; the error against softmax is only shown
/// where it is another.
Cells cells(const Row& row, const Columns& columns) {
  const bool timed = !std::isnan(row.milliseconds);
  Cells line{row.method, size_text(landmarks(row)), size_text(near(row)), std::string(target_name(row.target))};
  line.push_back(timed ? milliseconds_text(row.milliseconds) : "");
  line.push_back(timed ? number("%.1f", row.speed_up) : "");
  line.push_back(error_text(row.error));
  if (columns.worst_head) line.push_back(error_text(row.worst_head));
  if (columns.spectral) line.push_back(std::isnan(row.spectral) ? "" : number("%.1g", row.spectral));
  line.push_back(error_text(row.worst_row));
  line.push_back(row.target == Target::softmax ? "" : error_text(row.softmax_error));
  line.push_back(timed ? bytes_text(row.scratch_bytes) : "");
  return line;
}

std::string spectral_note(const Columns& columns, const Sequences& s) {
  if (s.causal != attn::Causal::none) return "";
  if (!columns.spectral) return "spectral: left out, --spectral-seconds is too short for it\n";
  return "spectral: |A - T|_2 / |T|_2 of the method's matrix A and its target's T, estimated by power iteration" +
         std::string(columns.worst_head ? ", of the worst head\n" : "\n");
}

/// Which times are not to be trusted, if any.
std::string spread_note(const Comparison& comparison) {
  constexpr double kWide = 1.5;
  const auto timed = [](const Row& row) { return std::isnan(row.spread) ? 0 : row.spread; };
  const Row& widest = *std::ranges::max_element(comparison.rows, {}, timed);
  if (!(widest.spread > kWide)) return "";
  return "Times vary: the slowest run of " + widest.method + with_size(widest.method, widest.size) + " took " +
         number("%.1f", widest.spread) +
         " times as long as the fastest. Measure again when the machine is idle, or with more --repetitions.\n";
}

nlohmann::ordered_json json_row(const Row& row) {
  nlohmann::ordered_json json{
      {"method", row.method}, {"landmarks", nullptr}, {"near", nullptr}, {"target", target_name(row.target)}};
  if (landmarks(row) > 0) json["landmarks"] = landmarks(row);
  if (near(row) > 0) json["near"] = near(row);
  json["ms"] = row.milliseconds;  // null where it is NaN, as for all that follow
  json["spread"] = row.spread;
  json["speed_up"] = row.speed_up;
  json["error"] = row.error;
  json["worst_head"] = row.worst_head;
  json["spectral"] = row.spectral;
  json["worst_row"] = row.worst_row;
  json["softmax_error"] = row.softmax_error;
  json["scratch_bytes"] = row.scratch_bytes;
  return json;
}

nlohmann::ordered_json json_inputs(const Sequences& s) {
  return {{"description", s.description},
          {"batch", s.batch},
          {"heads", s.heads},
          {"kv_heads", s.kv_heads},
          {"n_q", s.n_q},
          {"n_k", s.n_k},
          {"d", s.d},
          {"d_v", s.d_v},
          {"masked", !s.keep.empty()},
          {"causal", s.causal != attn::Causal::none}};
}

std::string csv_number(double value) {
  return std::isnan(value) ? "" : number("%.9g", value);
}

}  // namespace

std::string heading(const Sequences& s, int threads) {
  std::ostringstream line;
  line << s.description << ": n_q = " << s.n_q << ", n_k = " << s.n_k << ", d = " << s.d << ", d_v = " << s.d_v << ", ";
  line << s.num_heads() << (s.num_heads() == 1 ? " head" : " heads");
  if (s.causal == attn::Causal::upper_left) line << ", causal (upper left)";
  if (s.causal == attn::Causal::lower_right) line << ", causal (lower right)";
  if (!s.keep.empty()) line << ", masked";
  line << ", float, " << threads << (threads == 1 ? " thread" : " threads");
  return line.str();
}

std::string text_report(const Comparison& comparison, const Sequences& s) {
  const Columns columns = columns_of(comparison, s);
  Cells titles{"method", "landmarks", "near", "target", "ms", "speed-up", "error"};
  if (columns.worst_head) titles.push_back("worst head");
  if (columns.spectral) titles.push_back("spectral");
  titles.insert(titles.end(), {"worst row", "error to softmax", "scratch"});
  std::vector<Cells> lines{std::move(titles)};
  for (const Row& row : comparison.rows) lines.push_back(cells(row, columns));
  std::string text = table(lines);
  text += "\nerror: |out - target|_F / |target|_F against exact attention of the method's own target";
  text += columns.worst_head ? ", averaged over heads; worst head: its maximum\n" : "\n";
  text += spectral_note(columns, s);
  text += "worst row: the largest error of an output row, relative to the root mean square row of the target\n";
  text += "ms: " + std::string(columns.worst_head ? "all heads by multi_head, " : "") +
          "the median of several runs; speed-up: over exact attention of the method's own target\n";
  for (const NotSupported& method : comparison.not_supported)
    text += "not run: " + method.method + " (" + method.reason + ")\n";
  return text + spread_note(comparison);
}

std::string json_report(const Comparison& comparison, const Sequences& s, int threads,
                        const Recommendation& recommendation) {
  std::ostringstream version;
  version << ATTN_VERSION_MAJOR << '.' << ATTN_VERSION_MINOR << '.' << ATTN_VERSION_PATCH;
  nlohmann::ordered_json json{{"attn_version", version.str()}, {"inputs", json_inputs(s)}, {"threads", threads}};
  json["rows"] = nlohmann::ordered_json::array();
  for (const Row& row : comparison.rows) json["rows"].push_back(json_row(row));
  json["not_supported"] = nlohmann::ordered_json::object();
  for (const NotSupported& method : comparison.not_supported) json["not_supported"][method.method] = method.reason;
  json["recommendation"] = json_row(recommendation.advice.row);
  json["recommendation"]["fits"] = recommendation.advice.fits;
  json["recommendation"]["line"] = recommendation.line;
  return json.dump(2) + "\n";
}

std::string csv_report(const Comparison& comparison) {
  std::ostringstream text;
  text << "method,landmarks,near,target,ms,speed_up,error,worst_head,spectral,worst_row,softmax_error,scratch_bytes\n";
  for (const Row& row : comparison.rows) {
    text << row.method << ',' << size_text(landmarks(row)) << ',' << size_text(near(row)) << ','
         << target_name(row.target);
    for (const double x :
         {row.milliseconds, row.speed_up, row.error, row.worst_head, row.spectral, row.worst_row, row.softmax_error}) {
      text << ',' << csv_number(x);
    }
    text << ',' << row.scratch_bytes << '\n';
  }
  return text.str();
}
