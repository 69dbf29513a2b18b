#include <attn/kernel.hpp>

#include <gtest/gtest.h>

namespace {

using attn::GaussianKernel;
using attn::Rows;
using attn::SoftmaxKernel;

struct OwnKernel {
  double scale(Eigen::Index d) const { return 2.0 / static_cast<double>(d); }
  double bias(Eigen::Index) const { return 0.25; }
  Rows rows() const { return Rows::raw; }
};
struct NoRows {
  double scale(Eigen::Index) const { return 1; }
  double bias(Eigen::Index) const { return 0; }
};

static_assert(attn::ScoreKernel<attn::SoftmaxKernel> && attn::ScoreKernel<attn::GaussianKernel> &&
              attn::ScoreKernel<OwnKernel>);
static_assert(!attn::ScoreKernel<NoRows> && !attn::ScoreKernel<double>);

TEST(Kernel, SoftmaxScalesByTheRootOfTheWidth) {
  const auto p = score_parameters(SoftmaxKernel{}, 64);
  EXPECT_DOUBLE_EQ(p.scale, 0.125);
  EXPECT_EQ(p.bias, 0);
  EXPECT_EQ(p.rows, Rows::normalized);
  EXPECT_DOUBLE_EQ(score_parameters(SoftmaxKernel{.scale = 0.4}, 64).scale, 0.4);
}

TEST(Kernel, GaussianScalesAsSoftmaxDoes) {
  const auto p = score_parameters(GaussianKernel{}, 64);
  EXPECT_DOUBLE_EQ(p.scale, 0.125);
  EXPECT_DOUBLE_EQ(p.bias, 0.0625);
  EXPECT_EQ(p.rows, Rows::raw);
  const auto wide = score_parameters(GaussianKernel{.bandwidth = 3.0, .rows = Rows::normalized}, 64);
  EXPECT_DOUBLE_EQ(wide.scale, 1.0 / 9);
  EXPECT_DOUBLE_EQ(wide.bias, 0.5 / 9);
  EXPECT_EQ(wide.rows, Rows::normalized);
}

TEST(Kernel, AKernelOfOnesOwnGivesItsThreeMembers) {
  const auto p = attn::score_parameters(OwnKernel{}, 8);
  EXPECT_EQ(p.scale, 0.25);
  EXPECT_EQ(p.bias, 0.25);
  EXPECT_EQ(p.rows, Rows::raw);
}

}  // namespace
