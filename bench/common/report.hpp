/// What the Google Benchmark programs share: a timed call with its counters, and main.
#pragma once

#include "errors.hpp"
#include "fma_peak.hpp"
#include "tokens.hpp"

#include <attn/any_approximator.hpp>
#include <attn/context.hpp>
#include <attn/mask.hpp>

#include <benchmark/benchmark.h>

#include <chrono>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <vector>

namespace bench {

using attn::Causal;
using attn::Index;

/// What one call does.
struct Work {
  double flops;
  Index tokens;
  int threads = 1;
};

/// The type that attn calculates in where matrices hold T.
template <class T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

/// Counters of a benchmark whose calls took this long together: GF/s, of_peak (the fraction of an FMA peak) and
/// items_per_second (tokens).
inline void report_rates(benchmark::State& state, const Work& work, double seconds, double peak) {
  const double rate = work.flops * static_cast<double>(state.iterations()) / seconds;
  state.counters["GF/s"] = rate / 1e9;
  state.counters["of_peak"] = rate / peak;
  state.SetItemsProcessed(state.iterations() * work.tokens);
}

/// Times call(). of_peak is the fraction of the FMA peak of as many threads, the mean of samples just before and after.
template <class T, class Call>
void time_calls(benchmark::State& state, const Work& work, const Call& call) {
  using Clock = std::chrono::steady_clock;
  constexpr double kPeakSeconds = 0.01;
  call();
  const double before = fma_peak<Arithmetic<T>>(kPeakSeconds, work.threads);
  const auto start = Clock::now();
  for (auto _ : state) {
    call();
    benchmark::ClobberMemory();
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const double after = fma_peak<Arithmetic<T>>(kPeakSeconds, work.threads);
  report_rates(state, work, seconds, (before + after) / 2);
}

/// Times method.forward on the tokens. More counters: bytes (of scratch memory, the output not among them) and error
/// (bench::Errors::out).
template <class T>
void time_forward(benchmark::State& state, const attn::AnyApproximator<T>& method, Tokens<T>& tokens, double flops,
                  attn::Context& context, Causal causal = Causal::none) {
  const auto inputs = tokens.inputs(causal);
  const Work work{.flops = flops, .tokens = tokens.q.rows(), .threads = context.workers()};
  time_calls<T>(state, work, [&] { method.forward(inputs, tokens.out, context); });
  state.counters["bytes"] = static_cast<double>(context.scratch_bytes());
  state.counters["error"] = errors(method.name(), tokens, causal).out;
}

inline void in_milliseconds(benchmark::internal::Benchmark* benchmark) {
  benchmark->UseRealTime()->Unit(benchmark::kMillisecond);
}

/// Registers function(state, name) for each method, in float; set_sizes(benchmark, exact) does the rest. exact: whether
/// the method is no approximation.
template <class Function, class SetSizes>
void register_methods(const Function& function, const SetSizes& set_sizes) {
  for (const auto& method : attn::methods<float>()) {
    const std::string name(method.name);
    const bool exact = name == "softmax" || name == "gaussian";
    set_sizes(benchmark::RegisterBenchmark((name + "/float").c_str(), function, name), exact);
  }
}

/// The rest of main once all benchmarks are registered. Each runs for 0.05 s; defaults are more flags, and those of the
/// command line override them all.
inline int run_benchmarks(int argc, char** argv, std::initializer_list<const char*> defaults = {}) {
  std::vector<std::string> flags{argv[0], "--benchmark_min_time=0.05", "--benchmark_counters_tabular=true"};
  flags.insert(flags.end(), defaults.begin(), defaults.end());
  flags.insert(flags.end(), argv + 1, argv + argc);
  std::vector<char*> arguments;
  for (std::string& flag : flags) arguments.push_back(flag.data());
  int count = static_cast<int>(arguments.size());
  arguments.push_back(nullptr);
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 1;
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace bench
