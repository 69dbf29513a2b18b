#include "compare/automatic.hpp"

#include "common/make_context.hpp"
#include "common/number.hpp"
#include "common/table.hpp"
#include "compare/methods.hpp"

#include <attn/exact.hpp>
#include <attn/metrics.hpp>

#include <algorithm>
#include <chrono>
#include <functional>
#include <numeric>
#include <string_view>

namespace {

using attn::Index;

/// The least of three runs, after one that does not count.
double least_milliseconds(const std::function<void()>& call) {
  double least = 0;
  for (int i = 0; i < 4; ++i) {
    const auto start = std::chrono::steady_clock::now();
    call();
    const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    least = i < 2 ? ms : std::min(least, ms);
  }
  return least;
}

AutomaticHeads run_each_head(double max_error, const Options& options, const Sequences& s) {
  AutomaticHeads run{max_error, {}};
  attn::Context context = make_context(options.threads);
  attn::Matrix<float> out(s.n_q, s.d_v), exact(s.n_q, s.d_v);
  for (Index head = 0; head < s.num_heads(); ++head) {
    const attn::Inputs<float> in = s.inputs(head);
    HeadChoice of{};
    of.exact_milliseconds = least_milliseconds([&] { attn::SoftmaxAttention<float>{}.forward(in, exact, context); });
    const attn::Automatic<float> method{.max_error = max_error};
    of.milliseconds = least_milliseconds([&] { method.forward(in, out, context, of.choice); });
    of.error = attn::relative_frobenius_error(out, exact);
    run.heads.push_back(of);
  }
  return run;
}

double sum_of(const std::vector<HeadChoice>& heads, double HeadChoice::*figure) {
  return std::transform_reduce(heads.begin(), heads.end(), 0.0, std::plus<>(),
                               [&](const HeadChoice& head) { return head.*figure; });
}

std::string line_of_automatic(double max_error, const Sequences& s) {
  const MaskUse mask{.causal = s.causal, .keep_key = !s.keep.empty(), .keep_query = s.masks_queries()};
  std::string line = line_of_cpp(facts_of(attn::Automatic<float>::kName), 0, 0, mask);
  constexpr std::string_view kNone = "{}";
  return line.replace(line.find(kNone), kNone.size(), "{.max_error = " + number("%g", max_error) + "}");
}

}  // namespace

double AutomaticHeads::milliseconds() const {
  return sum_of(heads, &HeadChoice::milliseconds);
}
double AutomaticHeads::exact_milliseconds() const {
  return sum_of(heads, &HeadChoice::exact_milliseconds);
}

AutomaticHeads run_automatic(const Options& options, const Sequences& s) {
  constexpr double kErrors[] = {0.01, 0.02, 0.05, 0.1, 0.2};
  if (options.max_error) return run_each_head(*options.max_error, options, s);
  AutomaticHeads run{};
  for (const double max_error : kErrors) {
    run = run_each_head(max_error, options, s);
    if (!options.budget_ms || run.milliseconds() <= *options.budget_ms) break;
  }
  return run;
}

std::string automatic_report(const AutomaticHeads& run, const Sequences& s) {
  std::vector<std::vector<std::string>> lines{
      {"head", "chosen", "near", "open", "estimate", "error", "ms", "speed-up"}};
  const auto count = [](const auto& option) { return option ? std::to_string(*option) : std::string(); };
  const auto add_times = [&](double ms, double exact_ms) {
    lines.back().push_back(number("%.3g", ms));
    lines.back().push_back(number("%.1f", exact_ms / ms));
  };
  for (std::size_t i = 0; i < run.heads.size(); ++i) {
    const auto& [choice, error, ms, exact_ms] = run.heads[i];
    lines.push_back({std::to_string(i), choice.plan.exact ? "exact" : "multipole", count(choice.plan.clusters.num_near),
                     count(choice.plan.clusters.num_open), number("%.4f", choice.estimate.error),
                     number("%.4f", error)});
    add_times(ms, exact_ms);
  }
  lines.push_back({"all", "", "", "", "", ""});
  add_times(run.milliseconds(), run.exact_milliseconds());
  return "By attn::Automatic, for an error of at most " + number("%g", run.max_error) + " of each head:\n\n" +
         table(lines) + "\n" + line_of_automatic(run.max_error, s) + "\n";
}
