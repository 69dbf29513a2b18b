/// What does a backward pass cost, beside the forward pass of inference?
#include "common/flops.hpp"
#include "common/report.hpp"

#include <attn/any_approximator.hpp>

#include <benchmark/benchmark.h>

#include <chrono>
#include <string>

namespace {

using attn::Index;
using attn::Matrix;
using Clock = std::chrono::steady_clock;

constexpr Index kDim = 64, kLandmarks = 64;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// The time is that of backward alone. Counters: over_forward, how many times that of forward, both timed in turn;
/// bytes; GF/s and of_peak, on kBackwardOverForward times the flops of the forward pass.
void backward(benchmark::State& state, const std::string& name) {
  const Index n = state.range(0);
  auto& tokens = bench::kept_tokens<float>(bench::Family::smooth, n, kDim);
  const auto method = attn::find_method<float>(name).make({.num_landmarks = kLandmarks});
  const auto inputs = tokens.inputs();
  const Matrix<float> dout = Matrix<float>::Ones(n, kDim);
  Matrix<float> dq(n, kDim), dk(n, kDim), dv(n, kDim);
  attn::Context context;
  attn::AnyApproximator<float>::Saved saved;
  method.forward(inputs, tokens.out, context, saved);
  const auto run = [&] { method.backward(inputs, tokens.out, dout, saved, {.dq = dq, .dk = dk, .dv = dv}, context); };
  run();
  double of_forward = 0, of_backward = 0;
  const double before = bench::fma_peak<float>(0.01);
  for (auto _ : state) {
    auto start = Clock::now();
    method.forward(inputs, tokens.out, context);
    of_forward += seconds_since(start);
    start = Clock::now();
    run();
    const double seconds = seconds_since(start);
    of_backward += seconds;
    state.SetIterationTime(seconds);
  }
  const double peak = (before + bench::fma_peak<float>(0.01)) / 2;
  const double forward_flops = bench::forward_flops(name, n, kLandmarks, kDim);
  bench::report_rates(state, {.flops = bench::kBackwardOverForward * forward_flops, .tokens = n}, of_backward, peak);
  state.counters["over_forward"] = of_backward / of_forward;
  state.counters["bytes"] = static_cast<double>(context.scratch_bytes());
}

}  // namespace

int main(int argc, char** argv) {
  bench::register_methods(backward, [](auto* benchmark, bool exact) {
    benchmark->ArgName("n")->Arg(1024)->Arg(4096)->UseManualTime()->Unit(benchmark::kMillisecond);
    if (!exact) benchmark->Arg(16384)->Arg(65536);
  });
  return bench::run_benchmarks(argc, argv);
}
