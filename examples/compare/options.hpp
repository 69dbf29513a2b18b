/// What the user can set.
#pragma once

#include "common/families.hpp"
#include "compare/methods.hpp"

#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

struct Options {
  std::optional<std::string> q, k, v, mask, json, csv;
  std::optional<attn::Index> keep_length;
  families::Family family = families::Family::smooth;
  attn::Index n = 2048, d = 64;
  std::uint64_t seed = 0;
  std::string causal;  // empty, upper_left or lower_right
  std::vector<attn::Index> landmarks{32, 64, 128, 256}, near{0, 4, 64};
  std::vector<std::string> methods;  // none: all
  Target target = Target::softmax;
  std::optional<double> budget_ms, max_error;
  double spectral_seconds = 30;
  int threads = 0, repetitions = 5;
};

/// What the command line asks for. Where that is help, or where it is wrong, prints so and ends the program.
Options read_options(int argc, char** argv);

/// The name of a family as --family takes it.
std::string family_name(families::Family family);

/// What options.causal stands for.
attn::Causal wanted_causal(const Options& options);
