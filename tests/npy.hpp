/// Reader of NumPy's .npy files: float64, float32, uint8 and bool, little-endian, C and Fortran order, one or two dimensions.
#pragma once

#include <attn/matrix.hpp>

#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <stdexcept>
#include <string>

namespace test {

static_assert(std::endian::native == std::endian::little, "npy.hpp reads little-endian files as they are");

namespace detail {

[[noreturn]] inline void npy_error(const std::filesystem::path& path, const std::string& what) {
  throw std::runtime_error("npy: " + path.string() + ": " + what);
}

/// The file's text header and where its data starts.
struct NpyHeader {
  std::string text;
  std::size_t data_offset;
};

inline NpyHeader npy_header(const std::filesystem::path& path, const std::string& bytes) {
  if (bytes.size() < 12 || bytes.compare(0, 6, "\x93NUMPY") != 0) npy_error(path, "not a .npy file");
  const int version = bytes[6];
  if (version < 1 || version > 3) npy_error(path, "format version " + std::to_string(version) + " is not supported");
  const std::size_t length_bytes = version == 1 ? 2 : 4, start = 8 + length_bytes;
  std::uint32_t length = 0;
  std::memcpy(&length, bytes.data() + 8, length_bytes);
  if (bytes.size() < start + length) npy_error(path, "truncated header");
  return {bytes.substr(start, length), start + length};
}

inline std::smatch npy_field(const std::filesystem::path& path, const std::string& header, const std::string& name,
                             const char* value) {
  std::smatch match;
  if (!std::regex_search(header, match, std::regex("'" + name + "':\\s*" + value)))
    npy_error(path, "no usable " + name + " in " + header);
  return match;
}

/// Elements of type File at bytes, converted to T.
template <class T, class File>
attn::Matrix<T> npy_elements(const char* bytes, attn::Index rows, attn::Index cols, bool fortran_order) {
  attn::Matrix<T> m(rows, cols);
  for (attn::Index i = 0; i < rows; ++i) {
    for (attn::Index j = 0; j < cols; ++j) {
      File x;
      std::memcpy(&x, bytes + (fortran_order ? i + j * rows : i * cols + j) * static_cast<attn::Index>(sizeof(File)), sizeof(File));
      m(i, j) = static_cast<T>(x);
    }
  }
  return m;
}

}  // namespace detail

/// The array in a .npy file with its elements converted to T; n elements in one dimension make a column (n, 1). Throws
/// std::runtime_error that names the file.
template <class T>
attn::Matrix<T> read_npy(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) detail::npy_error(path, "cannot be opened");
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  const detail::NpyHeader parsed = detail::npy_header(path, bytes);
  const std::string& header = parsed.text;
  const std::size_t offset = parsed.data_offset;

  const std::string type = detail::npy_field(path, header, "descr", "'([^']*)'")[1];
  const bool fortran_order = detail::npy_field(path, header, "fortran_order", "(True|False)")[1] == "True";
  const std::smatch shape = detail::npy_field(path, header, "shape", "\\((\\d+),\\s*(\\d*)\\)");
  const attn::Index rows = std::stoll(shape[1]), cols = shape[2].length() > 0 ? std::stoll(shape[2]) : 1;

  const auto read = [&]<class File>(File) {
    const auto size = static_cast<std::size_t>(rows * cols) * sizeof(File);
    if (bytes.size() - offset != size) {
      detail::npy_error(path, std::to_string(bytes.size() - offset) + " bytes of data, should be " + std::to_string(size));
    }
    return detail::npy_elements<T, File>(bytes.data() + offset, rows, cols, fortran_order);
  };
  if (type == "<f8") return read(double{});
  if (type == "<f4") return read(float{});
  if (type == "|u1" || type == "|b1") return read(std::uint8_t{});
  detail::npy_error(path, "element type " + type + " is not supported");
}

}  // namespace test
