/// Runs one method on the photo and keeps what it made and how long that took.
#pragma once

#include <attn/approximator.hpp>

#include <algorithm>
#include <chrono>
#include <string>
#include <string_view>
#include <vector>

struct Result {
  std::string method;
  attn::Index num_landmarks = 0;  // 0: none
  double milliseconds = 0.0;
  attn::Matrix<float> rgb;
};

template <class A>
double milliseconds_of(const A& method, const attn::Inputs<float>& in, attn::MatrixRef<float> out,
                       attn::Context& context) {
  const auto start = std::chrono::steady_clock::now();
  method.forward(in, out, context);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

/// The method of that name on in, whose values are colours. The time is that of the first run where it is long: growing
/// the context, and the first touch of its pages, then weigh nothing. A short run is repeated and the median taken, so
/// that it is the time with a context that has grown before, as wherever a method is called more than once. Both rules
/// hold for every method alike.
template <class A>
Result measure(const A& method, std::string_view name, attn::Index num_landmarks, const attn::Inputs<float>& in,
               attn::Context& context) {
  constexpr double kShort = 1000.0;  // milliseconds
  constexpr int kRuns = 5;
  Result result{
      .method = std::string(name), .num_landmarks = num_landmarks, .rgb = attn::Matrix<float>(in.q.rows(), 3)};
  std::vector<double> times{milliseconds_of(method, in, result.rgb, context)};
  while (times[0] < kShort && times.size() < kRuns) times.push_back(milliseconds_of(method, in, result.rgb, context));
  std::ranges::sort(times);
  result.milliseconds = times[times.size() / 2];
  return result;
}
