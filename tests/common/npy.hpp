/// Reader of NumPy's .npy files: little-endian floating-point numbers of 16, 32 and 64 bits, integers of 32 and 64,
/// bytes and booleans, in C and Fortran order, with any number of dimensions.
#pragma once

#include <attn/matrix.hpp>

#include <algorithm>
#include <bit>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <optional>
#include <regex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace npy {

using attn::Index;

static_assert(std::endian::native == std::endian::little, "npy.hpp reads little-endian files as they are");

/// An array of any number of dimensions, its values in C order: the last index varies fastest.
template <class T>
struct Array {
  std::vector<Index> shape;
  std::vector<T> values;
  bool of_floats;  ///< whether the file's own elements are floating-point numbers, not integers, bytes or booleans
};

/// "(2, 3)", and "(4,)" for one dimension, as NumPy writes them.
inline std::string shape_text(const std::vector<Index>& shape) {
  std::string text = "(";
  for (std::size_t axis = 0; axis < shape.size(); ++axis) text += (axis == 0 ? "" : ", ") + std::to_string(shape[axis]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

namespace detail {

[[noreturn]] inline void refuse(const std::filesystem::path& path, const std::string& what) {
  throw std::runtime_error(path.string() + ": " + what);
}

struct Header {
  std::string type;
  bool fortran_order;
  std::vector<Index> shape;
  std::size_t data_offset;
};

/// The text of the header, which the file then stands behind.
inline std::string read_header_text(const std::filesystem::path& path, std::istream& file) {
  constexpr std::uint32_t kLongest = 1 << 12;  // of arrays without fields; std::regex takes stack for every byte
  char start[8] = {};
  file.read(start, sizeof start);
  if (!file || std::string_view(start, 6) != "\x93NUMPY")
    refuse(path, "expected a .npy file, found none of its marks at the start");
  const int version = start[6];
  if (version < 1 || version > 3)
    refuse(path, "expected a .npy file of version 1, 2 or 3, found version " + std::to_string(version));
  char little_endian[4] = {};
  file.read(little_endian, version == 1 ? 2 : 4);
  const auto length = std::bit_cast<std::uint32_t>(little_endian);
  if (length > kLongest)
    refuse(path, "expected a header of at most 4096 bytes, found one of " + std::to_string(length));
  std::string text(length, ' ');
  file.read(text.data(), static_cast<std::streamsize>(length));
  if (!file) refuse(path, "the file ends within its header");
  return text;
}

inline std::string field(const std::filesystem::path& path, const std::string& header, const std::string& name,
                         const char* value) {
  std::smatch match;
  if (std::regex_search(header, match, std::regex("'" + name + "':\\s*" + value))) return match[1];
  refuse(path,
         "expected a usable " + name + " in its header, found " + header.substr(0, header.find_last_not_of(" \n") + 1));
}

/// The numbers of "2, 3" or "4,".
inline std::vector<Index> parse_shape(const std::filesystem::path& path, const std::string& text) {
  std::vector<Index> shape;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    if (shape.empty() && part.empty()) break;
    const std::string digits = part.substr(std::min(part.find_first_not_of(' '), part.size()));
    Index n = 0;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), n);
    if (error != std::errc{} || end != digits.data() + digits.size())
      refuse(path, "expected a shape, found (" + text + ")");
    shape.push_back(n);
  }
  return shape;
}

inline Header read_header(const std::filesystem::path& path, std::istream& file) {
  const std::string text = read_header_text(path, file);
  return {.type = field(path, text, "descr", "'([^']*)'"),
          .fortran_order = field(path, text, "fortran_order", "(True|False)") == "True",
          .shape = parse_shape(path, field(path, text, "shape", "\\(([\\d, ]*)\\)")),
          .data_offset = static_cast<std::size_t>(file.tellg())};
}

