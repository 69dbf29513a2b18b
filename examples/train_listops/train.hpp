/// Trains a transformer on ListOps.
#pragma once

#include "train_listops/options.hpp"

/// Prints its progress and writes the files that options ask for. Throws std::exception's kind where options do not go
/// together or a file cannot be written.
void train(const Options& options);
