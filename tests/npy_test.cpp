#include "common/npy.hpp"
#include "common/npy_file.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace {

using attn::Index;
using attn::Matrix;
using npy::read_matrix;
using test::bytes_of;
using test::npy_header;
using test::NpyFile;

std::string error_of(const std::filesystem::path& path) {
  try {
    read_matrix<double>(path);
  } catch (const std::runtime_error& e) {
    return e.what();
  }
  return "no error";
}

const Matrix<double> kTwoByThree{{1, 2, 3}, {4, 5, 6.5}};

TEST(Npy, ReadsFloat64InBothOrders) {
  {
    const NpyFile file(npy_header("<f8", "False", "(2, 3)"), bytes_of<double>({1, 2, 3, 4, 5, 6.5}));
    EXPECT_EQ(read_matrix<double>(file.path()), kTwoByThree);
  }
  const NpyFile file(npy_header("<f8", "True", "(2, 3)"), bytes_of<double>({1, 4, 2, 5, 3, 6.5}));
  EXPECT_EQ(read_matrix<double>(file.path()), kTwoByThree);
}

TEST(Npy, ReadsFloat32AsFloatOrDouble) {
  const NpyFile file(npy_header("<f4", "False", "(2, 3)"), bytes_of<float>({1, 2, 3, 4, 5, 6.5F}));
  EXPECT_EQ(read_matrix<double>(file.path()), kTwoByThree);
  EXPECT_EQ(read_matrix<float>(file.path()), kTwoByThree.cast<float>());
}

TEST(Npy, ReadsBytesAndBooleansInOneDimension) {
  for (const char* type : {"|u1", "|b1"}) {
    const NpyFile file(npy_header(type, "False", "(4,)"), bytes_of<std::uint8_t>({1, 0, 0, 1}));
    const auto x = read_matrix<std::uint8_t>(file.path());
    ASSERT_EQ(x.rows(), 4);
    ASSERT_EQ(x.cols(), 1);
    EXPECT_EQ(std::vector<std::uint8_t>(x.data(), x.data() + 4), (std::vector<std::uint8_t>{1, 0, 0, 1}));
  }
}

TEST(Npy, ReadsLaterFormatVersions) {
  for (const int version : {2, 3}) {
    const NpyFile file(npy_header("<f8", "False", "(2, 3)"), bytes_of<double>({1, 2, 3, 4, 5, 6.5}), version);
    EXPECT_EQ(read_matrix<double>(file.path()), kTwoByThree);
  }
}

TEST(Npy, ReadsFloat16) {
  // 1, -2, the largest, the smallest above 0, infinity and 0.5 in binary16
  const NpyFile file(npy_header("<f2", "False", "(2, 3)"),
                     bytes_of<std::uint16_t>({0x3c00, 0xc000, 0x7bff, 0x0001, 0x7c00, 0x3800}));
  const Matrix<float> expected{{1, -2, 65504}, {0x1p-24F, std::numeric_limits<float>::infinity(), 0.5F}};
  EXPECT_EQ(read_matrix<float>(file.path()), expected);
}

TEST(Npy, ReadsIntegers) {
  const NpyFile four(npy_header("<i4", "False", "(3,)"), bytes_of<std::int32_t>({1, -1, 70000}));
  EXPECT_EQ(read_matrix<float>(four.path()), (Matrix<float>{{1}, {-1}, {70000}}));
  const NpyFile eight(npy_header("<i8", "False", "(3,)"), bytes_of<std::int64_t>({1, -1, 70000}));
  EXPECT_EQ(read_matrix<float>(eight.path()), (Matrix<float>{{1}, {-1}, {70000}}));
}

TEST(Npy, ReadsFourDimensionsInBothOrders) {
  const std::vector<Index> shape{2, 3, 1, 4};
  std::vector<float> c, fortran;
  for (int i = 0; i < 24; ++i) c.push_back(static_cast<float>(i));
  for (int l = 0; l < 4; ++l) {
    for (int j = 0; j < 3; ++j) {
      for (int i = 0; i < 2; ++i) fortran.push_back(c[static_cast<std::size_t>((i * 3 + j) * 4 + l)]);
    }
  }
  for (const bool in_fortran_order : {false, true}) {
    const NpyFile file(npy_header("<f4", in_fortran_order ? "True" : "False", "(2, 3, 1, 4)"),
                       bytes_of(in_fortran_order ? fortran : c));
    const auto array = npy::read<double>(file.path());
    EXPECT_EQ(array.shape, shape);
    EXPECT_EQ(array.values, std::vector<double>(c.begin(), c.end()));
  }
}

