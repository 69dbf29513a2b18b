/// The comparison as a table, as JSON and as comma-separated values.
#pragma once

#include "compare/measure.hpp"
#include "compare/recommend.hpp"

#include <string>

/// What was recommended, and the C++ of it.
struct Recommendation {
  Advice advice;
  std::string line;
};

/// What the figures were measured on, in a line.
std::string heading(const Sequences& sequences, int threads);

/// The table, below it what its columns mean and which methods are missing.
std::string text_report(const Comparison& comparison, const Sequences& sequences);

std::string json_report(const Comparison& comparison, const Sequences& sequences, int threads,
                        const Recommendation& recommendation);

std::string csv_report(const Comparison& comparison);
