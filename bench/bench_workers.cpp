/// What does a second core bring to one head, and what to multiply-adds on registers?
#include "common/flops.hpp"
#include "common/report.hpp"

#include <attn/openmp.hpp>

#include <benchmark/benchmark.h>

#include <cstdint>
#include <string>
#include <vector>

namespace {

using bench::Causal;

constexpr attn::Index kDim = 64, kLandmarks = 64;

void method(benchmark::State& state, const std::string& name, Causal causal) {
  const auto n = state.range(0);
  const bool exact = name == "softmax";
  auto& tokens = bench::kept_tokens<float>(exact ? bench::Family::unit : bench::Family::smooth, n, kDim);
  attn::Context context{attn::OpenMP{.threads = static_cast<int>(state.range(1))}};
  const double flops = exact ? bench::attention_flops(n, n, kDim, causal) : bench::landmark_flops(n, kLandmarks, kDim);
  const auto any = attn::find_method<float>(name).make({.num_landmarks = kLandmarks});
  bench::time_forward(state, any, tokens, flops, context, causal);
}

/// One iteration is one peak measurement of a fixed length: its rate is what counts, not its time.
void fma_peak(benchmark::State& state) {
  double flops_per_second = 0;
  for (auto _ : state) flops_per_second += bench::fma_peak<float>(0.01, static_cast<int>(state.range(0)));
  state.counters["GF/s"] = flops_per_second / 1e9 / static_cast<double>(state.iterations());
}

}  // namespace

int main(int argc, char** argv) {
  auto* peak = benchmark::RegisterBenchmark("fma_peak/float", fma_peak);
  peak->ArgName("workers")->Arg(1)->Arg(2)->Apply(bench::in_milliseconds);
  const auto add = [](const std::string& name, const std::string& label, const std::vector<std::int64_t>& lengths,
                      Causal causal = Causal::none) {
    auto* benchmark = benchmark::RegisterBenchmark(label.c_str(), method, name, causal);
    benchmark->ArgNames({"n", "workers"})->ArgsProduct({lengths, {1, 2}})->Apply(bench::in_milliseconds);
  };
  add("softmax", "softmax/float", {512, 2048, 8192});
  add("softmax", "softmax/float/causal", {512, 2048, 8192}, Causal::upper_left);
  add("nystrom", "nystrom/float", {2048, 16384, 65536});
  add("skyformer", "skyformer/float", {2048, 16384, 65536});
  return bench::run_benchmarks(argc, argv);
}
