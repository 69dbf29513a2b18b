#include "contact_sheet.hpp"

#include "resize.hpp"
#include "text.hpp"

#include <algorithm>

namespace {

using attn::Index;

constexpr Index kSmallestWidth = 256;
constexpr float kPaper = 1.0f, kInk = 0.1f, kFaintInk = 0.4f;

/// Where things are on the sheet: a row of pictures is two lines of text, then the images.
struct Layout {
  Index magnification, text_scale, gap, width, height, line;

  explicit Layout(const Image& image)
      : magnification((kSmallestWidth + image.width - 1) / image.width),
        text_scale(std::max(Index{2}, magnification * image.width / 160)),
        gap(6 * text_scale),
        width(magnification * image.width),
        height(magnification * image.height),
        line(text_height(text_scale) + 2 * text_scale) {}

  Index label_height() const { return 2 * line; }
  Index left(Index column) const { return gap + column * (width + gap); }
  Index top(Index row) const { return gap + row * (label_height() + height + gap); }
};

void paste(Image& sheet, Index left, Index top, const Image& image) {
  for (Index y = 0; y < image.height; ++y) {
    sheet.rgb.middleRows((top + y) * sheet.width + left, image.width) =
        image.rgb.middleRows(y * image.width, image.width);
  }
}

}  // namespace

Image contact_sheet(const std::vector<std::vector<Picture>>& rows) {
  const Layout layout(rows.front().front().image);
  std::size_t columns = 0;
  for (const auto& row : rows) columns = std::max(columns, row.size());
  Image sheet(layout.left(static_cast<Index>(columns)), layout.top(static_cast<Index>(rows.size())));
  sheet.rgb.setConstant(kPaper);
  for (std::size_t row = 0; row < rows.size(); ++row) {
    for (std::size_t column = 0; column < rows[row].size(); ++column) {
      const Picture& picture = rows[row][column];
      const Index left = layout.left(static_cast<Index>(column)), top = layout.top(static_cast<Index>(row));
      draw_text(sheet, left, top, picture.title, layout.text_scale, kInk);
      draw_text(sheet, left, top + layout.line, picture.subtitle, layout.text_scale, kFaintInk);
      paste(sheet, left, top + layout.label_height(), magnified(picture.image, layout.magnification));
    }
  }
  return sheet;
}
