#include "accuracy/heads.hpp"
#include "accuracy/methods.hpp"
#include "accuracy/study.hpp"
#include "accuracy/tokens.hpp"
#include "common/samples.hpp"

#include <attn/automatic.hpp>
#include <attn/error_estimate.hpp>
#include <attn/exact.hpp>
#include <attn/metrics.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

namespace accuracy {
namespace {

using attn::GaussianKernel;
using attn::Inputs;
using attn::SoftmaxKernel;

/// Tokens with a name: heads of trained models, those that see all keys first, and the families.
std::vector<Head> all_tokens(const Settings& settings) {
  const Index n = settings.quick ? 700 : 2048;
  std::vector<Head> all = read_heads(settings.tensors, settings.quick ? 512 : std::numeric_limits<Index>::max());
  std::ranges::stable_partition(all, [](const Head& head) { return !head.causal; });
  for (const std::string_view family : kFamilies) {
    all.push_back({std::string(family), false, make_tokens<float>(family, n, 0)});
  }
  return all;
}

/// Results of approximations: by methods of several sizes; of a causal head, which these do not take, by windows with
/// sinks.
std::vector<Matrix<float>> approximations(const Head& head, attn::Context& context) {
  const Inputs<float> in = head.inputs();
  std::vector<Matrix<float>> all;
  const auto add = [&](const auto& method, const Inputs<float>& of) {
    method.forward(of, all.emplace_back(in.q.rows(), in.v.cols()), context);
  };
  for (const Index part : {4, 8, 16}) {
    if (!head.causal) break;
    Inputs<float> narrow = in;
    narrow.mask.window = in.k.rows() / part;
    narrow.mask.num_sinks = 4;
    add(attn::SoftmaxAttention<float>{}, narrow);
  }
  if (head.causal) return all;
  for (const Index near : {4, 16, 64}) add(make_method("multipole", near, 0), in);
  for (const std::string_view name : {"nystrom", "lifted-softmax"}) {
    const auto method = make_method(name, 64, 0);
    if (method.supports(in)) add(method, in);
  }
  return all;
}

/// Adds what estimates of a result are worth, over seeds: for each size of the sample the share within a fifth of the
/// true error, and the share whose interval holds it.
void add_estimates(std::vector<Row>& rows, const Inputs<float>& in, const Matrix<float>& out, double error, int seeds,
                   attn::Context& context) {
  for (Row& row : rows) {
    double close = 0, inside = 0;
    for (int seed = 0; seed < seeds; ++seed) {
      const attn::ErrorSample sample{std::get<Index>(row.labels[0].second), static_cast<std::uint64_t>(seed)};
      const attn::ErrorEstimate estimate = attn::estimate_error(SoftmaxKernel{}, in, out, sample, context);
      close += std::abs(estimate.error / error - 1) <= 0.2 ? 1.0 / seeds : 0;
      inside += estimate.lower <= error && error <= estimate.upper ? 1.0 / seeds : 0;
    }
    row.add("within 20 %", close);
    row.add("in the interval", inside);
    row.add("nine of ten are", close >= 0.9 ? 1 : 0);
  }
}

/// Means over all results in the place of one sample for each.
void take_means(std::vector<Row>& rows) {
  for (Row& row : rows) {
    for (Figure& figure : row.figures) {
      double sum = 0;
      for (const double x : figure.samples) sum += x;
      figure.samples = {sum / static_cast<double>(figure.samples.size())};
    }
  }
}

Table study_estimates(const Settings& settings) {
  constexpr double kLeast = 1e-5;  // exact attention by another name
  Table table{"estimates", "Estimates of errors from so many rows: means over results, 100 draws each"};
  for (const Index rows : {32, 64, 128, 256}) table.rows.push_back({{{"rows", rows}}});
  attn::Context context;
  for (const Head& head : all_tokens(settings)) {
    const Inputs<float> in = head.inputs();
    Matrix<float> exact(in.q.rows(), in.v.cols());
    attn::SoftmaxAttention<float>{}.forward(in, exact, context);
    for (const Matrix<float>& out : approximations(head, context)) {
      const double error = attn::relative_frobenius_error(out, exact);
      if (error > kLeast) add_estimates(table.rows, in, out, error, settings.quick ? 5 : 100, context);
    }
  }
  take_means(table.rows);
  return table;
}

/// A problem for the promise, drawn by its number.
struct Problem {
  Tokens<float> tokens;
  double max_error;

