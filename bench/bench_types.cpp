/// What do double and the narrow types cost beside float, bfloat16 also without the units for its products?
#include "common/flops.hpp"
#include "common/report.hpp"
#include "common/samples.hpp"

#include <benchmark/benchmark.h>

#include <string>

namespace {

using attn::Index;

constexpr Index kDim = 64, kLandmarks = 64;

/// One more counter, over_float: how many times the time of float on the same tokens, the two called in turn.
template <class T>
void of_type(benchmark::State& state, const std::string& name, attn::Products products) {
  const Index n = state.range(0);
  const bool exact = name == "softmax";
  const double flops = exact ? bench::attention_flops(n, n, kDim) : bench::landmark_flops(n, kLandmarks, kDim);
  const auto family = bench::Family::smooth;
  auto& tokens = bench::kept_tokens<T>(family, n, kDim);
  auto& float_tokens = bench::kept_tokens<float>(family, n, kDim);
  const attn::MethodOptions options{.num_landmarks = kLandmarks, .products = products};
  const auto method = attn::find_method<T>(name).make(options);
  const auto float_method = attn::find_method<float>(name).make(options);
  attn::Context context;
  bench::time_forward(state, method, tokens, flops, context);

  const auto call = [&] { method.forward(tokens.inputs(), tokens.out, context); };
  const auto float_call = [&] { float_method.forward(float_tokens.inputs(), float_tokens.out, context); };
  const int calls = bench::calls_for(0.002, float_call);
  std::vector<double> ratios;
  for (int round = 0; round < 15; ++round) {
    ratios.push_back(bench::seconds_of(calls, call) / bench::seconds_of(calls, float_call));
  }
  state.counters["over_float"] = bench::spread(ratios).median;
}

template <class T>
void add(const std::string& name, const std::string& type, attn::Products products = attn::Products::fastest) {
  benchmark::RegisterBenchmark((name + "/" + type).c_str(), of_type<T>, name, products)
      ->ArgName("n")
      ->RangeMultiplier(2)
      ->Range(512, 4096)
      ->Apply(bench::in_milliseconds);
}

}  // namespace

int main(int argc, char** argv) {
  for (const std::string name : {"softmax", "nystrom"}) {
    add<float>(name, "float");
    add<double>(name, "double");
    add<Eigen::half>(name, "half");
    add<Eigen::bfloat16>(name, "bfloat16");
  }
  add<Eigen::bfloat16>("softmax", "bfloat16_by_float", attn::Products::float32);
  return bench::run_benchmarks(argc, argv);
}
