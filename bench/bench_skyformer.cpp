/// How does Skyformer's time grow with the tokens and the landmarks, and what error does it buy?
#include <attn/exact.hpp>
#include <attn/skyformer.hpp>

#include "common/flops.hpp"
#include "common/report.hpp"

#include <benchmark/benchmark.h>

#include <algorithm>

namespace {

using attn::Index;

constexpr Index kDim = 64;

/// Relative Frobenius errors on the first queries, at most 512, which is all that exact attention can afford here.
struct Errors {
  double out, mean_v;
};

/// Of tokens.out against exact Gaussian attention, and of the trivial answer, every row the mean of v, normalised as
/// exact rows are: a method that is not better than that has found nothing.
Errors errors(const bench::Tokens<float>& tokens) {
  const Index rows = std::min<Index>(tokens.q.rows(), 512);
  const auto exact = [&](const attn::Matrix<float>& v) {
    return attn::attention(attn::GaussianAttention<float>{}, tokens.q.topRows(rows), tokens.k, v);
  };
  const attn::Matrix<float> truth = exact(tokens.v);
  const attn::Matrix<float> row_sums = exact(attn::Matrix<float>::Ones(tokens.v.rows(), 1));
  const attn::Matrix<float> trivial = row_sums * tokens.v.colwise().mean();
  return {.out = (tokens.out.topRows(rows) - truth).norm() / truth.norm(), .mean_v = (trivial - truth).norm() / truth.norm()};
}

void skyformer(benchmark::State& state) {
  const Index n = state.range(0), num_landmarks = state.range(1);
  auto tokens = bench::smooth_tokens<float>(n, kDim);
  attn::Context context;
  const attn::Skyformer<float> method{attn::UniformSample{.num_landmarks = num_landmarks}};
  bench::time_forward(state, method, tokens, bench::landmark_flops(n, num_landmarks, kDim), context);
  const auto [out, mean_v] = errors(tokens);
  state.counters["error"] = out;
  state.counters["error_of_mean_v"] = mean_v;
}

void gaussian(benchmark::State& state) {
  const Index n = state.range(0);
  auto tokens = bench::smooth_tokens<float>(n, kDim);
  attn::Context context;
  bench::time_forward(state, attn::GaussianAttention<float>{}, tokens, bench::attention_flops(n, n, kDim), context);
}

void options(benchmark::internal::Benchmark* benchmark) {
  benchmark->UseRealTime()->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::RegisterBenchmark("gaussian/float", gaussian)->ArgName("n")->RangeMultiplier(4)->Range(1024, 16384)->Apply(options);
  benchmark::RegisterBenchmark("skyformer/float", skyformer)
      ->ArgNames({"n", "m"})
      ->ArgsProduct({{1024, 4096, 16384, 65536}, {64, 128, 256, 512}})
      ->Apply(options);
  return bench::run_benchmarks(argc, argv);
}
