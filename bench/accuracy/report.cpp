#include "accuracy/report.hpp"

#include "common/number.hpp"
#include "common/samples.hpp"
#include "common/table.hpp"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <variant>

namespace accuracy {
namespace {

std::string cell(const std::variant<std::string, Index, double>& label) {
  if (const auto* text = std::get_if<std::string>(&label)) return *text;
  if (const auto* count = std::get_if<Index>(&label)) return std::to_string(*count);
  return number("%g", std::get<double>(label));
}

/// (maximum - minimum) / median, the largest of the row's.
double widest(const Row& row) {
  double width = 0;
  for (const Figure& figure : row.figures) {
    const bench::Spread s = bench::spread(figure.samples);
    if (s.median > 0) width = std::max(width, (s.maximum - s.minimum) / s.median);
  }
  return width;
}

}  // namespace

void Row::add(std::string_view figure, double sample) {
  const auto found = std::ranges::find(figures, figure, &Figure::name);
  if (found != figures.end()) return found->samples.push_back(sample);
  figures.push_back({std::string(figure), {sample}});
}

std::string text_of(const Table& table) {
  std::vector<std::vector<std::string>> lines(1);
  for (const auto& label : table.rows.front().labels) lines[0].push_back(label.first);
  for (const Figure& figure : table.rows.front().figures) lines[0].push_back(figure.name);
  lines[0].push_back("spread");
  for (const Row& row : table.rows) {
    std::vector<std::string>& line = lines.emplace_back();
    for (const auto& label : row.labels) line.push_back(cell(label.second));
    for (const Figure& figure : row.figures) line.push_back(number("%.3g", bench::spread(figure.samples).median));
    line.push_back(widest(row) > 10 ? "> 1000 %" : number("%.0f %%", 100 * widest(row)));
  }
  return table.title + "\n\n" + ::table(lines);
}

nlohmann::ordered_json json_of(const Table& table) {
  nlohmann::ordered_json json{{"title", table.title}, {"rows", nlohmann::ordered_json::array()}};
  for (const Row& row : table.rows) {
    nlohmann::ordered_json& line = json["rows"].emplace_back(nlohmann::ordered_json::object());
    for (const auto& [name, label] : row.labels)
      std::visit([&line, &key = name](const auto& x) { line[key] = x; }, label);
    for (const Figure& figure : row.figures) {
      const bench::Spread s = bench::spread(figure.samples);
      line[figure.name] = {{"median", s.median}, {"min", s.minimum}, {"max", s.maximum}};
    }
  }
  return json;
}

}  // namespace accuracy
