/// How do time and memory grow with the length of the sequence, and from which length on does an approximation pay?
/// plot.py growth prints the exponents and the crossings.
#include "common/flops.hpp"
#include "common/report.hpp"

#include <benchmark/benchmark.h>

#include <algorithm>
#include <string>

namespace {

using attn::Index;

constexpr Index kDim = 64, kLandmarks = 64;

/// Smooth tokens that repeat after 65536, because drawing more would take longer than what is measured.
bench::Tokens<float> long_tokens(Index n) {
  const Index drawn = std::min<Index>(n, 65536), copies = n / drawn;
  const auto& period = bench::kept_tokens<float>(bench::Family::smooth, drawn, kDim);
  return {.q = period.q.replicate(copies, 1),
          .k = period.k.replicate(copies, 1),
          .v = period.v.replicate(copies, 1),
          .out = attn::Matrix<float>::Zero(n, kDim)};
}

/// Counter bytes: of scratch memory, beside inputs and output.
void growth(benchmark::State& state, const std::string& name) {
  const Index n = state.range(0);
  const auto method = attn::find_method<float>(name).make({.num_landmarks = kLandmarks});
  auto tokens = long_tokens(n);
  const auto inputs = tokens.inputs();
  attn::Context context;
  const double flops = bench::forward_flops(name, n, kLandmarks, kDim);
  bench::time_calls<float>(state, {.flops = flops, .tokens = n}, [&] { method.forward(inputs, tokens.out, context); });
  state.counters["bytes"] = static_cast<double>(context.scratch_bytes());
}

}  // namespace

int main(int argc, char** argv) {
  bench::register_methods(growth, [](auto* benchmark, bool exact) {
    benchmark->ArgName("n")->RangeMultiplier(2)->Range(128, exact ? 32768 : 1 << 20)->Apply(bench::in_milliseconds);
  });
  return bench::run_benchmarks(argc, argv);
}