  explicit Problem(int number) {
    families::Random random(static_cast<std::uint64_t>(number));
    const auto family = static_cast<families::Family>(random.below(std::size(families::kFamilies)));
    const Index n = 2400 + random.below(2200), d = 16 + random.below(49);
    tokens = families::make_tokens<float>(family, {n + random.below(500) - 250, n, d, d},
                                          static_cast<std::uint64_t>(number));
    const double size = 0.5 + random.uniform();
    tokens.q *= static_cast<float>(size);
    tokens.k *= static_cast<float>(size);
    max_error = 0.01 * std::pow(30, random.uniform());
  }
};

/// How calls of Automatic kept to the error asked for.
struct Promise {
  double calls = 0, approximate = 0, exceeding = 0, by_half = 0, worst = 0;

  template <class Kernel>
  void call(const Tokens<float>& tokens, const attn::Automatic<float, Kernel>& method, attn::Context& context) {
    const Inputs<float> in{tokens.q, tokens.k, tokens.v};
    Matrix<float> out(in.q.rows(), in.v.cols()), exact = out;
    attn::Choice choice;
    method.forward(in, out, context, choice);
    ++calls;
    if (choice.plan.exact) return;
    ++approximate;
    attn::ExactAttention<float, Kernel>(method.kernel).forward(in, exact, context);
    const double over = attn::relative_frobenius_error(out, exact) / method.max_error;
    exceeding += over > 1 ? 1 : 0;
    by_half += over > 1.5 ? 1 : 0;
    worst = std::max(worst, over);
  }

  Row row(const std::string& tokens, const std::string& kernel) const {
    Row made{{{"tokens", tokens}, {"kernel", kernel}}};
    made.add("calls", calls);
    made.add("not exact", approximate / calls);
    made.add("exceeding", exceeding / calls);
    made.add("by half", by_half / calls);
    made.add("worst", worst);
    return made;
  }
};

/// How often the true error is more than was asked for.
Table study_promise(const Settings& settings) {
  constexpr attn::Rows kNormalized = attn::Rows::normalized;
  Table table{"promise", "Automatic: shares of its calls; worst: the largest error, over the one asked for"};
  std::array<Promise, 3> of;
  Promise of_heads;
  attn::Context context;
  for (int i = 0; i < (settings.quick ? 3 : settings.problems); ++i) {
    const Problem p(i);
    const auto seed = static_cast<std::uint64_t>(i);
    if (i % 3 == 0) of[0].call(p.tokens, attn::Automatic<float>{p.max_error, {}, {}, seed}, context);
    if (i % 3 == 1) of[1].call(p.tokens, attn::Automatic<float, GaussianKernel>{p.max_error, {}, {}, seed}, context);
    if (i % 3 == 2) {
      const GaussianKernel kernel{.rows = kNormalized};
      of[2].call(p.tokens, attn::Automatic<float, GaussianKernel>{p.max_error, kernel, {}, seed}, context);
    }
  }
  for (const Head& head : read_heads(settings.tensors, settings.quick ? 512 : std::numeric_limits<Index>::max())) {
    for (const double max_error : {0.01, 0.02, 0.03, 0.05, 0.1, 0.2}) {
      for (int seed = 0; seed < 3 * settings.seeds && !head.causal; ++seed) {
        of_heads.call(head.tokens, attn::Automatic<float>{max_error, {}, {}, static_cast<std::uint64_t>(seed)},
                      context);
      }
    }
  }
  table.rows = {of[0].row("random", "softmax"), of[1].row("random", "gaussian"),
                of[2].row("random", "gaussian, normalized"), of_heads.row("heads", "softmax")};
  return table;
}

/// The least time of a fixed setting that meets an error: exact attention, or multipole attention of twice as many
/// open branches and near clusters from one to the next, and one between.
class FixedSettings {
 public:
  FixedSettings(const Inputs<float>& in, const Matrix<float>& exact, double exact_ms, int calls,
                attn::Context& context) {
    const auto n = static_cast<double>(in.k.rows());
    Matrix<float> out = exact;
    for (double level = -2; level <= 3; level += 0.5) {
      const auto times = [&](double usual) { return static_cast<Index>(std::lround(std::exp2(level) * usual)); };
      const attn::Multipole<float> method(
          attn::Clusters{.num_near = times(24 + 20000 / n), .num_open = times(24 + 25000 / n)});
      const double ms = 1e3 * bench::least_seconds(calls, [&] { method.forward(in, out, context); });
      if (ms > exact_ms) break;
      found_.emplace_back(attn::relative_frobenius_error(out, exact), ms);
    }
    found_.emplace_back(0, exact_ms);
  }