/// The number of elements, or none where it has no number.
inline std::optional<Index> count_elements(const std::vector<Index>& shape) {
  Index count = 1;
  for (const Index n : shape) {
    if (n > 0 && count > std::numeric_limits<Index>::max() / 16 / n) return std::nullopt;
    count *= n;
  }
  return count;
}

/// Where the element that a file in Fortran order (first index fastest) holds at position goes in C order.
inline Index c_position(const std::vector<Index>& shape, Index position) {
  Index at = 0, stride = 1;
  for (const Index n : shape) stride *= n;
  for (const Index n : shape) {
    stride /= n;
    at += position % n * stride;
    position /= n;
  }
  return at;
}

/// count elements of type File from where the file stands, converted to T.
template <class T, class File>
std::vector<T> read_values(std::istream& file, const Header& header, Index count) {
  constexpr Index kChunk = 1 << 16;
  std::vector<T> values(static_cast<std::size_t>(count));
  std::vector<File> chunk(static_cast<std::size_t>(std::min(kChunk, count)));
  for (Index first = 0; first < count; first += kChunk) {
    const Index some = std::min(kChunk, count - first);
    file.read(reinterpret_cast<char*>(chunk.data()), static_cast<std::streamsize>(sizeof(File)) * some);
    for (Index i = 0; i < some; ++i) {
      const Index to = header.fortran_order ? c_position(header.shape, first + i) : first + i;
      values[static_cast<std::size_t>(to)] = static_cast<T>(chunk[static_cast<std::size_t>(i)]);
    }
  }
  return values;
}

template <class T, class File>
Array<T> read_as(const std::filesystem::path& path, std::istream& file, const Header& header) {
  const std::optional<Index> count = count_elements(header.shape);
  if (!count) refuse(path, "expected a shape with a number of elements, found " + shape_text(header.shape));
  const std::size_t expected = static_cast<std::size_t>(*count) * sizeof(File);
  file.seekg(0, std::ios::end);
  const std::size_t found = static_cast<std::size_t>(file.tellg()) - header.data_offset;
  if (found != expected) {
    refuse(path, "expected " + std::to_string(expected) + " bytes of data for shape " + shape_text(header.shape) +
                     " of " + header.type + ", found " + std::to_string(found));
  }
  file.seekg(static_cast<std::streamoff>(header.data_offset));
  Array<T> array{header.shape, read_values<T, File>(file, header, *count), header.type.starts_with("<f")};
  if (!file) refuse(path, "cannot be read");
  return array;
}

}  // namespace detail

/// The array in a .npy file with its elements converted to T. Throws std::runtime_error that names the file, what was
/// expected and what was found.
template <class T>
Array<T> read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) detail::refuse(path, "cannot be opened");
  const detail::Header header = detail::read_header(path, file);
  if (header.type == "<f2") return detail::read_as<T, Eigen::half>(path, file, header);
  if (header.type == "<f4") return detail::read_as<T, float>(path, file, header);
  if (header.type == "<f8") return detail::read_as<T, double>(path, file, header);
  if (header.type == "<i4") return detail::read_as<T, std::int32_t>(path, file, header);
  if (header.type == "<i8") return detail::read_as<T, std::int64_t>(path, file, header);
  if (header.type == "|u1" || header.type == "|b1") return detail::read_as<T, std::uint8_t>(path, file, header);
  detail::refuse(path, "expected elements of type <f2, <f4, <f8, <i4, <i8, |u1 or |b1, found " + header.type);
}

/// The same as a matrix; n elements in one dimension make a column (n, 1).
template <class T>
attn::Matrix<T> read_matrix(const std::filesystem::path& path) {
  const Array<T> array = read<T>(path);
  const std::size_t dimensions = array.shape.size();
  if (dimensions != 1 && dimensions != 2) {
    detail::refuse(path, "expected one or two dimensions, found shape " + shape_text(array.shape));
  }
  return Eigen::Map<const attn::Matrix<T>>(array.values.data(), array.shape[0], dimensions == 2 ? array.shape[1] : 1);
}

}  // namespace npy
