/// What the Google Benchmark programs share: a timed method with its counters, and main.
#pragma once

#include <attn/approximator.hpp>

#include "fma_peak.hpp"
#include "tokens.hpp"

#include <benchmark/benchmark.h>

#include <chrono>
#include <string>
#include <vector>

namespace bench {

/// Times method.forward on the tokens. Counters: flops (a second), and of_peak, the fraction of the FMA peak of as many
/// threads, measured just before.
template <attn::Approximator Method>
void time_forward(benchmark::State& state, const Method& method, Tokens<typename Method::Scalar>& tokens, double flops,
                  attn::Context& context, attn::Causal causal = attn::Causal::none) {
  using Clock = std::chrono::steady_clock;
  const auto inputs = tokens.inputs(causal);
  method.forward(inputs, tokens.out, context);
  const double peak = fma_peak<typename Method::Scalar>(0.01, context.workers());
  const auto start = Clock::now();
  for (auto _ : state) {
    method.forward(inputs, tokens.out, context);
    benchmark::ClobberMemory();
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const double rate = flops * static_cast<double>(state.iterations()) / seconds;
  state.counters["flops"] = benchmark::Counter(rate, benchmark::Counter::kDefaults, benchmark::Counter::kIs1000);
  state.counters["of_peak"] = rate / peak;
}

/// The rest of main once all benchmarks are registered. Each runs for 0.05 s unless --benchmark_min_time says
/// otherwise.
inline int run_benchmarks(int argc, char** argv) {
  std::string min_time = "--benchmark_min_time=0.05";
  std::vector<char*> arguments(argv, argv + argc);
  arguments.insert(arguments.begin() + 1, min_time.data());
  int count = static_cast<int>(arguments.size());
  arguments.push_back(nullptr);
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace bench
