/// An executor of one's own, thread_executor.hpp, shared by two contexts: results are those of one thread, to the bit.
#include <attn/attn.hpp>

#include "thread_executor.hpp"

#include <cstdlib>
#include <iostream>

int main() {
  constexpr attn::Index kTokens = 1024, kFeatures = 32;
  const attn::Matrix<float> q = attn::Matrix<float>::Random(kTokens, kFeatures),
                            k = attn::Matrix<float>::Random(kTokens, kFeatures);
  const attn::Matrix<float> v = attn::Matrix<float>::Random(kTokens, kFeatures);
  attn::Matrix<float> serial(kTokens, kFeatures), parallel(kTokens, kFeatures);

  const ThreadExecutor threads(3);
  attn::Context one, first{threads},
      second{threads};  // a context serves one calling thread, its executor's threads serve all
  const attn::SoftmaxAttention<float> softmax;
  const attn::Skyformer<float> skyformer;

  softmax.forward({.q = q, .k = k, .v = v}, serial, one);
  softmax.forward({.q = q, .k = k, .v = v}, parallel, first);
  const bool same_softmax = serial == parallel;
  skyformer.forward({.q = q, .k = k, .v = v}, serial, one);
  skyformer.forward({.q = q, .k = k, .v = v}, parallel, second);
  const bool same = same_softmax && serial == parallel;
  std::cout << first.workers() << " workers give " << (same ? "the same bits as one" : "other results than one")
            << '\n';
  return same ? EXIT_SUCCESS : EXIT_FAILURE;
}
