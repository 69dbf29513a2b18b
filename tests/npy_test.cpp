#include "npy.hpp"

#include <gtest/gtest.h>

#include <string>
#include <string_view>
#include <vector>

namespace {

using attn::Matrix;
using test::read_npy;

/// A file of the given header and data, named after the running test; removed with this object.
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
  ~NpyFile() { std::filesystem::remove(path_); }

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_ = std::filesystem::path(::testing::TempDir()) /
                                (std::string("attn_") + ::testing::UnitTest::GetInstance()->current_test_info()->name() + ".npy");
};

template <class T>
std::string bytes_of(const std::vector<T>& x) {
  return {reinterpret_cast<const char*>(x.data()), x.size() * sizeof(T)};
}

std::string header(const std::string& type, const std::string& order, const std::string& shape) {
  return "{'descr': '" + type + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }";
}

std::string error_of(const std::filesystem::path& path) {
  try {
    read_npy<double>(path);
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "no error";
}

const Matrix<double> kTwoByThree{{1, 2, 3}, {4, 5, 6.5}};

TEST(Npy, ReadsFloat64InBothOrders) {
  {
    const NpyFile file(header("<f8", "False", "(2, 3)"), bytes_of<double>({1, 2, 3, 4, 5, 6.5}));
    EXPECT_EQ(read_npy<double>(file.path()), kTwoByThree);
  }
  const NpyFile file(header("<f8", "True", "(2, 3)"), bytes_of<double>({1, 4, 2, 5, 3, 6.5}));
  EXPECT_EQ(read_npy<double>(file.path()), kTwoByThree);
}

TEST(Npy, ReadsFloat32AsFloatOrDouble) {
  const NpyFile file(header("<f4", "False", "(2, 3)"), bytes_of<float>({1, 2, 3, 4, 5, 6.5F}));
  EXPECT_EQ(read_npy<double>(file.path()), kTwoByThree);
  EXPECT_EQ(read_npy<float>(file.path()), kTwoByThree.cast<float>());
}

TEST(Npy, ReadsBytesAndBooleansInOneDimension) {
  for (const char* type : {"|u1", "|b1"}) {
    const NpyFile file(header(type, "False", "(4,)"), bytes_of<std::uint8_t>({1, 0, 0, 1}));
    const auto x = read_npy<std::uint8_t>(file.path());
    ASSERT_EQ(x.rows(), 4);
    ASSERT_EQ(x.cols(), 1);
    EXPECT_EQ(std::vector<std::uint8_t>(x.data(), x.data() + 4), (std::vector<std::uint8_t>{1, 0, 0, 1}));
  }
}

TEST(Npy, ReadsLaterFormatVersions) {
  for (const int version : {2, 3}) {
    const NpyFile file(header("<f8", "False", "(2, 3)"), bytes_of<double>({1, 2, 3, 4, 5, 6.5}), version);
    EXPECT_EQ(read_npy<double>(file.path()), kTwoByThree);
  }
}

TEST(Npy, ReadsEmptyArrays) {
  const NpyFile file(header("<f8", "False", "(0, 3)"), "");
  EXPECT_EQ(read_npy<double>(file.path()).rows(), 0);
}

TEST(Npy, NamesTheFileInErrors) {
  EXPECT_EQ(error_of("/nowhere/x.npy"), "npy: /nowhere/x.npy: cannot be opened");
}

TEST(Npy, RefusesWhatItCannotRead) {
  const std::string six = bytes_of<double>({1, 2, 3, 4, 5, 6});
  const auto expect_error = [](const NpyFile& file, const std::string& what) {
    EXPECT_NE(error_of(file.path()).find(what), std::string::npos) << error_of(file.path());
  };
  expect_error(NpyFile("not an array at all"), "not a .npy file");
  expect_error(NpyFile(std::string_view("\x93NUMPY\x01\x00\xff\x00{'de", 14)), "truncated header");
  expect_error(NpyFile(header("<f8", "False", "(2, 3)"), six, 4), "format version 4 is not supported");
  expect_error(NpyFile(header("<f8", "False", "(2, 4)"), six), "48 bytes of data, should be 64");
  expect_error(NpyFile(header("<f8", "False", "(2, 2)"), six), "48 bytes of data, should be 32");
  expect_error(NpyFile(header(">f8", "False", "(2, 3)"), six), "element type >f8 is not supported");
  expect_error(NpyFile(header("<i8", "False", "(2, 3)"), six), "element type <i8 is not supported");
  expect_error(NpyFile(header("<f8", "False", "(1, 2, 3)"), six), "no usable shape");
  expect_error(NpyFile("{'descr': '<f8', 'shape': (2, 3), }", six), "no usable fortran_order");
}

}  // namespace
