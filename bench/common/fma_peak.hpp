/// The machine's limit: multiply-adds on registers alone. Shares no code with the library it judges.
#pragma once

#include <omp.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <utility>

namespace bench {

/// The widest vectors that the compile flags allow, and how many sums they keep in flight: enough to cover the latency
/// of two to four multiply-adds a cycle, few enough to leave registers for the factors.
#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64, kChains = 16;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32, kChains = 12;
#elif defined(__aarch64__)
inline constexpr int kVectorBytes = 16, kChains = 16;
#else
inline constexpr int kVectorBytes = 16, kChains = 12;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;

/// Makes x a value that the compiler knows nothing of, in its register: emits no instruction.
template <class T>
inline void make_opaque(Vector<T>& x) {
#if defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+v"(x));
#endif
}

/// Pretends to read x, so that it must be computed.
template <class T>
inline void consume(const Vector<T>& x) {
#if defined(__aarch64__)
  asm volatile("" : : "w"(x));
#else
  asm volatile("" : : "v"(x));
#endif
}

template <class T>
inline constexpr double kFlopsPerRound = (2.0 * kChains) * kVectorBytes / sizeof(T);

/// rounds times: sums[i] += a b for each of the kChains sums. a is opaque at every step, or a b would be computed only
/// once. With FMA one instruction a step, without one multiplication and one addition.
template <class T, std::size_t... i>
[[gnu::noinline]] void multiply_add_rounds(std::int64_t rounds, std::index_sequence<i...>) {
  Vector<T> a = Vector<T>{} + T(0.5), b = Vector<T>{} + T(0.25);
  Vector<T> sums[] = {(static_cast<void>(i), Vector<T>{})...};
  make_opaque<T>(b);
  for (std::int64_t round = 0; round < rounds; ++round) ((make_opaque<T>(a), sums[i] += a * b), ...);
  (consume<T>(sums[i]), ...);
}

/// Flops a second of the calling thread, which works until the given time is up.
template <class T>
double fma_rate(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr std::int64_t kRounds = 1 << 13;
  std::int64_t rounds = 0;
  std::chrono::duration<double> elapsed{};
  for (const auto start = Clock::now(); elapsed.count() < seconds; elapsed = Clock::now() - start) {
    multiply_add_rounds<T>(kRounds, std::make_index_sequence<kChains>{});
    rounds += kRounds;
  }
  return static_cast<double>(rounds) * kFlopsPerRound<T> / elapsed.count();
}

/// Flops a second of multiply-adds on registers, by this many OpenMP threads together, measured for about the given
/// time. No thread waits for another, so the second core counts with all that it gives.
template <class T>
double fma_peak(double seconds, int threads = 1) {
  if (threads == 1) return fma_rate<T>(seconds);
  double flops_per_second = 0;
#pragma omp parallel num_threads(threads) reduction(+ : flops_per_second)
  {
#pragma omp barrier
    flops_per_second += fma_rate<T>(seconds);
  }
  return flops_per_second;
}

}  // namespace bench
