/// Timing by hand: samples of a set length, and what to say of many of them.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <functional>
#include <vector>

namespace bench {

/// Wall time of this many calls, in seconds.
inline double seconds_of(int calls, const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

/// How many calls make a sample of at least this length. Calls twice, the first time to warm up.
inline int calls_for(double seconds, const std::function<void()>& call) {
  seconds_of(1, call);
  return static_cast<int>(std::clamp(std::ceil(seconds / seconds_of(1, call)), 1.0, 1e6));
}

/// Order statistics of at least one sample, interpolated between the two nearest.
struct Spread {
  double minimum, first_quartile, median, third_quartile, maximum;
};

inline Spread spread(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const auto quantile = [&](double fraction) {
    const double position = fraction * static_cast<double>(samples.size() - 1);
    const auto below = static_cast<std::size_t>(position), above = std::min(below + 1, samples.size() - 1);
    return std::lerp(samples[below], samples[above], position - std::floor(position));
  };
  return {quantile(0), quantile(0.25), quantile(0.5), quantile(0.75), quantile(1)};
}

}  // namespace bench
