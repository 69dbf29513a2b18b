/// Runs every method on the same tokens: what each costs, and how far it is from its target.
#pragma once

#include "compare/methods.hpp"
#include "compare/options.hpp"
#include "compare/sequences.hpp"

#include <attn/matrix.hpp>

#include <cstddef>
#include <limits>
#include <string>
#include <vector>

/// A line of the table; figures that there are none of are NaN.
struct Row {
  static constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

  std::string method;
  Target target = Target::softmax;
  bool exact = false;
  attn::Index size = 0;                           // landmarks or near clusters, as make_method takes it
  double milliseconds = kNone, speed_up = kNone;  // for all heads by multi_head; over the exact method of the target
  double spread = kNone;                          // the slowest run's time over the fastest's
  double error = kNone, worst_head = kNone;       // |out - target|_F / |target|_F: mean and maximum over heads
  double worst_row = kNone;                       // attn::worst_row_error, its maximum over heads
  attn::Index head_of_worst_row = 0, token_of_worst_row = 0;
  double spectral = kNone;        // |A~ - A|_2 / |A|_2 of the operators, estimated: maximum over heads
  double softmax_error = kNone;   // error against softmax whatever the target is
  std::size_t scratch_bytes = 0;  // that the context grew to
};

inline constexpr std::string_view kMeanOfValues = "mean(v)";

/// A method that these tokens' masks or shapes rule out.
struct NotSupported {
  std::string method, reason;
};

struct Comparison {
  std::vector<Row> rows;  // for each target the exact method, mean(v), and the approximations
  std::vector<NotSupported> not_supported;
};

/// Runs the exact method of every target that is needed, then each chosen approximation of each size.
/// Shows a progress bar on a terminal.
Comparison compare(const Options& options, const Sequences& sequences);
