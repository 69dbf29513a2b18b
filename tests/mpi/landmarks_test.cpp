#include "world.hpp"

#include <attn/lifted_softmax.hpp>
#include <attn/nystrom.hpp>
#include <attn/skyformer.hpp>
#include <attn/spectral_shift.hpp>

#include <tuple>

namespace {

using namespace world;
using attn::GaussianKernel;
using attn::IterativePinv;
using attn::RidgeInverse;
using attn::Rows;
using attn::SegmentMeans;
using attn::StridedSample;
using attn::UniformSample;
using test::Family;

using Case = std::tuple<bool, Cut, Cut>;

/// Every method that goes through landmarks, with masks of both sides and, where it takes them, key biases.
class DistributedLandmarks : public ::testing::TestWithParam<Case> {
 protected:
  Inputs<double> inputs(bool biased) const {
    Inputs<double> in{.q = x_.q, .k = x_.k, .v = x_.v};
    if (!std::get<0>(GetParam())) return in;
    in.mask = {.keep_key = keep_key_, .keep_query = keep_query_};
    if (biased) in.key_bias = bias_;
    return in;
  }

  template <class Method>
  void check(const Method& method, bool biased, double tolerance) const {
    const auto [masked, queries, keys] = GetParam();
    expect_same(method, inputs(biased), queries, keys, tolerance);
    expect_same_gradients(method, inputs(biased), queries, keys, 100 * tolerance);
  }

