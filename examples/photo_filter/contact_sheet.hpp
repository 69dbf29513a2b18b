/// Images of one size in rows, each under its label.
#pragma once

#include "image.hpp"

#include <string>
#include <vector>

struct Picture {
  Image image;
  std::string title, subtitle;
};

/// The rows of pictures, each with at least one, from top to bottom; small pictures are magnified until their labels
/// fit.
Image contact_sheet(const std::vector<std::vector<Picture>>& rows);
