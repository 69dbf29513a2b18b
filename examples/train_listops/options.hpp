/// What a user can choose.
#pragma once

#include "train_listops/listops.hpp"

#include <attn/any_approximator.hpp>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

struct Options {
  std::string method = "softmax";
  attn::MethodOptions of_method{};
  listops::Grammar grammar{};
  std::size_t num_training = 20'000, num_validation = 1'000;
  int batch = 32, steps = 5'000, warmup = 100, every = 100;
  double learning_rate = 1e-3, minutes = 10;
  std::uint64_t seed = 0, data_seed = 0;
  int threads = 1;
  std::optional<std::string> csv{}, spectrum{};
};

/// What the command line asks for. Where that is help, or where it is wrong, prints so and ends the program.
Options read_options(int argc, char** argv);
