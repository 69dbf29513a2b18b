/// An RGB image as tokens: one pixel a row, row by row from the top left, colours nominally in [0, 1]. PNG files in and
/// out.
#pragma once

#include <attn/matrix.hpp>

#include <filesystem>
#include <utility>

struct Image {
  attn::Index width = 0, height = 0;
  attn::Matrix<float> rgb;  // (width height, 3)

  Image() = default;
  Image(attn::Index w, attn::Index h) : width(w), height(h), rgb(w * h, 3) {}
  Image(attn::Index w, attn::Index h, attn::Matrix<float> colours) : width(w), height(h), rgb(std::move(colours)) {}
};

/// Reads any PNG: grey becomes RGB, alpha is dropped, 16 bits become 8. Throws std::runtime_error that names the file.
Image read_png(const std::filesystem::path& file);

/// Writes 8 bits a channel, colours clipped to [0, 1]. The file appears whole or not at all: it is written under a
/// temporary name beside it and renamed. Throws std::runtime_error that names the file.
void write_png(const std::filesystem::path& file, const Image& image);
