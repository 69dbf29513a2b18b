#include "compare/recommend.hpp"

#include "common/number.hpp"

#include <algorithm>
#include <iterator>
#include <tuple>

namespace {

const Row& mean_row(const std::vector<Row>& rows, Target target) {
  return *std::ranges::find_if(rows,
                               [&](const Row& row) { return row.method == kMeanOfValues && row.target == target; });
}

/// Methods of the target that are worth their time: not an approximation without any error, which is the exact method
/// under another name.
std::vector<Row> candidates(const std::vector<Row>& rows, Target target) {
  const double baseline = mean_row(rows, target).worst_head;
  std::vector<Row> worth;
  for (const Row& row : rows) {
    if (row.target == target && row.method != kMeanOfValues &&
        (row.exact || (row.worst_head > 0 && row.worst_head < baseline))) {
      worth.push_back(row);
    }
  }
  return worth;
}

std::string limits(const Wish& wish) {
  std::string text;
  if (wish.max_error) text += "an error of at most " + number("%.4g", *wish.max_error);
  if (wish.budget_ms)
    text += (text.empty() ? "" : " and ") + ("a time of at most " + number("%.4g", *wish.budget_ms)) + " ms";
  return text;
}

std::string figures(const Row& row) {
  return row.method + (row.exact ? " (exact)" : with_size(row.method, row.size)) + ", error " +
         error_text(row.worst_head) + ", " + milliseconds_text(row.milliseconds) + " ms";
}

}  // namespace

Advice recommend(const std::vector<Row>& rows, const Wish& wish) {
  const std::vector<Row> worth = candidates(rows, wish.target);
  const auto by_time = [](const Row& row) { return std::tuple(row.milliseconds, row.worst_head); };
  const auto by_error = [](const Row& row) { return std::tuple(row.worst_head, row.milliseconds); };
  std::vector<Row> fits;
  std::ranges::copy_if(worth, std::back_inserter(fits), [&](const Row& row) {
    return !(wish.max_error && row.worst_head > *wish.max_error) &&
           !(wish.budget_ms && row.milliseconds > *wish.budget_ms);
  });
  if (fits.empty()) {
    const Row& nearest = *std::ranges::min_element(worth, {}, by_time);
    return {std::nullopt,
            "No method that beats mean(v) has " + limits(wish) + "; the fastest that does: " + figures(nearest)};
  }
  const Row& best =
      wish.max_error ? *std::ranges::min_element(fits, {}, by_time) : *std::ranges::min_element(fits, {}, by_error);
  std::string reason =
      (wish.max_error ? "The fastest with " : "The most accurate with ") + limits(wish) + ": " + figures(best);
  const double baseline = mean_row(rows, wish.target).worst_head;
  if (wish.max_error && baseline <= *wish.max_error) {
    reason += "\nmean(v), which costs next to nothing, is within that error too: " + error_text(baseline);
  }
  return {best, reason};
}
