/// attn's forward and backward passes against autograd on the same graphs, and the module that puts them into libtorch.
#include "common/support.hpp"
#include "torch/attention.hpp"
#include "torch/graphs.hpp"

#include <attn/any_approximator.hpp>
#include <attn/context.hpp>
#include <attn/landmarks.hpp>

#include <gtest/gtest.h>

#include <torch/autograd.h>
#include <torch/optim/adamw.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace {

using attn_torch::Attention;
using attn_torch::Keep;
using torch::Tensor;

constexpr long kLandmarks = 12;
constexpr double kGamma = 0.1;

constexpr std::uint64_t kSeed = 3;

/// A small one of every method.
attn::MethodOptions small(std::string_view method) {
  if (method == "multipole") return {.num_clusters = kLandmarks, .num_near = kLandmarks / 4};
  const auto& entry = attn::find_method<float>(method);
  attn::MethodOptions options;
  if (entry.takes("num_landmarks")) options.num_landmarks = kLandmarks;
  if (entry.takes("gamma")) options.gamma = kGamma;
  if (entry.takes("seed")) options.seed = kSeed;
  return options;
}

struct Sequences {
  Tensor q, k, v;
  std::vector<Tensor> all() const { return {q, k, v}; }
};

Sequences random_sequences(long n_q, long n_k) {
  torch::manual_seed(401);
  const auto normal = [](long n, long d) { return torch::randn({2, 3, n, d}, torch::kDouble).requires_grad_(); };
  return {normal(n_q, 8), normal(n_k, 8), normal(n_k, 5)};
}

std::span<const std::uint8_t> bytes(const Tensor& keep) {
  return {static_cast<const std::uint8_t*>(keep.data_ptr()), static_cast<std::size_t>(keep.size(0))};
}

/// Which rows of [q; k] attn samples: tokens whose only feature is their number go through the sampling.
std::vector<long> sampled_rows(const graphs::Problem& p) {
  const long n_q = p.q.size(-2), n_k = p.k.size(-2);
  attn::Matrix<double> q(n_q, 1), k(n_k, 1);
  for (long i = 0; i < n_q; ++i) q(i, 0) = static_cast<double>(i);
  for (long j = 0; j < n_k; ++j) k(j, 0) = static_cast<double>(n_q + j);
  attn::Context context;
  attn::Scratch scratch = context.scratch();
  const attn::Inputs<double> in{
      .q = q, .k = k, .v = k, .mask = {.keep_key = bytes(p.keep_key), .keep_query = bytes(p.keep_query)}};
  const auto land = attn::UniformSample{.num_landmarks = kLandmarks, .seed = kSeed}.select(in, scratch);
  std::vector<long> rows;
  for (long i = 0; i < land.rows(); ++i) rows.push_back(static_cast<long>(land(i, 0)));
  return rows;
}

Tensor graph_of(const std::string& method, const graphs::Problem& p) {
  if (method == "softmax") return graphs::softmax(p);
  if (method == "gaussian") return graphs::gaussian(p);
  if (method == "nystrom") return graphs::nystrom(p, kLandmarks, 6);
  return graphs::skyformer(p, sampled_rows(p), kGamma);
}

Tensor batch_graph_of(const std::string& method, const Sequences& s, const Keep& keep) {
  std::vector<Tensor> items;
  for (long b = 0; b < s.q.size(0); ++b) {
    items.push_back(graph_of(method, {s.q[b], s.k[b], s.v[b], keep.key[b], keep.query[b]}));
  }
  return torch::stack(items);
}

/// The result and its gradients by q, k and v, for one random gradient of the result.
std::vector<Tensor> step(const Tensor& out, const Sequences& s) {
  torch::manual_seed(402);
  std::vector<Tensor> all = torch::autograd::grad({out}, s.all(), {torch::randn(out.sizes(), out.options())});
  all.insert(all.begin(), out);
  return all;
}

void expect_same(const std::vector<Tensor>& actual, const std::vector<Tensor>& expected, double tolerance) {
  const char* const names[] = {"out", "dq", "dk", "dv"};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double error = ((actual[i] - expected[i]).norm() / expected[i].norm()).item<double>();
    EXPECT_LT(error, tolerance) << names[i];
  }
}

class Graph : public ::testing::TestWithParam<const char*> {};

INSTANTIATE_TEST_SUITE_P(Of, Graph, ::testing::Values("softmax", "gaussian", "nystrom", "skyformer"),
                         [](const auto& method) { return std::string(method.param); });

TEST_P(Graph, AgreesWithAutograd) {
  for (const auto& [n_q, n_k] : {std::array<long, 2>{37, 37}, {41, 67}, {150, 29}}) {
    const Sequences s = random_sequences(n_q, n_k);
    const Keep everything{torch::ones({2, n_k}, torch::kBool), torch::ones({2, n_q}, torch::kBool)};
    const Keep some{torch::rand({2, n_k}) < 0.8, torch::rand({2, n_q}) < 0.8};
    for (const Keep& keep : {everything, some}) {
      SCOPED_TRACE(std::to_string(n_q) + " queries, " + std::to_string(keep.query.sum().item<long>()) + " kept");
      const Tensor out = Attention(GetParam(), small(GetParam()))->forward(s.q, s.k, s.v, keep);
      expect_same(step(out, s), step(batch_graph_of(GetParam(), s, keep), s), 1e-9);
    }
  }
}

Tensor torch_softmax(const Tensor& q, const Tensor& k, const Tensor& v) {
  return torch::matmul(graphs::softmax_matrix(q, k, 1 / std::sqrt(static_cast<double>(q.size(-1)))), v);
}

