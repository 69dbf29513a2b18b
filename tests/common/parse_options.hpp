#pragma once

#include <CLI/CLI.hpp>

#include <cstdlib>
#include <string>

/// What the command line asks for, of the options that add_options tells app of. Where it asks for help, which ends
/// with the examples, or is wrong, prints so and ends the program.
template <class Options>
Options parse_options(const std::string& description, void (&add_options)(CLI::App& app, Options& options), int argc,
                      char** argv, const std::string& examples = "") {
  Options options;
  CLI::App app(description);
  app.footer(examples);
  add_options(app, options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& end) {
    std::exit(app.exit(end));
  }
  return options;
}