TEST(Npy, ReadsMoreThanItHoldsAtOnce) {
  constexpr Index kRows = 70'001, kCols = 3;
  std::vector<double> x(static_cast<std::size_t>(kRows * kCols));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<double>(i);
  const NpyFile file(npy_header("<f8", "True", "(70001, 3)"), bytes_of(x));
  const auto m = read_matrix<double>(file.path());
  for (const Index i : {Index{0}, Index{65'535}, Index{65'536}, kRows - 1}) {
    for (Index j = 0; j < kCols; ++j) EXPECT_EQ(m(i, j), static_cast<double>(i + j * kRows));
  }
}

TEST(Npy, ReadsEmptyArraysAndSingleNumbers) {
  {
    const NpyFile file(npy_header("<f8", "False", "(0, 3)"), "");
    EXPECT_EQ(read_matrix<double>(file.path()).rows(), 0);
  }
  const NpyFile file(npy_header("<f8", "True", "()"), bytes_of<double>({7}));
  EXPECT_EQ(npy::read<double>(file.path()).values, std::vector<double>{7});
}

TEST(Npy, NamesTheFileInErrors) {
  EXPECT_EQ(error_of("/nowhere/x.npy"), "/nowhere/x.npy: cannot be opened");
  EXPECT_EQ(error_of("/"), "/: cannot be opened");
}

/// Headers up to the longest go through a recursive match, which must not exhaust the stack.
TEST(Npy, RefusesLongHeaders) {
  for (const std::size_t length : {std::size_t{3900}, std::size_t{65'000}, std::size_t{1'000'000}}) {
    const NpyFile type(npy_header(std::string(length, 'f'), "False", "(2, 3)"), "", 2);
    EXPECT_NE(error_of(type.path()).find(length < 4096 ? "expected elements of type" : "expected a header of at most"),
              std::string::npos);
    const NpyFile shape(npy_header("<f8", "False", "(" + std::string(length, '1') + ")"), "", 2);
    EXPECT_NE(error_of(shape.path()).find(length < 4096 ? "expected a shape" : "expected a header of at most"),
              std::string::npos);
  }
}

TEST(Npy, RefusesWhatItCannotRead) {
  const std::string six = bytes_of<double>({1, 2, 3, 4, 5, 6});
  const auto expect_error = [](const NpyFile& file, const std::string& what) {
    EXPECT_EQ(error_of(file.path()), file.path().string() + ": " + what);
  };
  expect_error(NpyFile("not an array at all"), "expected a .npy file, found none of its marks at the start");
  expect_error(NpyFile(""), "expected a .npy file, found none of its marks at the start");
  expect_error(NpyFile(std::string_view("\x93NUMPY\x01\x00\xff\x00{'de", 14)), "the file ends within its header");
  expect_error(NpyFile(std::string_view("\x93NUMPY\x02\x00\xff\xff\xff\xff{'de", 16)),
               "expected a header of at most 4096 bytes, found one of 4294967295");
  expect_error(NpyFile(npy_header("<f8", "False", "(2, 3)"), six, 4),
               "expected a .npy file of version 1, 2 or 3, found version 4");
  expect_error(NpyFile(npy_header("<f8", "False", "(2, 4)"), six),
               "expected 64 bytes of data for shape (2, 4) of <f8, found 48");
  expect_error(NpyFile(npy_header("<f8", "False", "(2, 2)"), six),
               "expected 32 bytes of data for shape (2, 2) of <f8, found 48");
  expect_error(NpyFile(npy_header("<f8", "False", "(99999999999, 99999999999)"), six),
               "expected a shape with a number of elements, found (99999999999, 99999999999)");
  expect_error(NpyFile(npy_header("<f8", "False", "(99999999999999999999,)"), six),
               "expected a shape, found (99999999999999999999,)");
  expect_error(NpyFile(npy_header("<f8", "False", "(1, 2, 3)"), six),
               "expected one or two dimensions, found shape (1, 2, 3)");
  const std::string types = "expected elements of type <f2, <f4, <f8, <i4, <i8, |u1 or |b1, found ";
  for (const char* type : {">f8", "<c8", "<f16", "|O"})
    expect_error(NpyFile(npy_header(type, "False", "(2, 3)"), six), types + type);
  expect_error(NpyFile("{'descr': '<f8', 'shape': (2, 3), }", six),
               "expected a usable fortran_order in its header, found {'descr': '<f8', 'shape': (2, 3), }");
  expect_error(NpyFile("{'descr': [('x', '<f8')], 'fortran_order': False, 'shape': (6,), }", six),
               "expected a usable descr in its header, found {'descr': [('x', '<f8')], 'fortran_order': False, "
               "'shape': (6,), }");
}

}  // namespace
