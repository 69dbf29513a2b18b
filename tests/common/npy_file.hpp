/// .npy files for tests, written byte by byte.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

namespace test {

/// A file of the given header and data, in NumPy's format, named after the running test; removed with this object.
class NpyFile {
 public:
  NpyFile(const std::string& header, std::string_view data, int version = 1) {
    const std::string text = header + std::string(63 - header.size() % 64, ' ') + "\n";
    std::ofstream file(path_, std::ios::binary);
    file << "\x93NUMPY" << static_cast<char>(version) << '\0';
    const auto length = static_cast<std::uint32_t>(text.size());
    file.write(reinterpret_cast<const char*>(&length), version == 1 ? 2 : 4);
    file << text << data;
  }
  explicit NpyFile(std::string_view bytes) { std::ofstream(path_, std::ios::binary) << bytes; }
  NpyFile(const NpyFile&) = delete;
  NpyFile& operator=(const NpyFile&) = delete;
  ~NpyFile() { std::filesystem::remove(path_); }

  const std::filesystem::path& path() const { return path_; }

 private:
  static std::filesystem::path new_path() {
    static int files = 0;
    const std::string test = ::testing::UnitTest::GetInstance()->current_test_info()->name();
    return std::filesystem::path(::testing::TempDir()) / ("attn_" + test + "_" + std::to_string(files++) + ".npy");
  }

  std::filesystem::path path_ = new_path();
};

template <class T>
std::string bytes_of(const std::vector<T>& x) {
  return {reinterpret_cast<const char*>(x.data()), x.size() * sizeof(T)};
}

inline std::string npy_header(const std::string& type, const std::string& order, const std::string& shape) {
  return "{'descr': '" + type + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }";
}

}  // namespace test
