/// A table of text for a terminal.
#pragma once

#include <string>
#include <vector>

/// Lines of cells, each column as wide as its widest cell, the first one flush left and the others flush right, with a
/// rule under the first line. All lines must have as many cells as the first.
std::string table(const std::vector<std::vector<std::string>>& lines);
