#include "contact_sheet.hpp"

#include "resize.hpp"
#include "text.hpp"

#include <algorithm>

namespace {

using attn::Index;

constexpr Index kAcross = 3, kSmallestWidth = 256;
constexpr float kPaper = 1.0f, kInk = 0.1f, kFaintInk = 0.4f;

/// Where things are on the sheet: a line of pictures is two lines of text, then the images.
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
    sheet.rgb.middleRows((top + y) * sheet.width + left, image.width) = image.rgb.middleRows(y * image.width, image.width);
  }
}

}  // namespace

Image contact_sheet(const std::vector<Picture>& pictures) {
  const Layout layout(pictures.front().image);
  const auto count = static_cast<Index>(pictures.size());
  const Index columns = std::min(kAcross, count);
  Image sheet(layout.left(columns), layout.top((count + columns - 1) / columns));
  sheet.rgb.setConstant(kPaper);
  for (Index i = 0; i < count; ++i) {
    const Picture& picture = pictures[static_cast<std::size_t>(i)];
    const Index left = layout.left(i % columns), top = layout.top(i / columns);
    draw_text(sheet, left, top, picture.title, layout.text_scale, kInk);
    draw_text(sheet, left, top + layout.line, picture.subtitle, layout.text_scale, kFaintInk);
    paste(sheet, left, top + layout.label_height(), magnified(picture.image, layout.magnification));
  }
  return sheet;
}
