/// What the Google Benchmark programs share: a timed method with its counters, and main.
#pragma once

#include <attn/context.hpp>
#include <attn/mask.hpp>

#include "fma_peak.hpp"
#include "tokens.hpp"

#include <benchmark/benchmark.h>

#include <chrono>
#include <string>
#include <vector>

namespace bench {

/// Times call(), which does so many flops of T on so many threads. Counters: flops (a second), and of_peak, the
/// fraction of the FMA peak of as many threads, measured just before.
template <class T, class Call>
void time_calls(benchmark::State& state, double flops, int threads, const Call& call) {
  using Clock = std::chrono::steady_clock;
  call();
  const double peak = fma_peak<T>(0.01, threads);
  const auto start = Clock::now();
  for (auto _ : state) {
    call();
    benchmark::ClobberMemory();
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const double rate = flops * static_cast<double>(state.iterations()) / seconds;
  state.counters["flops"] = benchmark::Counter(rate, benchmark::Counter::kDefaults, benchmark::Counter::kIs1000);
  state.counters["of_peak"] = rate / peak;
}

/// Times method.forward on the tokens, with the counters of time_calls.
template <class Method>
void time_forward(benchmark::State& state, const Method& method, Tokens<typename Method::Scalar>& tokens, double flops,
                  attn::Context& context, attn::Causal causal = attn::Causal::none) {
  const auto inputs = tokens.inputs(causal);
  const auto call = [&] { method.forward(inputs, tokens.out, context); };
  time_calls<typename Method::Scalar>(state, flops, context.workers(), call);
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
