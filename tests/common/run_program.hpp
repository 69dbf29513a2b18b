#pragma once

#include <cstdio>
#include <exception>

/// Calls run(options) and returns what main should: 0, or, where run throws, 1, with the reason behind the program's
/// name on standard error.
template <class Options>
int run_program(const char* name, void (&run)(const Options& options), const Options& options) {
  try {
    run(options);
    return 0;
  } catch (const std::exception& failure) {
    std::fprintf(stderr, "%s: %s\n", name, failure.what());
    return 1;
  }
}
