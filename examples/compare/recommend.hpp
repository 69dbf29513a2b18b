/// Which line of the table to use.
#pragma once

#include "compare/measure.hpp"

#include <optional>
#include <string>
#include <vector>

/// What is asked for: either limit, or both.
struct Wish {
  Target target = Target::softmax;
  std::optional<double> budget_ms, max_error;
};

/// The line that is recommended, or none; why; and for none, which one comes nearest.
struct Advice {
  std::optional<Row> row;
  std::string reason;
};

/// Of the methods that approximate the target and beat mean(v) in their worst head: with max_error the fastest whose
/// error is no larger in any head, else the one whose worst head is best, among those within the budget if there is
/// one. The exact method always counts.
Advice recommend(const std::vector<Row>& rows, const Wish& wish);
