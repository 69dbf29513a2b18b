/// Several images of one size side by side, each under its label.
#pragma once

#include "image.hpp"

#include <string>
#include <vector>

struct Picture {
  Image image;
  std::string title, subtitle;
};

/// The pictures, at least one, from left to right and from top to bottom, three a line; small ones are magnified until their
/// labels fit.
Image contact_sheet(const std::vector<Picture>& pictures);
