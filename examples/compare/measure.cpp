#include "compare/measure.hpp"

#include "common/make_context.hpp"
#include "common/progress_bar.hpp"
#include "compare/mean_of_values.hpp"
#include "compare/spectral.hpp"

#include <attn/metrics.hpp>

#include <algorithm>
#include <chrono>
#include <map>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace {

using attn::Index;
using Outputs = std::vector<attn::Matrix<float>>;  // one a head

double milliseconds_of(const attn::AnyApproximator<float>& method, const Sequences& s, Outputs& out,
                       attn::Context& context) {
  const auto start = std::chrono::steady_clock::now();
  for (Index head = 0; head < s.num_heads(); ++head)
    method.forward(s.inputs(head), out[static_cast<std::size_t>(head)], context);
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

/// The median of some runs; no more of them once they have taken kEnough together. The first run also grows the context
/// and touches its pages, which weighs nothing in a median and little in a long run.
double median_milliseconds(const attn::AnyApproximator<float>& method, const Sequences& s, int repetitions,
                           Outputs& out, attn::Context& context) {
  constexpr double kEnough = 2000.0;
  std::vector<double> times;
  for (double total = 0; static_cast<int>(times.size()) < repetitions && total < kEnough; total += times.back()) {
    times.push_back(milliseconds_of(method, s, out, context));
  }
  std::ranges::sort(times);
  return times[times.size() / 2];
}

void add_errors(Row& row, const Outputs& out, const Outputs& target, const Outputs& softmax) {
  row.error = row.softmax_error = row.worst_head = row.worst_row = 0;
  const auto heads = static_cast<double>(out.size());
  const auto largest = [](double a, double b) { return a >= b ? a : b; };  // NaN if b is
  for (std::size_t head = 0; head < out.size(); ++head) {
    const double error = attn::relative_frobenius_error(out[head], target[head]);
    row.error += error / heads;
    row.worst_head = largest(row.worst_head, error);
    row.worst_row = largest(row.worst_row, attn::worst_row_error(out[head], target[head]));
    row.softmax_error += attn::relative_frobenius_error(out[head], softmax[head]) / heads;
  }
}

/// Why a method refuses these tokens; none where it takes them.
std::optional<std::string> refusal(const attn::AnyApproximator<float>& method, const Sequences& s) {
  for (Index head = 0; head < s.num_heads(); ++head) {
    const attn::Inputs<float> in = s.inputs(head);
    if (method.supports(in)) continue;
    attn::Context context;
    attn::Matrix<float> out(s.n_q, s.d_v);
    try {
      method.forward(in, out, context);
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
  }
  return std::nullopt;
}

/// Names of approximations of a target, or of all of them where none was chosen, in the library's order.
std::vector<std::string_view> chosen(const Options& options, Target target) {
  std::vector<std::string_view> names;
  for (const auto& method : attn::methods<float>()) {
    const MethodFacts& facts = facts_of(method.name);
    const bool wanted =
        options.methods.empty() || std::ranges::find(options.methods, method.name) != options.methods.end();
    if (wanted && facts.target == target && !facts.exact) names.push_back(facts.name);
  }
  return names;
}

/// The sizes to try of a method.
const std::vector<Index>& sizes(const Options& options, std::string_view method) {
  return has_clusters(method) ? options.near : options.landmarks;
}

class Comparer {
 public:
  Comparer(const Options& options, const Sequences& sequences) : options_(options), s_(sequences) {
    const auto softmax = chosen(options, Target::softmax), gaussian = chosen(options, Target::gaussian);
    const bool named = std::ranges::find(options.methods, target_name(Target::gaussian)) != options.methods.end();
    uses_gaussian_ = options.methods.empty() || named || !gaussian.empty() || options.target == Target::gaussian;
    const Index targets = uses_gaussian_ ? 2 : 1;
    steps_ = targets;
    for (const auto* names : {&softmax, &gaussian}) {
      for (const std::string_view name : *names) steps_ += static_cast<Index>(sizes(options, name).size());
    }
    spectral_.emplace(options, sequences, steps_ + targets);  // mean(v) too
  }

  Comparison run() {
    compare_target(Target::softmax);
    if (uses_gaussian_) compare_target(Target::gaussian);
    return std::move(result_);
  }

 private:
  Outputs outputs() const {
    return Outputs(static_cast<std::size_t>(s_.num_heads()), attn::Matrix<float>(s_.n_q, s_.d_v));
  }

  void compare_target(Target target) {
    const MethodFacts& exact = exact_method(target);
    exact_.emplace(target, outputs());
    result_.rows.push_back(measure(exact, 0, exact_.at(target)));
    add_mean(target);
    for (const std::string_view name : chosen(options_, target)) {
      const MethodFacts& method = facts_of(name);
      if (const auto reason = refusal(make_method(method, sizes(options_, name).front(), options_.seed), s_)) {
        result_.not_supported.push_back({std::string(name), *reason});
        step_ += static_cast<Index>(sizes(options_, name).size());
        continue;
      }
      for (const Index size : sizes(options_, name)) {
        Outputs out = outputs();
        result_.rows.push_back(measure(method, size, out));
      }
    }
  }

  Row measure(const MethodFacts& method, Index size, Outputs& out) {
    const ProgressBar bar(std::string(method.name) + with_size(method.name, size));
    bar.show(step_++, steps_);
    attn::Context context = make_context(options_.threads);
    const auto made = make_method(method, size, options_.seed);
    Row row{.method = std::string(method.name), .target = method.target, .exact = method.exact, .size = size};
    row.milliseconds = median_milliseconds(made, s_, options_.repetitions, out, context);
    if (method.exact) {
      exact_ms_ = row.milliseconds;
      spectral_->set_target(method.target, exact_ms_);
    }
    row.speed_up = exact_ms_ / row.milliseconds;
    row.scratch_bytes = context.scratch_bytes();
    add_errors(row, out, exact_.at(method.target), exact_.at(Target::softmax));
    row.spectral = spectral_->of(method, size, row.milliseconds);
    return row;
  }

  void add_mean(Target target) {
    Outputs out;
    for (Index head = 0; head < s_.num_heads(); ++head) out.push_back(mean_of_values(s_.inputs(head)));
    Row row{.method = std::string(kMeanOfValues), .target = target};
    add_errors(row, out, exact_.at(target), exact_.at(Target::softmax));
    row.spectral = spectral_->of_mean();
    result_.rows.push_back(std::move(row));
  }

  const Options& options_;
  const Sequences& s_;
  bool uses_gaussian_ = false;
  Index step_ = 0, steps_ = 0;
  std::map<Target, Outputs> exact_;
  double exact_ms_ = 0;
  std::optional<SpectralErrors> spectral_;
  Comparison result_;
};

}  // namespace

Comparison compare(const Options& options, const Sequences& sequences) {
  return Comparer(options, sequences).run();
}
