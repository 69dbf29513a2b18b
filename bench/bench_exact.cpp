/// How fast is exact attention on one core?
#include "common/flops.hpp"
#include "common/report.hpp"

#include <benchmark/benchmark.h>

#include <string>

namespace {

using bench::Causal;

template <class T>
void exact(benchmark::State& state, const std::string& name, Causal causal) {
  const auto n = state.range(0), d = state.range(1);
  attn::Context context;
  bench::time_forward(state, attn::make_approximator<T>(name), bench::kept_tokens<T>(bench::Family::unit, n, d),
                      bench::attention_flops(n, n, d, causal), context, causal);
}

template <class T>
void add(const std::string& method, const std::string& type) {
  for (const Causal causal : {Causal::none, Causal::upper_left}) {
    const std::string name = method + "/" + type + (causal == Causal::none ? "" : "/causal");
    benchmark::RegisterBenchmark(name.c_str(), exact<T>, method, causal)
        ->ArgNames({"n", "d"})
        ->ArgsProduct({{512, 1024, 2048, 4096, 8192}, {32, 64, 128}})
        ->Apply(bench::in_milliseconds);
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (const std::string method : {"softmax", "gaussian"}) {
    add<float>(method, "float");
    add<double>(method, "double");
  }
  return bench::run_benchmarks(argc, argv);
}
