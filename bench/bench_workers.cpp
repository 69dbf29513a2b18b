/// What does a second core bring to attn, and what to multiply-adds on registers?
#include <attn/exact.hpp>
#include <attn/openmp.hpp>
#include <attn/skyformer.hpp>

#include "common/flops.hpp"
#include "common/report.hpp"

#include <benchmark/benchmark.h>

namespace {

using attn::Causal;

constexpr attn::Index kDim = 64, kLandmarks = 128;

attn::Context with_workers(const benchmark::State& state) {
  return attn::Context{attn::OpenMP{.threads = static_cast<int>(state.range(1))}};
}

void softmax(benchmark::State& state, Causal causal) {
  const auto n = state.range(0);
  auto tokens = bench::normal_tokens<float>(n, kDim);
  attn::Context context = with_workers(state);
  bench::time_forward(state, attn::SoftmaxAttention<float>{}, tokens, bench::attention_flops(n, n, kDim, causal), context, causal);
}

void skyformer(benchmark::State& state) {
  const auto n = state.range(0);
  auto tokens = bench::smooth_tokens<float>(n, kDim);
  attn::Context context = with_workers(state);
  const attn::Skyformer<float> method{attn::UniformSample{.num_landmarks = kLandmarks}};
  bench::time_forward(state, method, tokens, bench::landmark_flops(n, kLandmarks, kDim), context);
}

/// One iteration is one peak measurement of a fixed length: its flops are what counts, not its time.
void fma_peak(benchmark::State& state) {
  double flops_per_second = 0;
  for (auto _ : state) flops_per_second += bench::fma_peak<float>(0.01, static_cast<int>(state.range(0)));
  using benchmark::Counter;
  state.counters["flops"] = Counter(flops_per_second, Counter::kAvgIterations, Counter::kIs1000);
}

void options(benchmark::internal::Benchmark* benchmark) {
  benchmark->UseRealTime()->Unit(benchmark::kMillisecond);
}

}  // namespace

int main(int argc, char** argv) {
  benchmark::RegisterBenchmark("fma_peak/float", fma_peak)->ArgName("workers")->Arg(1)->Arg(2)->Apply(options);
  const auto sweep = [](benchmark::internal::Benchmark* benchmark) {
    benchmark->ArgNames({"n", "workers"})->ArgsProduct({{512, 2048, 8192}, {1, 2}})->Apply(options);
  };
  benchmark::RegisterBenchmark("softmax/float", softmax, Causal::none)->Apply(sweep);
  benchmark::RegisterBenchmark("softmax/float/causal", softmax, Causal::upper_left)->Apply(sweep);
  benchmark::RegisterBenchmark("skyformer/float", skyformer)->Apply(sweep);
  return bench::run_benchmarks(argc, argv);
}
