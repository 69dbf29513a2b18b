/// Which line of the table to use.
#pragma once

#include "compare/measure.hpp"

#include <optional>
#include <string>
#include <vector>

/// What is asked for: a limit, or both.
struct Wish {
  Target target = Target::softmax;
  std::optional<double> budget_ms, max_error;
};

/// The line that is recommended, why, and whether it is within the limits; where none is, it is the one nearest to
/// them.
struct Advice {
  Row row;
  std::string reason;
  bool fits;
};

/// Of the methods that approximate the target and beat mean(v) in their worst head: with max_error the fastest whose
/// error is no larger in any head, else the one whose worst head is best, among those within the budget if there is
/// one. The exact method always counts. The nearest where nothing fits exceeds a limit by the smallest factor.
Advice recommend(const std::vector<Row>& rows, const Wish& wish);

/// What to look at before the error of that line is relied on; made: these were made tokens.
std::string before_trusting(const Row& row, bool several_heads, bool made);
