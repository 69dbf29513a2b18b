/// Methods on shapes, strides, masks and options that the fuzzer chooses: results are the oracle's, and padding stays
/// as it was.
#include "common/random_problem.hpp"
#include "source.hpp"

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <string>

namespace {

template <class T>
void compare(fuzz::Source& source, const std::string& name) {
  constexpr attn::Index kLongest = 140;
  const bool exact = name == "softmax" || name == "gaussian";
  test::RandomProblem<T> problem(source, kLongest, source.below(2) == 0, exact);
  const attn::MethodOptions options{.num_landmarks = 1 + source.below(24),
                                    .gamma = source.below(2) == 0 ? 0.1 : 0.01,
                                    .seed = static_cast<std::uint64_t>(source.below(1000)),
                                    .rows = source.below(2) == 0 ? attn::Rows::raw : attn::Rows::normalized};
  attn::Context context;
  const attn::Inputs<T> in = problem.inputs();
  attn::find_method<T>(name).make(options).forward(in, problem.out(), context);
  const reference::Matrix out = problem.out().template cast<double>();
  const double ratio = test::error_ratio<T>(out, test::expected(name, options, in));
  if (ratio <= 1 && problem.padding_untouched()) return;
  std::cerr << name << ": " << problem.text() << ", landmarks " << *options.num_landmarks << ": " << ratio
            << " times the error allowed\n";
  std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr const char* kNames[] = {"softmax", "gaussian", "nystrom", "skyformer", "lifted-softmax"};
  fuzz::Source source(data, size);
  const std::string name = kNames[source.below(std::size(kNames))];
  if (source.below(2) == 0) {
    compare<float>(source, name);
  } else {
    compare<double>(source, name);
  }
  return 0;
}
