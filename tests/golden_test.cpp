/// Outputs of an independent implementation in NumPy, in double. tests/data/goldens/cases.json lists them with their
/// parameters.
#include <attn/attn.hpp>

#include "common/npy.hpp"
#include "common/support.hpp"

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace {

using attn::Causal;
using attn::Context;
using attn::GaussianKernel;
using attn::Matrix;
using attn::Rows;
using nlohmann::json;

const std::filesystem::path kGoldens = std::filesystem::path(ATTN_TEST_DATA_DIR) / "goldens";

struct Golden {
  json parameters;

  std::string name() const { return parameters.at("name"); }
  std::string method() const { return parameters.at("method"); }
  std::filesystem::path file(const char* array) const { return kGoldens / name() / (std::string(array) + ".npy"); }
};

std::ostream& operator<<(std::ostream& out, const Golden& golden) {
  return out << golden.name();
}

std::vector<Golden> goldens_of(const std::vector<std::string>& methods) {
  std::vector<Golden> selected;
  for (const json& entry : json::parse(std::ifstream(kGoldens / "cases.json"))) {
    if (std::find(methods.begin(), methods.end(), entry.at("method")) != methods.end()) selected.push_back({entry});
  }
  return selected;
}

/// The arrays of a case, and its masks.
template <class T>
struct Arrays {
  explicit Arrays(const Golden& golden)
      : q(npy::read_matrix<T>(golden.file("q"))),
        k(npy::read_matrix<T>(golden.file("k"))),
        v(npy::read_matrix<T>(golden.file("v"))) {
    const std::string causal = golden.parameters.value("causal", "none");
    mask.causal = causal == "upper_left"    ? Causal::upper_left
                  : causal == "lower_right" ? Causal::lower_right
                                            : Causal::none;
    mask.keep_key = read_keep(golden, "keep_key", keep_key);
    mask.keep_query = read_keep(golden, "keep_query", keep_query);
  }

  static std::span<const std::uint8_t> read_keep(const Golden& golden, const char* name,
                                                 Matrix<std::uint8_t>& storage) {
    const auto& inputs = golden.parameters.at("inputs");
    if (std::find(inputs.begin(), inputs.end(), name) == inputs.end()) return {};
    storage = npy::read_matrix<std::uint8_t>(golden.file(name));
    return {storage.data(), static_cast<std::size_t>(storage.size())};
  }

  Matrix<T> q, k, v;
  Matrix<std::uint8_t> keep_key, keep_query;
  attn::Mask mask;
};

std::optional<double> optional_number(const json& parameters, const char* name) {
  return parameters.contains(name) ? std::optional<double>(parameters.at(name)) : std::nullopt;
}

GaussianKernel gaussian_kernel(const json& p) {
  return {.bandwidth = optional_number(p, "bandwidth"),
          .rows = p.value("normalized", false) ? Rows::normalized : Rows::raw};
}

template <class T>
Matrix<T> skyformer(const json& p, const Arrays<T>& in) {
  const attn::StridedSample landmarks{.num_landmarks = p.at("num_landmarks")};
  const double gamma = p.at("gamma");
  if (p.at("inverse") == "ridge") {
    const attn::Skyformer<T, attn::StridedSample> method(landmarks, attn::RidgeInverse{.gamma = gamma},
                                                         gaussian_kernel(p));
    return attn::attention(method, in.q, in.k, in.v, in.mask);
  }
  const attn::PreconditionedPinv inverse{.gamma = gamma, .iterations = p.at("iterations")};
  const attn::Skyformer<T, attn::StridedSample, attn::PreconditionedPinv> method(landmarks, inverse,
                                                                                 gaussian_kernel(p));
  return attn::attention(method, in.q, in.k, in.v, in.mask);
}

template <class T>
Matrix<T> nystrom(const json& p, const Arrays<T>& in) {
  const attn::SegmentMeans landmarks{.num_landmarks = p.at("num_landmarks")};
  const attn::IterativePinv inverse{.iterations = p.at("iterations")};
  return attn::attention(attn::Nystrom<T>(landmarks, inverse), in.q, in.k, in.v, in.mask);
}

template <class T>
Matrix<T> spectral_shift(const json& p, const Arrays<T>& in) {
  using attn::ShiftMode;
  const std::string mode = p.at("mode");
  const attn::SegmentMeans landmarks{.num_landmarks = p.at("num_landmarks")};
  const attn::SpectralShift shift{.mode = mode == "paper"    ? ShiftMode::paper
                                          : mode == "scalar" ? ShiftMode::scalar
                                                             : ShiftMode::row,
                                  .iterations = p.at("iterations"),
                                  .num_probes = p.at("num_probes")};
  return attn::attention(attn::ShiftedNystrom<T>(landmarks, shift), in.q, in.k, in.v, in.mask);
}

template <class T>
Matrix<T> lifted_softmax(const json& p, const Arrays<T>& in) {
  const attn::StridedSample landmarks{.num_landmarks = p.at("num_landmarks")};
  const attn::LiftedSoftmax<T, attn::StridedSample> method(landmarks, attn::RidgeInverse{.gamma = p.at("gamma")});
  return attn::attention(method, in.q, in.k, in.v, in.mask);
}

template <class T>
Matrix<T> run(const Golden& golden) {
  const json& p = golden.parameters;
  const std::string method = golden.method();
  const Arrays<T> in(golden);
  if (method == "softmax") {
    const attn::SoftmaxAttention<T> softmax(attn::SoftmaxKernel{.scale = optional_number(p, "scale")});
    return attn::attention(softmax, in.q, in.k, in.v, in.mask);
  }
  if (method == "gaussian") {
    return attn::attention(attn::GaussianAttention<T>(gaussian_kernel(p)), in.q, in.k, in.v, in.mask);
  }
  if (method == "nystrom") return nystrom(p, in);
  if (method == "spectral_shift") return spectral_shift(p, in);
  if (method == "lifted_softmax") return lifted_softmax(p, in);
  return skyformer(p, in);
}

/// Largest relative Frobenius error. Ten steps of the iteration amplify rounding where six still filter it.
double tolerance_in_double(const Golden& golden) {
  return golden.method() == "nystrom" && golden.parameters.at("iterations") == 10 ? 1e-8 : 1e-10;
}

double tolerance_in_float(const Golden& golden) {
  const std::string method = golden.method();
  if (method == "lifted_softmax") return 1e-3;
  if (method == "spectral_shift") return 1e-4;
  if (method == "nystrom") return golden.parameters.at("iterations") == 10 ? 1e-4 : 1e-5;
  return method == "skyformer" ? 1e-5 : 2e-6;
}

class Goldens : public ::testing::TestWithParam<Golden> {
 protected:
  const Matrix<double> expected_ = npy::read_matrix<double>(GetParam().file("out"));
};

TEST_P(Goldens, InDouble) {
  EXPECT_LE(test::relative_error(run<double>(GetParam()), expected_), tolerance_in_double(GetParam()));
}

TEST_P(Goldens, InFloat) {
  EXPECT_LE(test::relative_error(run<float>(GetParam()), expected_), tolerance_in_float(GetParam()));
}

const std::vector<std::string> kMethods{"softmax",        "gaussian",  "nystrom",
                                        "spectral_shift", "skyformer", "lifted_softmax"};

INSTANTIATE_TEST_SUITE_P(NumPy, Goldens, ::testing::ValuesIn(goldens_of(kMethods)),
                         [](const auto& golden) { return golden.param.name(); });

TEST(GoldenCases, AreAllThere) {
  EXPECT_EQ(goldens_of({"softmax"}).size(), 6U);
  EXPECT_EQ(goldens_of({"gaussian"}).size(), 6U);
  EXPECT_EQ(goldens_of({"nystrom"}).size(), 12U);
  EXPECT_EQ(goldens_of({"spectral_shift"}).size(), 13U);
  EXPECT_EQ(goldens_of({"skyformer"}).size(), 8U);
  EXPECT_EQ(goldens_of({"lifted_softmax"}).size(), 3U);
}

}  // namespace
