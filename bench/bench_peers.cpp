/// How fast is attn beside what else does softmax attention and Nystromformer on a CPU? The same inputs on one thread
/// of one process; the repetitions of all benchmarks in a random order, so that their medians and deviations compare.
#include "common/flops.hpp"
#include "common/report.hpp"
#include "peers/peer.hpp"

#include <benchmark/benchmark.h>

#include <cstdio>
#include <string>
#include <string_view>
#include <vector>

namespace {

using attn::Matrix;
using bench::Causal;
using bench::Index;

constexpr Index kDim = 64;

void attn_softmax(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context& context) {
  static const auto method = attn::make_approximator<float>("softmax");
  method.forward(in, out, context);
}

void attn_nystrom(const attn::Inputs<float>& in, attn::MatrixRef<float> out, attn::Context& context) {
  static const auto method = attn::make_approximator<float>("nystrom", {.num_landmarks = bench::kPeerLandmarks});
  method.forward(in, out, context);
}

/// attn, then those that were installed when this was configured.
std::vector<bench::Peer> peers() {
  return {
      {.name = "attn", .forward = attn_softmax, .nystrom = attn_nystrom},
      bench::eigen_blocks(),
#ifdef ATTN_BENCH_OPENBLAS
      bench::openblas_blocks(),
#endif
#ifdef ATTN_BENCH_ONEDNN
      bench::onednn_blocks(),
#endif
#ifdef ATTN_BENCH_LIBTORCH
      bench::libtorch(),
#endif
  };
}

void forward(benchmark::State& state, const bench::Peer& peer, Causal causal) {
  const Index n = state.range(0);
  auto& tokens = bench::kept_tokens<float>(bench::Family::unit, n, kDim);
  attn::Context context;
  const auto inputs = tokens.inputs(causal);
  const bench::Work work{.flops = bench::attention_flops(n, n, kDim, causal), .tokens = n};
  bench::time_calls<float>(state, work, [&] { peer.forward(inputs, tokens.out, context); });
  const double error = bench::errors("softmax", tokens, causal).out;
  if (!(error < 1e-5)) state.SkipWithError("its result is not softmax attention");
  state.counters["error"] = error;
}

/// The relative distance of the tokens' output to attn's Nystrom in double.
double error_of_nystrom(const bench::Tokens<float>& tokens) {
  const Matrix<double> q = tokens.q.cast<double>(), k = tokens.k.cast<double>(), v = tokens.v.cast<double>();
  const auto method = attn::make_approximator<double>("nystrom", {.num_landmarks = bench::kPeerLandmarks});
  const Matrix<double> expected = attn::attention(method, q, k, v);
  return (tokens.out.cast<double>() - expected).norm() / expected.norm();
}

void nystrom(benchmark::State& state, const bench::Peer& peer) {
  const Index n = state.range(0);
  auto& tokens = bench::kept_tokens<float>(bench::Family::smooth, n, kDim);
  attn::Context context;
  const auto inputs = tokens.inputs();
  const bench::Work work{.flops = bench::landmark_flops(n, bench::kPeerLandmarks, kDim), .tokens = n};
  bench::time_calls<float>(state, work, [&] { peer.nystrom(inputs, tokens.out, context); });
  const double error = error_of_nystrom(tokens);
  if (!(error < 1e-4)) state.SkipWithError("its result is not Nystromformer's");
  state.counters["error"] = error;
}

void add(const bench::Peer& peer, Causal causal) {
  const std::string name = std::string(peer.name) + (causal == Causal::none ? "" : "/causal");
  benchmark::RegisterBenchmark(name.c_str(), forward, peer, causal)
      ->ArgName("n")
      ->RangeMultiplier(2)
      ->Range(512, 8192)
      ->Apply(bench::in_milliseconds);
}

void add_nystrom(const bench::Peer& peer) {
  benchmark::RegisterBenchmark((std::string(peer.name) + "/nystrom").c_str(), nystrom, peer)
      ->ArgName("n")
      ->Arg(16384)
      ->Arg(65536)
      ->Apply(bench::in_milliseconds);
}

}  // namespace

int main(int argc, char** argv) {
#ifdef ATTN_BENCH_OPENBLAS
  bench::restart_with_wide_openblas(argv);
#endif
  if (!std::string_view(ATTN_BENCH_MISSING).empty()) {
    std::fprintf(stderr, "bench_peers: skipped, because not found by CMake: %s\n", ATTN_BENCH_MISSING);
  }
  for (const bench::Peer& peer : peers()) {
    add(peer, Causal::none);
    add(peer, Causal::upper_left);
    if (peer.nystrom != nullptr) add_nystrom(peer);
  }
  constexpr const char* kInterleaved = "--benchmark_enable_random_interleaving=true";
  constexpr const char* kMedians = "--benchmark_report_aggregates_only=true";
  return bench::run_benchmarks(argc, argv, {"--benchmark_repetitions=5", kInterleaved, kMedians});
}
