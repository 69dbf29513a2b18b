/// Text in an image, by a font of fixed width: letters, digits and some punctuation, 5 pixels wide and 8 high times
/// scale.
#pragma once

#include "image.hpp"

#include <string_view>

attn::Index text_width(std::string_view text, attn::Index scale);
attn::Index text_height(attn::Index scale);

/// Draws text with its top left corner at (left, top), which must lie in the image; what reaches beyond it is cut off.
void draw_text(Image& image, attn::Index left, attn::Index top, std::string_view text, attn::Index scale, float grey);
