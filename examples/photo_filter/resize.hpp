/// Making images smaller and larger.
#pragma once

#include "image.hpp"

/// The image scaled down, never up, to the largest size of its own shape within max_width x max_height; each new pixel
/// is the mean of the box of old ones that it covers. Half the width and height is thus the mean over 2 x 2 pixels.
Image fit_within(const Image& image, attn::Index max_width, attn::Index max_height);

/// Each pixel repeated factor times in both directions.
Image magnified(const Image& image, attn::Index factor);
