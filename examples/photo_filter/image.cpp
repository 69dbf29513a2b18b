#include "image.hpp"

#include <png.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

namespace {

/// libpng's simplified interface, freed whatever happens.
struct PngImage {
  PngImage() { png.version = PNG_IMAGE_VERSION; }
  PngImage(const PngImage&) = delete;
  PngImage& operator=(const PngImage&) = delete;
  ~PngImage() { png_image_free(&png); }
  png_image png{};
};

std::runtime_error file_error(const char* what, const std::filesystem::path& file, const std::string& why) {
  return std::runtime_error(std::string(what) + " " + file.string() + ": " + why);
}

std::uint8_t to_byte(float colour) {
  return static_cast<std::uint8_t>(std::lround(255.0f * std::clamp(colour, 0.0f, 1.0f)));
}

void write_whole(const std::filesystem::path& file, const Image& image, const std::vector<std::uint8_t>& bytes) {
  PngImage p;
  p.png.width = static_cast<png_uint_32>(image.width);
  p.png.height = static_cast<png_uint_32>(image.height);
  p.png.format = PNG_FORMAT_RGB;
  if (png_image_write_to_file(&p.png, file.c_str(), 0, bytes.data(), 0, nullptr) == 0) {
    throw file_error("cannot write", file, p.png.message);
  }
}

}  // namespace

Image read_png(const std::filesystem::path& file) {
  PngImage p;
  if (png_image_begin_read_from_file(&p.png, file.c_str()) == 0) throw file_error("cannot read", file, p.png.message);
  p.png.format = PNG_FORMAT_RGBA;  // with alpha, which is then dropped: PNG_FORMAT_RGB would blend it with a background
  std::vector<std::uint8_t> rgba(PNG_IMAGE_SIZE(p.png));
  if (png_image_finish_read(&p.png, nullptr, rgba.data(), 0, nullptr) == 0) {
    throw file_error("cannot read", file, p.png.message);
  }

  Image image(p.png.width, p.png.height);
  for (attn::Index pixel = 0; pixel < image.rgb.rows(); ++pixel) {
    for (attn::Index c = 0; c < 3; ++c) {
      image.rgb(pixel, c) = static_cast<float>(rgba[static_cast<std::size_t>(4 * pixel + c)]) / 255.0f;
    }
  }
  return image;
}

void write_png(const std::filesystem::path& file, const Image& image) {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(image.rgb.size()));
  std::transform(image.rgb.data(), image.rgb.data() + image.rgb.size(), bytes.begin(), to_byte);

  std::filesystem::path part = file;
  part += ".part";
  std::error_code error;
  try {
    write_whole(part, image, bytes);
    std::filesystem::rename(part, file);
  } catch (const std::filesystem::filesystem_error& failure) {
    std::filesystem::remove(part, error);
    throw file_error("cannot write", file, failure.code().message());
  } catch (...) {
    std::filesystem::remove(part, error);
    throw;
  }
}
