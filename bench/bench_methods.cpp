/// What does each approximation cost, and what error does it buy?
#include "common/flops.hpp"
#include "common/report.hpp"

#include <benchmark/benchmark.h>

#include <string>

namespace {

constexpr attn::Index kDim = 64;

void approximation(benchmark::State& state, const std::string& name, int iterations) {
  const auto n = state.range(0), m = state.range(1);
  auto& tokens = bench::kept_tokens<float>(bench::Family::smooth, n, kDim);
  attn::Context context;
  const auto method = attn::find_method<float>(name).make({.num_landmarks = m, .iterations = iterations});
  bench::time_forward(state, method, tokens, bench::landmark_flops(n, m, kDim), context);
  state.counters["error_of_mean_v"] = bench::errors(name, tokens).mean_v;
}

void multipole(benchmark::State& state) {
  const auto n = state.range(0), near = state.range(1);
  auto& tokens = bench::kept_tokens<float>(bench::Family::smooth, n, kDim);
  attn::Context context;
  const auto method = attn::make_approximator<float>("multipole", {.num_near = near});
  bench::time_forward(state, method, tokens, bench::multipole_flops(n, {.num_near = near}, kDim), context);
  state.counters["error_of_mean_v"] = bench::errors("multipole", tokens).mean_v;
}

void add(const std::string& method, const std::string& variant, int iterations) {
  benchmark::RegisterBenchmark((method + variant + "/float").c_str(), approximation, method, iterations)
      ->ArgNames({"n", "m"})
      ->ArgsProduct({{1024, 4096, 16384, 65536}, {32, 64, 128, 256, 512}})
      ->Apply(bench::in_milliseconds);
}

}  // namespace

int main(int argc, char** argv) {
  for (const auto& method : attn::methods<float>()) {
    const std::string name(method.name);
    if (name != "softmax" && name != "gaussian" && name != "multipole") add(name, "", 6);
  }
  benchmark::RegisterBenchmark("multipole/float", multipole)
      ->ArgNames({"n", "near"})
      ->ArgsProduct({{1024, 4096, 16384, 65536}, {0, 4, 16, 64}})
      ->Apply(bench::in_milliseconds);
  add("nystrom", "/iterations:1", 1);  // what is left of the time is that of the other five
  return bench::run_benchmarks(argc, argv);
}
