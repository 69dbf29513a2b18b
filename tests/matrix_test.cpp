#include <attn/matrix.hpp>

#include <gtest/gtest.h>

#include <type_traits>
#include <vector>

namespace {

using attn::ConstMatrixRef;
using attn::Index;
using attn::KeptMatrixRef;
using attn::Matrix;
using attn::MatrixRef;

using ColumnMajor = Eigen::MatrixXd;
using EverySecond = Eigen::Map<const Matrix<double>, 0, Eigen::Stride<Eigen::Dynamic, 2>>;

static_assert(std::is_convertible_v<const Matrix<double>&, ConstMatrixRef<double>>);
static_assert(std::is_convertible_v<MatrixRef<double>, ConstMatrixRef<double>>);
static_assert(std::is_convertible_v<Matrix<double>&, MatrixRef<double>>);
static_assert(std::is_convertible_v<Eigen::VectorXd, ConstMatrixRef<double>>);
static_assert(!std::is_convertible_v<const Matrix<double>&, MatrixRef<double>>);
static_assert(!std::is_convertible_v<ConstMatrixRef<double>, MatrixRef<double>>);
static_assert(!std::is_convertible_v<const ColumnMajor&, ConstMatrixRef<double>>);
static_assert(!std::is_convertible_v<const EverySecond&, ConstMatrixRef<double>>);
static_assert(!std::is_convertible_v<const Matrix<float>&, ConstMatrixRef<double>>);
static_assert(!std::is_convertible_v<decltype(std::declval<Matrix<double>>() * 2.0), ConstMatrixRef<double>>);

/// What Inputs keeps outlives the line that it is made in.
static_assert(std::is_convertible_v<const Matrix<double>&, KeptMatrixRef<double>>);
static_assert(std::is_convertible_v<Matrix<double>&, KeptMatrixRef<double>>);
static_assert(std::is_convertible_v<MatrixRef<double>, KeptMatrixRef<double>>);
static_assert(std::is_convertible_v<ConstMatrixRef<double>, KeptMatrixRef<double>>);
static_assert(std::is_convertible_v<Eigen::Map<const Matrix<double>>, KeptMatrixRef<double>>);
static_assert(
    std::is_convertible_v<decltype(std::declval<const Matrix<double>&>().leftCols(1)), KeptMatrixRef<double>>);
static_assert(!std::is_convertible_v<Matrix<double>, KeptMatrixRef<double>>);
static_assert(!std::is_convertible_v<const Matrix<double>, KeptMatrixRef<double>>);
static_assert(!std::is_convertible_v<Eigen::VectorXd, KeptMatrixRef<double>>);

Matrix<double> counted(Index rows, Index cols) {
  Matrix<double> m(rows, cols);
  for (Index i = 0; i < m.size(); ++i) m.data()[i] = static_cast<double>(i);
  return m;
}

TEST(MatrixViews, LookAtTheSameMemory) {
  Matrix<double> m = counted(4, 6);
  const ConstMatrixRef<double> view = m;
  EXPECT_EQ(view.data(), m.data());
  EXPECT_EQ(view, m);
  MatrixRef<double> writable = m;
  writable(1, 2) = -1;
  EXPECT_EQ(m(1, 2), -1);
}

TEST(MatrixViews, KeepTheStrideOfBlocksMapsAndRefs) {
  Matrix<double> m = counted(5, 7);
  const ConstMatrixRef<double> block = m.block(1, 2, 3, 4);
  EXPECT_EQ(block.outerStride(), 7);
  EXPECT_EQ(block, m.block(1, 2, 3, 4));
  const Eigen::Map<const Matrix<double>, 0, Eigen::OuterStride<>> map(m.data() + 1, 2, 3, Eigen::OuterStride<>(9));
  EXPECT_EQ(ConstMatrixRef<double>(map), map);
  const Eigen::Ref<const Matrix<double>, 0, Eigen::OuterStride<>> ref = m.middleCols(2, 3);
  EXPECT_EQ(ConstMatrixRef<double>(ref).data(), ref.data());
  EXPECT_EQ(ConstMatrixRef<double>(m.data() + 3, 2, 2, 7), m.block(0, 3, 2, 2));
}

TEST(MatrixViews, VectorsAreOneRowOrOneColumn) {
  const Eigen::VectorXd column = Eigen::VectorXd::LinSpaced(4, 0, 3);
  const ConstMatrixRef<double> as_column = column;
  EXPECT_EQ(as_column.rows(), 4);
  EXPECT_EQ(as_column.cols(), 1);
  EXPECT_EQ(as_column(3, 0), 3);
  const Matrix<double> m = counted(3, 4);
  const ConstMatrixRef<double> row = m.row(1);
  EXPECT_EQ(row.rows(), 1);
  EXPECT_EQ(row(0, 2), 6);
}

TEST(MatrixViews, AssignElementsNotViews) {
  Matrix<double> m = counted(4, 4), other = Matrix<double>::Constant(2, 2, -1);
  MatrixRef<double> view = m.topLeftCorner(2, 2);
  view = MatrixRef<double>(other);
  EXPECT_EQ(m(1, 1), -1);
  EXPECT_EQ(m(1, 2), 6);
  view = 2 * other;
  EXPECT_EQ(m(0, 0), -2);
  EXPECT_EQ(other(0, 0), -1);
}

}  // namespace
