#include "compare/spectral.hpp"

#include "common/make_context.hpp"
#include "compare/mean_of_values.hpp"

#include <attn/metrics.hpp>

#include <algorithm>
#include <chrono>
#include <limits>

namespace {

using attn::Index;

constexpr Index kOversampling = 8;

}  // namespace

SpectralErrors::SpectralErrors(const Options& options, const Sequences& sequences, Index rows)
    : options_(options),
      s_(sequences),
      rows_left_(rows),
      seconds_left_(options.spectral_seconds),
      context_(make_context(options.threads)) {}

void SpectralErrors::set_target(Target target, double exact_ms) {
  exact_ms_ = exact_ms;
  exact_.clear();
  norms_.clear();
  const int steps = affordable_steps(0);
  if (steps < kFewest) return;
  for (Index head = 0; head < s_.num_heads(); ++head) {
    exact_.push_back(matrix_of(exact_method(target), 0, options_.seed, s_.inputs(head), context_));
    norms_.push_back(norm(exact_.back(), steps));
  }
  --rows_left_;
}

double SpectralErrors::of(const MethodFacts& method, Index size, double milliseconds) {
  if (method.exact && !exact_.empty()) return 0;
  return largest(milliseconds,
                 [&](Index head) { return matrix_of(method, size, options_.seed, s_.inputs(head), context_); });
}

double SpectralErrors::of_mean() {
  return largest(0, [&](Index head) { return AnyOperator(MeanOperator(s_.inputs(head))); });
}

template <class MatrixOfHead>
double SpectralErrors::largest(double milliseconds, const MatrixOfHead& matrix_of_head) {
  const int steps = affordable_steps(milliseconds);
  --rows_left_;
  if (steps < kFewest || exact_.empty()) return std::numeric_limits<double>::quiet_NaN();
  double error = 0;
  for (Index head = 0; head < s_.num_heads(); ++head) {
    const auto at = static_cast<std::size_t>(head);
    const AnyOperator difference(attn::Difference(matrix_of_head(head), exact_[at]));
    const double of_head = norm(difference, steps) / norms_[at];
    error = error >= of_head ? error : of_head;  // NaN if of_head is
  }
  return error;
}

/// How many steps a row can take, of a method that takes so long: at most twice an equal share of the time that is
/// left, for few rows need theirs. A step has two products with the exact matrix, of fewer columns than v may have, and
/// about five times the method's work, its backward pass included. None where a mask is causal, which no operator of
/// exact attention takes.
int SpectralErrors::affordable_steps(double milliseconds) const {
  constexpr double kMostSteps = 30;
  if (s_.causal != attn::Causal::none) return 0;
  const auto columns = [&](Index of_values) { return static_cast<double>(s_.d + of_values); };
  const double step = 2 * exact_ms_ * columns(1 + kOversampling) / columns(s_.d_v) + 5 * milliseconds;
  const double share = 1e3 * seconds_left_ * std::min(1.0, 2.0 / static_cast<double>(rows_left_));
  return static_cast<int>(std::min(kMostSteps, share / step));
}

double SpectralErrors::norm(const AnyOperator& a, int steps) {
  const attn::SubspaceIteration iteration{
      .tolerance = 2e-3, .max_iterations = steps, .oversampling = kOversampling, .seed = 0};
  const auto start = std::chrono::steady_clock::now();
  const double found = attn::spectral_norm(a, iteration, context_);
  seconds_left_ -= std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return found;
}
