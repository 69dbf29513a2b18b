/// What does multi_head cost beyond a loop over the heads, and what does a second core bring to many heads and to few?
#include "common/flops.hpp"
#include "common/report.hpp"

#include <attn/multi_head.hpp>
#include <attn/openmp.hpp>

#include <benchmark/benchmark.h>

#include <algorithm>
#include <string>

namespace {

using attn::Index;

constexpr Index kDim = 64, kLandmarks = 64;

enum class Layout { head_major, token_major };

/// The rows of m as the heads of one batch item, n tokens each.
attn::HeadsView<float> view(attn::Matrix<float>& m, Layout layout, Index n) {
  const Index heads = m.rows() / n;
  if (layout == Layout::head_major) return attn::head_major(m.data(), 1, heads, n, kDim);
  return attn::token_major(m.data(), 1, n, heads, kDim);
}

/// multi_head by so many workers or, for 0 workers, a loop over the heads on the calling thread.
void heads(benchmark::State& state, const std::string& name, Layout layout) {
  const Index heads = state.range(0), n = state.range(1);
  const int workers = std::max(1, static_cast<int>(state.range(2)));
  auto& tokens = bench::kept_tokens<float>(bench::Family::smooth, heads * n, kDim);
  const auto q = view(tokens.q, layout, n), k = view(tokens.k, layout, n), v = view(tokens.v, layout, n);
  const auto out = view(tokens.out, layout, n);
  const bool exact = name == "softmax";
  const double of_one = exact ? bench::attention_flops(n, n, kDim) : bench::landmark_flops(n, kLandmarks, kDim);
  const bench::Work work{.flops = static_cast<double>(heads) * of_one, .tokens = heads * n, .threads = workers};
  const auto method = attn::find_method<float>(name).make({.num_landmarks = kLandmarks});
  attn::Context context{attn::OpenMP{.threads = workers}};
  if (state.range(2) > 0) {
    bench::time_calls<float>(state, work, [&] { attn::multi_head(method, q, k, v, out, {}, context); });
  } else {
    bench::time_calls<float>(state, work, [&] {
      for (Index h = 0; h < heads; ++h) method.forward({.q = q(0, h), .k = k(0, h), .v = v(0, h)}, out(0, h), context);
    });
  }
  state.counters["bytes"] = static_cast<double>(context.scratch_bytes());
}

using Sizes = std::vector<std::vector<std::int64_t>>;  // of heads, of n, of workers

void add(const std::string& method, const Sizes& sizes) {
  for (const Layout layout : {Layout::head_major, Layout::token_major}) {
    const std::string name = method + (layout == Layout::head_major ? "/head_major" : "/token_major");
    benchmark::RegisterBenchmark(name.c_str(), heads, method, layout)
        ->ArgNames({"heads", "n", "workers"})
        ->ArgsProduct(sizes)
        ->Apply(bench::in_milliseconds);
  }
}

}  // namespace

int main(int argc, char** argv) {
  add("softmax", {{1000}, {16}, {0, 1, 2}});
  add("softmax", {{64}, {64}, {0, 1, 2}});
  add("softmax", {{1, 3, 8}, {512, 2048}, {0, 1, 2}});
  add("nystrom", {{8}, {1024, 4096, 16384, 65536}, {0, 1, 2}});
  add("skyformer", {{8}, {1024, 4096}, {0, 1, 2}});
  return bench::run_benchmarks(argc, argv);
}
