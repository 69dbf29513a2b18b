/// What attn::Automatic chooses for each head, which may differ by an order of magnitude.
#pragma once

#include "compare/options.hpp"
#include "compare/sequences.hpp"

#include <attn/automatic.hpp>

#include <string>
#include <vector>

/// A head's choice, its true error, and the time that it took beside exact attention's.
struct HeadChoice {
  attn::Choice choice;
  double error, milliseconds, exact_milliseconds;
};

/// All heads, one after another, for one error asked for.
struct AutomaticHeads {
  double max_error;
  std::vector<HeadChoice> heads;

  double milliseconds() const;
  double exact_milliseconds() const;
};

/// For options.max_error, or else for the smallest of some errors by which all heads stay within options.budget_ms, or
/// for the largest of them if none does.
AutomaticHeads run_automatic(const Options& options, const Sequences& sequences);

/// A line for each head, the sum of them, and the C++ that computes it.
std::string automatic_report(const AutomaticHeads& run, const Sequences& sequences);