  double best_ms(double max_error) const {
    double best = std::numeric_limits<double>::infinity();
    for (const auto& [error, ms] : found_) best = error <= max_error ? std::min(best, ms) : best;
    return best;
  }

 private:
  std::vector<std::pair<double, double>> found_;
};

/// Adds the time of Automatic, and with the plan that it has found, over those of exact attention and of the best fixed
/// setting.
void add_times(Row& row, const Inputs<float>& in, double max_error, double exact_ms, double best_ms, int calls,
               Matrix<float>& out, attn::Context& context) {
  attn::Automatic<float> method{.max_error = max_error};
  attn::Choice choice;
  const auto ms = [&] { return 1e3 * bench::least_seconds(calls, [&] { method.forward(in, out, context, choice); }); };
  const double searched = ms();
  method.hint = choice.plan;
  const double followed = ms();
  row.add("over exact", searched / exact_ms);
  row.add("over best", searched / best_ms);
  row.add("hint over best", followed / best_ms);
  row.add("best over exact", best_ms / exact_ms);
}

Table study_times(const Settings& settings) {
  Table table{"automatic_times",
              "Automatic's time on one core, over those of exact attention and of the best fixed setting"};
  const int calls = settings.quick ? 1 : 3;
  attn::Context context;
  std::vector<Head> all = read_heads(settings.tensors, settings.quick ? 512 : std::numeric_limits<Index>::max());
  for (const std::string_view family : kFamilies) {
    all.push_back({std::string(family), false, make_tokens<float>(family, settings.quick ? 700 : 4096, 0)});
  }
  Row over_all{{{"tokens", "all"}, {"n", Index{0}}, {"max_error", 0.0}}};
  for (const Head& head : all) {
    if (head.causal) continue;
    const Inputs<float> in = head.inputs();
    Matrix<float> exact(in.q.rows(), in.v.cols()), out = exact;
    const double exact_ms =
        1e3 * bench::least_seconds(calls, [&] { attn::SoftmaxAttention<float>{}.forward(in, exact, context); });
    const FixedSettings fixed(in, exact, exact_ms, calls, context);
    for (const double max_error : {0.01, 0.03, 0.1}) {
      Row& row = table.rows.emplace_back(Row{{{"tokens", head.name}, {"n", in.k.rows()}, {"max_error", max_error}}});
      add_times(row, in, max_error, exact_ms, fixed.best_ms(max_error), calls, out, context);
      for (const Figure& figure : row.figures) over_all.add(figure.name, figure.samples[0]);
    }
  }
  table.rows.push_back(std::move(over_all));
  return table;
}

}  // namespace

std::vector<Table> study_automatic(const Settings& settings) {
  return {study_estimates(settings), study_promise(settings), study_times(settings)};
}

}  // namespace accuracy
