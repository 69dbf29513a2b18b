/// How fast is exact attention on one core, against the FMA peak and against Eigen's products?
#include <attn/exact.hpp>

#include "common/eigen_blocks.hpp"
#include "common/flops.hpp"
#include "common/report.hpp"

#include <benchmark/benchmark.h>

#include <string>

namespace {

using attn::Causal;

template <class Method>
void exact(benchmark::State& state, Causal causal) {
  const auto n = state.range(0), d = state.range(1);
  auto tokens = bench::normal_tokens<typename Method::Scalar>(n, d);
  attn::Context context;
  bench::time_forward(state, Method{}, tokens, bench::attention_flops(n, n, d, causal), context, causal);
}

template <class Method>
void add(const std::string& scalar) {
  for (const Causal causal : {Causal::none, Causal::upper_left}) {
    const std::string name = std::string(Method::kName) + "/" + scalar + (causal == Causal::none ? "" : "/causal");
    benchmark::RegisterBenchmark(name.c_str(), exact<Method>, causal)
        ->ArgNames({"n", "d"})
        ->ArgsProduct({{512, 1024, 2048, 4096, 8192}, {32, 64, 128}})
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
}

}  // namespace

int main(int argc, char** argv) {
  Eigen::setNbThreads(1);
  add<attn::SoftmaxAttention<float>>("float");
  add<attn::SoftmaxAttention<double>>("double");
  add<attn::GaussianAttention<float>>("float");
  add<attn::GaussianAttention<double>>("double");
  add<bench::EigenBlocks<float>>("float");
  return bench::run_benchmarks(argc, argv);
}