TEST(TorchAttention, WorksInPlaceOnTheHeadsOfAProjection) {
  torch::manual_seed(403);
  const Tensor projected =
      torch::randn({2, 50, 3 * 4 * 16}).requires_grad_();  // q, k and v of four heads, side by side
  const auto part = [&](long i) { return projected.view({2, 50, 3, 4, 16}).select(2, i).transpose(1, 2); };
  const Tensor out = Attention("softmax")->forward(part(0), part(1), part(2));
  EXPECT_EQ(out.sizes(), (std::vector<std::int64_t>{2, 4, 50, 16}));
  EXPECT_TRUE(out.transpose(1, 2).is_contiguous());
  const Tensor expected = torch_softmax(part(0), part(1), part(2));
  const auto gradient = [&](const Tensor& of) { return torch::autograd::grad({of.pow(2).sum()}, {projected})[0]; };
  expect_same({out, gradient(out)}, {expected, gradient(expected)}, 1e-5);
}

TEST(TorchAttention, SharesKeysAmongGroupsOfHeads) {
  torch::manual_seed(404);
  const Tensor q = torch::randn({2, 4, 30, 8}).requires_grad_(), k = torch::randn({2, 2, 30, 8}).requires_grad_();
  const Tensor v = torch::randn({2, 2, 30, 8}).requires_grad_();
  const Tensor expected = torch_softmax(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1));
  expect_same(step(Attention("softmax")->forward(q, k, v), {q, k, v}), step(expected, {q, k, v}), 1e-5);
}

TEST(TorchAttention, TakesAGradientThatIsOneNumberEverywhere) {
  const Sequences s = random_sequences(20, 20);
  const auto gradients = [&](const Tensor& out) { return torch::autograd::grad({out.sum()}, s.all()); };
  const std::vector<Tensor> expected = gradients(torch_softmax(s.q, s.k, s.v));
  const std::vector<Tensor> actual = gradients(Attention("softmax")->forward(s.q, s.k, s.v));
  for (std::size_t i = 0; i < 3; ++i) EXPECT_TRUE(torch::allclose(actual[i], expected[i], 1e-9, 1e-12));
}

TEST(TorchAttention, EveryMethodGivesTheSameWithAndWithoutGradients) {
  const Sequences s = random_sequences(40, 40);
  for (const auto& method : attn::methods<double>()) {
    const Attention attention(method.name, small(method.name));
    const Tensor trained = attention->forward(s.q, s.k, s.v);
    EXPECT_TRUE(trained.requires_grad());
    const torch::NoGradGuard inference;
    EXPECT_TRUE(torch::equal(attention->forward(s.q, s.k, s.v), trained)) << method.name;
  }
}

TEST(TorchAttention, LearnsWhatItsOwnGradientsSay) {
  for (const auto& method : attn::methods<double>()) {
    const Sequences s = random_sequences(40, 40);
    const Attention attention(method.name, small(method.name));
    torch::optim::AdamW optimizer(s.all(), torch::optim::AdamWOptions(0.05));
    const auto loss_after = [&](int steps) {
      Tensor loss;
      for (int i = 0; i <= steps; ++i) {
        optimizer.zero_grad();
        loss = (attention->forward(s.q, s.k, s.v) - 1).pow(2).mean();
        loss.backward();
        if (i < steps) optimizer.step();
      }
      return loss.item<double>();
    };
    const double before = loss_after(0);
    EXPECT_LT(loss_after(20), 0.5 * before) << method.name;
  }
}

TEST(TorchAttention, RefusesWithTheNumbers) {
  const Sequences s = random_sequences(20, 30);
  const Attention attention("softmax");
  const auto refused = [&](const Tensor& q, const Keep& keep) {
    return test::error_of([&] { static_cast<void>(attention->forward(q, s.k, s.v, keep)); });
  };
  EXPECT_EQ(refused({}, {}), "attn_torch: q is undefined");
  EXPECT_EQ(refused(s.q[0], {}), "attn_torch: q has 3 dimensions, should have 4 (batch, heads, tokens, features)");
  EXPECT_EQ(refused(s.q.to(torch::kFloat), {}), "attn_torch: k has elements of type Double, should be Float");
  EXPECT_EQ(refused(s.q.transpose(2, 3), {}),
            "attn_torch: q has strides [480, 160, 1, 8], should have features side by side: use .contiguous()");
  EXPECT_EQ(refused(s.q.slice(3, 0, 7), {}), "multi_head: q has 7 columns, k has 8");
  EXPECT_EQ(refused(s.q, {.key = torch::ones({2, 31}, torch::kBool)}),
            "attn_torch: keep.key is [2, 31], should be [2, 30]");
  EXPECT_EQ(refused(s.q, {.key = torch::ones({2, 30})}),
            "attn_torch: keep.key should be a contiguous boolean tensor on cpu");
  EXPECT_EQ(test::error_of([] { Attention("performer"); }).substr(0, 51),
            "make_approximator: no method is called \"performer\";");
}

TEST(TorchAttention, RefusesGradientsOfGradients) {
  const Sequences s = random_sequences(20, 20);
  const Tensor loss = Attention("softmax")->forward(s.q, s.k, s.v).sum();
  EXPECT_EQ(test::error_of([&] { torch::autograd::grad({loss}, s.all(), {}, {}, true); }),
            "attn_torch: gradients have no gradients: call backward without create_graph");
}

}  // namespace
