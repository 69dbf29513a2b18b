#include "compare/measure.hpp"

#include "common/make_context.hpp"
#include "common/progress_bar.hpp"
#include "compare/mean_of_values.hpp"
#include "compare/spectral.hpp"

#include <attn/metrics.hpp>
#include <attn/multi_head.hpp>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <optional>
#include <stdexcept>
#include <string_view>
#include <utility>
#include <vector>

namespace {

using attn::Index;

/// Results of all heads, one after another (heads n_q, d_v).
struct Outputs {
  explicit Outputs(const Sequences& s) : length(s.n_q), rows(s.num_heads() * s.n_q, s.d_v) {}

  auto head(Index i) const { return rows.middleRows(i * length, length); }
  auto head(Index i) { return rows.middleRows(i * length, length); }

  Index length;
  attn::Matrix<float> rows;
};

/// Runs the method on all heads. Exact methods run as their own type, which knows heads that share their keys.
void run_heads(const MethodFacts& method, const attn::AnyApproximator<float>& made, const Sequences& s,
               const std::vector<attn::Mask>& masks, Outputs& out, attn::Context& context) {
  const auto to = attn::head_major(out.rows.data(), s.batch, s.heads, s.n_q, s.d_v);
  const auto run = [&](const auto& a) { attn::multi_head(a, s.all_q(), s.all_k(), s.all_v(), to, masks, context); };
  if (!method.exact) return run(made);
  if (method.target == Target::softmax) return run(attn::SoftmaxAttention<float>{});
  run(attn::GaussianAttention<float>{});
}

/// The median of some times, and the slowest over the fastest.
struct Timing {
  double milliseconds, spread;
};

/// Times calls after one that grows the context, touches its pages and wakes its threads: so many of them, more where
/// they are over at once, and none but the first where that took long. A busy machine interrupts some calls and not
/// others, which a median of several bears.
template <class Call>
Timing timing_of(int repetitions, const Call& call) {
  constexpr double kEnough = 2000, kLeast = 50;
  constexpr std::size_t kMost = 100;
  const auto milliseconds = [&] {
    const auto start = std::chrono::steady_clock::now();
    call();
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  };
  const double first = milliseconds();
  if (first > kEnough) return {first, 1};
  std::vector<double> times;
  const auto at_least = static_cast<std::size_t>(repetitions);
  for (double total = 0; total < kEnough && (times.size() < at_least || (total < kLeast && times.size() < kMost));) {
    times.push_back(milliseconds());
    total += times.back();
  }
  std::ranges::sort(times);
  return {times[times.size() / 2], times.back() / times.front()};
}

/// The row of a result that is furthest from the target's.
Index worst_row_of(const auto& out, const auto& target) {
  Index worst = 0;
  (out - target).rowwise().squaredNorm().maxCoeff(&worst);
  return worst;
}

void add_errors(Row& row, const Outputs& out, const Outputs& target, const Outputs& softmax) {
  row.error = row.softmax_error = row.worst_head = 0;
  row.worst_row = -1;
  const Index heads = out.rows.rows() / out.length;
  const auto largest = [](double a, double b) { return a >= b ? a : b; };  // NaN if b is
  for (Index head = 0; head < heads; ++head) {
    const double error = attn::relative_frobenius_error(out.head(head), target.head(head));
    row.error += error / static_cast<double>(heads);
    row.worst_head = largest(row.worst_head, error);
    row.softmax_error +=
        attn::relative_frobenius_error(out.head(head), softmax.head(head)) / static_cast<double>(heads);
    const double worst = attn::worst_row_error(out.head(head), target.head(head));
    if (std::isnan(row.worst_row) || row.worst_row >= worst) continue;
    row.worst_row = worst;
    row.head_of_worst_row = head;
    row.token_of_worst_row = worst_row_of(out.head(head), target.head(head));
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
    const bool sized = !facts.sized_by.empty();
    if (wanted && sized && facts.target == target) names.push_back(facts.name);
  }
  return names;
}

/// The sizes to try of a method.
const std::vector<Index>& sizes(const Options& options, std::string_view method) {
  return has_clusters(method) ? options.near : options.landmarks;
}

class Comparer {
 public:
  Comparer(const Options& options, const Sequences& sequences)
      : options_(options), s_(sequences), masks_(sequences.masks()) {
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
  void compare_target(Target target) {
    const MethodFacts& exact = exact_method(target);
    exact_.emplace(target, Outputs(s_));
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
        Outputs out(s_);
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
    const Timing timing = timing_of(options_.repetitions, [&] { run_heads(method, made, s_, masks_, out, context); });
    row.milliseconds = timing.milliseconds;
    row.spread = timing.spread;
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
    Outputs out(s_);
    for (Index head = 0; head < s_.num_heads(); ++head) out.head(head) = mean_of_values(s_.inputs(head));
    Row row{.method = std::string(kMeanOfValues), .target = target};
    add_errors(row, out, exact_.at(target), exact_.at(Target::softmax));
    row.spectral = spectral_->of_mean();
    result_.rows.push_back(std::move(row));
  }

  const Options& options_;
  const Sequences& s_;
  std::vector<attn::Mask> masks_;
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
