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

/// The least wall time of some calls in seconds, after one that does not count.
inline double least_seconds(int calls, const std::function<void()>& call) {
  seconds_of(1, call);
  double least = seconds_of(1, call);
  for (int i = 1; i < calls; ++i) least = std::min(least, seconds_of(1, call));
  return least;
}

/// The sample below which this fraction of at least one lies, interpolated between the two nearest.
inline double quantile(std::vector<double> samples, double fraction) {
  std::sort(samples.begin(), samples.end());
  const double position = fraction * static_cast<double>(samples.size() - 1);
  const auto below = static_cast<std::size_t>(position), above = std::min(below + 1, samples.size() - 1);
  return std::lerp(samples[below], samples[above], position - std::floor(position));
}

/// Quantiles of at least one sample.
struct Spread {
  double minimum, first_quartile, median, third_quartile, maximum;
};

inline Spread spread(const std::vector<double>& samples) {
  const auto at = [&](double fraction) { return quantile(samples, fraction); };
  return {at(0), at(0.25), at(0.5), at(0.75), at(1)};
}

}  // namespace bench
