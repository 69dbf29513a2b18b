#include "accuracy/contenders.hpp"

#include "accuracy/methods.hpp"
#include "accuracy/wildcat.hpp"

#include <attn/exact.hpp>

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

namespace accuracy {
namespace {

/// Each row the mean of the values that its query sees.
void average_values(const attn::Inputs<float>& in, Matrix<float>& out) {
  if (in.mask.causal == attn::Causal::none) {
    out.rowwise() = in.v.colwise().mean();
    return;
  }
  Eigen::RowVectorXf sum = Eigen::RowVectorXf::Zero(in.v.cols());
  for (Index i = 0; i < in.v.rows(); ++i) {
    sum += in.v.row(i);
    out.row(i) = sum / static_cast<float>(i + 1);
  }
}

/// Attention to m keys drawn without replacement, each of which stands for n / m: with a log-weight of log(n / m).
void attend_to_sample(const attn::Inputs<float>& in, Index m, std::uint64_t seed, Matrix<float>& out,
                      attn::Context& context) {
  families::Random random(seed);
  std::vector<Index> order(static_cast<std::size_t>(in.k.rows()));
  std::iota(order.begin(), order.end(), Index{0});
  m = std::min(m, in.k.rows());
  const std::vector<float> weights(static_cast<std::size_t>(m),
                                   std::log(static_cast<float>(in.k.rows()) / static_cast<float>(m)));
  Matrix<float> k(m, in.k.cols()), v(m, in.v.cols());
  for (Index i = 0; i < m; ++i) {
    const auto at = static_cast<std::size_t>(i);
    std::swap(order[at], order[static_cast<std::size_t>(i + random.below(in.k.rows() - i))]);
    k.row(i) = in.k.row(order[at]);
    v.row(i) = in.v.row(order[at]);
  }
  attn::SoftmaxAttention<float>{}.forward({.q = in.q, .k = k, .v = v, .key_bias = weights}, out, context);
}

}  // namespace

Forward make_forward(const Contender& contender, std::uint64_t seed, const attn::Inputs<float>& in) {
  const std::string& name = contender.method;
  const Index m = contender.m;
  if (name == kMean) return average_values;
  const auto context = std::make_shared<attn::Context>();
  if (name == kSample || name == kWildCat || name == kBinnedWildCat) {
    if (in.mask.causal != attn::Causal::none) return {};
    if (name == kSample) return [=](const auto& x, auto& out) { attend_to_sample(x, m, seed, out, *context); };
    const WildCat wildcat{.num_keys = m, .num_bins = name == kWildCat ? 1 : 8, .seed = seed};
    return [=](const auto& x, auto& out) { wildcat.forward(x, out, *context); };
  }
  const auto method = m == 0 ? attn::make_approximator<float>(name) : make_method(name, m, seed);
  if (!method.supports(in)) return {};
  return [=](const auto& x, auto& out) { method.forward(x, out, *context); };
}

std::vector<Contender> all_contenders() {
  const std::pair<std::string_view, std::vector<Index>> sizes[] = {
      {"softmax", {0}},
      {"gaussian", {0}},
      {kMean, {0}},
      {kSample, {64, 128, 256, 512}},
      {"nystrom", {32, 48, 64, 96, 128, 192, 256}},
      {"shifted-nystrom", {64, 128, 256}},
      {"lifted-softmax", {32, 64, 96, 128, 192, 256, 384, 512}},
      {"skyformer", {64, 128, 256, 512}},
      {kWildCat, {32, 64, 96, 128, 192, 256}},
      {kBinnedWildCat, {64, 128, 192, 256, 320, 384, 448, 512, 640}},
      {"multipole", {0, 4, 8, 16, 32, 64, 128}}};
  std::vector<Contender> contenders;
  for (const auto& [method, numbers] : sizes) {
    for (const Index m : numbers) contenders.push_back({std::string(method), m});
  }
  return contenders;
}

}  // namespace accuracy
