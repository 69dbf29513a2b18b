/// What the user can set.
#pragma once

#include <attn/matrix.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

struct Options {
  std::optional<std::string> input;
  std::string size = "256x192", output = "photo_filter_output";
  std::optional<double> s;
  double t = 0.15, noise = 0.08, gamma = 1e-3;
  std::uint64_t seed = 0;
  std::vector<attn::Index> landmarks{256, 512, 1024};
  std::vector<std::string> methods;  // none: all
  int threads = 0;
  bool no_exact = false;
};

struct Size {
  attn::Index width, height;
};

/// What the command line asks for. Where that is help, or where it is wrong, prints so and ends the program.
Options read_options(int argc, char** argv);

/// The size that options.size stands for, given that of the photo.
Size wanted_size(const Options& options, Size photo);
