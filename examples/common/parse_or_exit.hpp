#pragma once

#include <CLI/CLI.hpp>

#include <cstdlib>

/// Reads the command line. Where it asks for help, or is wrong, prints so and ends the program.
inline void parse_or_exit(CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& end) {
    std::exit(app.exit(end));
  }
}
