#include "accuracy/heads.hpp"

#include "common/npy.hpp"

#include <nlohmann/json.hpp>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <stdexcept>

namespace accuracy {
namespace {

Matrix<float> tiled(const Matrix<float>& x, Index n, families::Random& random) {
  constexpr double kNoise = 0.1;
  const double size = kNoise * std::sqrt(static_cast<double>(x.squaredNorm()) / static_cast<double>(x.size()));
  Matrix<float> copies(n, x.cols());
  for (Index i = 0; i < n; ++i) {
    for (Index c = 0; c < x.cols(); ++c) copies(i, c) = x(i % x.rows(), c) + static_cast<float>(size * random.normal());
  }
  return copies;
}

}  // namespace

attn::Inputs<float> Head::inputs() const {
  return {.q = tokens.q,
          .k = tokens.k,
          .v = tokens.v,
          .mask = {.causal = causal ? attn::Causal::lower_right : attn::Causal::none}};
}

std::vector<Head> read_heads(const std::vector<std::string>& folders, Index longest) {
  std::vector<Head> heads;
  for (const std::filesystem::path folder : folders) {
    std::ifstream file(folder / "index.json");
    if (!file) throw std::runtime_error((folder / "index.json").string() + ": cannot be opened");
    for (const auto& entry : nlohmann::json::parse(file)) {
      const std::string name = entry.at("name");
      const auto read = [&](const char* part) { return npy::read_matrix<float>(folder / (name + part)); };
      if (Matrix<float> k = read("_k.npy"); k.rows() <= longest) {
        heads.push_back({name, entry.at("causal"), {read("_q.npy"), std::move(k), read("_v.npy")}});
      }
    }
  }
  return heads;
}

Tokens<float> tiled(const Tokens<float>& tokens, Index n, std::uint64_t seed) {
  families::Random random(seed);
  return {tiled(tokens.q, n, random), tiled(tokens.k, n, random), tiled(tokens.v, n, random)};
}

}  // namespace accuracy
