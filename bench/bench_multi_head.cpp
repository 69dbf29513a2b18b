/// What does multi_head cost beyond a loop over the heads, and what does a second core bring to many heads and to few?
#include <attn/exact.hpp>
#include <attn/multi_head.hpp>
#include <attn/openmp.hpp>
#include <attn/skyformer.hpp>

#include "common/flops.hpp"
#include "common/report.hpp"

#include <benchmark/benchmark.h>

#include <algorithm>

namespace {

using attn::Index;

constexpr Index kDim = 64, kLandmarks = 128;

enum class Layout { head_major, token_major };

/// The rows of m as the heads of one batch item, n tokens each.
attn::HeadsView<float> view(attn::Matrix<float>& m, Layout layout, Index n) {
  const Index heads = m.rows() / n;
  if (layout == Layout::head_major) return attn::head_major(m.data(), 1, heads, n, kDim);
  return attn::token_major(m.data(), 1, n, heads, kDim);
}

/// multi_head by so many workers or, for 0 workers, a loop over the heads on the calling thread.
template <attn::Approximator Method>
void time_heads(benchmark::State& state, const Method& method, Layout layout, double flops_of_one) {
  const Index heads = state.range(0), n = state.range(1);
  const int workers = std::max(1, static_cast<int>(state.range(2)));
  auto tokens = bench::smooth_tokens<float>(heads * n, kDim);
  const auto q = view(tokens.q, layout, n), k = view(tokens.k, layout, n), v = view(tokens.v, layout, n);
  const auto out = view(tokens.out, layout, n);
  const double flops = static_cast<double>(heads) * flops_of_one;
  attn::Context context{attn::OpenMP{.threads = workers}};
  if (state.range(2) > 0) {
    bench::time_calls<float>(state, flops, workers, [&] { attn::multi_head(method, q, k, v, out, {}, context); });
  } else {
    bench::time_calls<float>(state, flops, workers, [&] {
      for (Index h = 0; h < heads; ++h) method.forward({.q = q(0, h), .k = k(0, h), .v = v(0, h)}, out(0, h), context);
    });
  }
}

void softmax(benchmark::State& state, Layout layout) {
  const Index n = state.range(1);
  time_heads(state, attn::SoftmaxAttention<float>{}, layout, bench::attention_flops(n, n, kDim));
}

void skyformer(benchmark::State& state, Layout layout) {
  const attn::Skyformer<float> method{attn::UniformSample{.num_landmarks = kLandmarks}};
  time_heads(state, method, layout, bench::landmark_flops(state.range(1), kLandmarks, kDim));
}

void options(benchmark::internal::Benchmark* benchmark) {
  benchmark->ArgNames({"heads", "n", "workers"})->UseRealTime()->Unit(benchmark::kMicrosecond);
}

}  // namespace

int main(int argc, char** argv) {
  const auto small = [](benchmark::internal::Benchmark* benchmark) {
    for (const int workers : {0, 1, 2}) benchmark->Args({1000, 16, workers})->Args({64, 64, workers});
  };
  const auto large = [](benchmark::internal::Benchmark* benchmark) {
    benchmark->ArgsProduct({{1, 3, 8}, {512, 2048}, {0, 1, 2}});
  };
  const auto head_major = Layout::head_major, token_major = Layout::token_major;
  benchmark::RegisterBenchmark("softmax/head_major", softmax, head_major)->Apply(small)->Apply(large)->Apply(options);
  benchmark::RegisterBenchmark("softmax/token_major", softmax, token_major)->Apply(small)->Apply(large)->Apply(options);
  benchmark::RegisterBenchmark("skyformer/head_major", skyformer, head_major)->Apply(large)->Apply(options);
  benchmark::RegisterBenchmark("skyformer/token_major", skyformer, token_major)->Apply(large)->Apply(options);
  return bench::run_benchmarks(argc, argv);
}
