#include "common/table.hpp"

#include <algorithm>

std::string table(const std::vector<std::vector<std::string>>& lines) {
  std::vector<std::size_t> widths(lines.front().size());
  for (const auto& line : lines) {
    for (std::size_t column = 0; column < widths.size(); ++column) {
      widths[column] = std::max(widths[column], line[column].size());
    }
  }

  std::string text;
  for (const auto& line : lines) {
    for (std::size_t column = 0; column < widths.size(); ++column) {
      const std::string padding(widths[column] - line[column].size(), ' ');
      text += column == 0 ? line[column] + padding : "  " + padding + line[column];
    }
    text += '\n';
    if (&line == &lines.front()) text += std::string(text.size() - 1, '-') + '\n';
  }
  return text;
}