  test::Tokens<double> x_ = test::make_tokens<double>(Family::smooth, {90, 110, 8, 5}, 3);
  std::vector<std::uint8_t> keep_key_ = test::random_keep(110, 0.7, 4), keep_query_ = test::random_keep(90, 0.8, 5);
  std::vector<double> bias_ = test::random_key_bias<double>(110, 0.1, 6);
};

TEST_P(DistributedLandmarks, Nystrom) {
  check(attn::Nystrom<double>{SegmentMeans{.num_landmarks = 12}}, false, 1e-9);
  check(attn::Nystrom<double>{SegmentMeans{.num_landmarks = 500}}, false, 1e-11);  // exact attention
}

/// As many queries as keys, with one mask and one cut.
TEST_P(DistributedLandmarks, ShiftedNystrom) {
  const Cut cuts = std::get<1>(GetParam());
  const std::vector<std::uint8_t> keep = std::get<0>(GetParam()) ? keep_query_ : std::vector<std::uint8_t>{};
  const Inputs<double> in{
      .q = x_.q, .k = x_.k.topRows(90), .v = x_.v.topRows(90), .mask = {.keep_key = keep, .keep_query = keep}};
  for (const attn::ShiftMode mode : {attn::ShiftMode::paper, attn::ShiftMode::scalar, attn::ShiftMode::row}) {
    const attn::ShiftedNystrom<double> method{SegmentMeans{.num_landmarks = 12}, {.mode = mode, .num_probes = 8}};
    expect_same(method, in, cuts, cuts, 1e-8);
    expect_same_gradients(method, in, cuts, cuts, 1e-6);
  }
  expect_same(attn::ShiftedNystrom<double>{SegmentMeans{.num_landmarks = 100}}, in, cuts, cuts, 1e-11);
}

TEST_P(DistributedLandmarks, Skyformer) {
  check(attn::Skyformer<double>{UniformSample{.num_landmarks = 20}}, true, 1e-10);
  check(
      attn::Skyformer<double, StridedSample>{
          StridedSample{.num_landmarks = 11}, RidgeInverse{}, {.rows = Rows::normalized}},
      true, 1e-10);
}

TEST_P(DistributedLandmarks, LiftedSoftmax) {
  check(attn::LiftedSoftmax<double>{UniformSample{.num_landmarks = 20}, RidgeInverse{.gamma = 0.1}}, true, 1e-9);
}

INSTANTIATE_TEST_SUITE_P(, DistributedLandmarks,
                         ::testing::Combine(::testing::Bool(), ::testing::Values(Cut::even, Cut::uneven),
                                            ::testing::Values(Cut::even, Cut::last)));

/// float tokens, and narrow ones of the same values.
TEST(DistributedNarrow, Landmarks) {
  const auto x = test::make_tokens<float>(Family::smooth, {80, 80, 8, 8}, 3);
  const auto y = test::make_tokens<Eigen::half>(Family::smooth, {80, 80, 8, 8}, 3);
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
  const Inputs<Eigen::half> narrow{.q = y.q, .k = y.k, .v = y.v};
  expect_same(attn::Nystrom<float>{SegmentMeans{.num_landmarks = 8}}, in, Cut::even, Cut::even, 1e-4);
  expect_same(attn::Skyformer<float>{UniformSample{.num_landmarks = 16}}, in, Cut::even, Cut::even, 1e-4);
  expect_same(attn::LiftedSoftmax<float>{UniformSample{.num_landmarks = 16}, RidgeInverse{.gamma = 0.1}}, in, Cut::even,
              Cut::even, 1e-3);
  expect_same(attn::Nystrom<Eigen::half>{SegmentMeans{.num_landmarks = 8}}, narrow, Cut::even, Cut::even, 5e-3);
  expect_same(attn::ShiftedNystrom<Eigen::half>{SegmentMeans{.num_landmarks = 8}}, narrow, Cut::even, Cut::even, 5e-3);
  expect_same_gradients(attn::Skyformer<Eigen::half>{UniformSample{.num_landmarks = 16}}, narrow, Cut::even, Cut::even,
                        1e-2);
}

/// Sums of landmarks further apart than a float reaches, which are then of doubles.
TEST(DistributedSkyformer, FarLandmarks) {
  const auto x = test::scaled(test::make_tokens<float>(Family::clusters, {60, 60, 8, 4}, 9), 8);
  const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
  const attn::Skyformer<float> method{UniformSample{.num_landmarks = 24}, RidgeInverse{}, {.rows = Rows::normalized}};
  expect_same(method, in, Cut::even, Cut::even, 1e-3);
}

/// What a landmark method sends does not grow with the tokens.
TEST(DistributedBytes, LandmarkMethodsSendTheSameForAnyLength) {
  const auto sent = [](const auto& method, Index n) {
    const auto x = test::make_tokens<float>(Family::smooth, {n, n, 16, 8}, 3);
    const Share share = cut(n, Cut::even, rank());
    const Inputs<float> in{.q = x.q, .k = x.k, .v = x.v};
    Matrix<float> out(share.count, 8);
    attn::Context context;
    reset_bytes();
    attn::distributed_forward(method, share_of(in, share, share), out, kAll, context);
    return bytes_sent();
  };
  constexpr Index m = 16, d = 16, d_v = 8;
  const attn::Nystrom<float> nystrom{SegmentMeans{.num_landmarks = m}};
  const attn::Skyformer<float> skyformer{UniformSample{.num_landmarks = m}};
  const attn::LiftedSoftmax<float> lifted{UniformSample{.num_landmarks = m}};
  const attn::ShiftedNystrom<float> shifted{SegmentMeans{.num_landmarks = m}};
  EXPECT_EQ(sent(shifted, 200), sent(shifted, 1000));
  constexpr double kLandmark = 4 * (d + d_v + 2), kFew = 640;  // kFew: agreements and facts of shares
  EXPECT_EQ(sent(nystrom, 200), sent(nystrom, 1000));
  EXPECT_EQ(sent(skyformer, 200), sent(skyformer, 1000));
  EXPECT_EQ(sent(lifted, 200), sent(lifted, 1000));
  EXPECT_LE(static_cast<double>(sent(nystrom, 200)), m * (kLandmark + 4 * d) + kFew);
  EXPECT_LE(static_cast<double>(sent(skyformer, 200)), m * kLandmark + kFew);
  EXPECT_LE(static_cast<double>(sent(lifted, 200)), m * kLandmark + kFew);
}

}  // namespace
