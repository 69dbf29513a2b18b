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

/// By which factor a line exceeds the limits; at most 1 within them.
double excess(const Row& row, const Wish& wish) {
  const double of_error = wish.max_error ? row.worst_head / *wish.max_error : 0;
  const double of_time = wish.budget_ms ? row.milliseconds / *wish.budget_ms : 0;
  return std::max(of_error, of_time);
}

}  // namespace

Advice recommend(const std::vector<Row>& rows, const Wish& wish) {
  const std::vector<Row> worth = candidates(rows, wish.target);
  const auto by_time = [](const Row& row) { return std::tuple(row.milliseconds, row.worst_head); };
  const auto by_error = [](const Row& row) { return std::tuple(row.worst_head, row.milliseconds); };
  std::vector<Row> fits;
  std::ranges::copy_if(worth, std::back_inserter(fits), [&](const Row& row) { return excess(row, wish) <= 1; });
  if (fits.empty()) {
    const Row& nearest = *std::ranges::min_element(
        worth, {}, [&](const Row& row) { return std::tuple(excess(row, wish), by_time(row)); });
    return {nearest, "No method that beats mean(v) has " + limits(wish) + "; the nearest: " + figures(nearest), false};
  }
  const Row& best =
      wish.max_error ? *std::ranges::min_element(fits, {}, by_time) : *std::ranges::min_element(fits, {}, by_error);
  std::string reason =
      (wish.max_error ? "The fastest with " : "The most accurate with ") + limits(wish) + ": " + figures(best);
  const double baseline = mean_row(rows, wish.target).worst_head;
  if (wish.max_error && baseline <= *wish.max_error) {
    reason += "\nmean(v), which costs next to nothing, is within that error too: " + error_text(baseline);
  }
  return {best, reason, true};
}

std::string before_trusting(const Row& row, bool several_heads, bool made) {
  if (row.exact) return "";
  const std::string where = "query " + std::to_string(row.token_of_worst_row) +
                            (several_heads ? " of head " + std::to_string(row.head_of_worst_row) : "");
  return "Its worst row is " + where + ", off by " + error_text(row.worst_row) + " of an ordinary row." +
         (made ? " These tokens are made: measure your model's with --q, --k and --v."
               : " Before you rely on the error, measure other inputs of the model, the longest among them, and the "
                 "model's own loss with the method in place.");
}
