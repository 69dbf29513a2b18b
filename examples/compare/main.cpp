/// Which approximation, of which size, at what cost: runs exact attention and every approximation on a
/// model's own queries, keys and values, and prints what each takes and how far off it is.
#include "common/make_context.hpp"
#include "common/run_program.hpp"
#include "compare/automatic.hpp"
#include "compare/measure.hpp"
#include "compare/options.hpp"
#include "compare/recommend.hpp"
#include "compare/report.hpp"
#include "compare/sequences.hpp"

#include <cstdio>
#include <fstream>
#include <optional>
#include <optional>
#include <stdexcept>
#include <string>

namespace {

/// A file to write to, opened before anything is measured; none where none is wanted.
std::optional<std::ofstream> open(const std::optional<std::string>& path) {
  if (!path) return std::nullopt;
  std::ofstream file(*path);
  if (!file) throw std::runtime_error(*path + ": cannot be written");
  return file;
}

void write(std::optional<std::ofstream>& file, const std::optional<std::string>& path, const std::string& text) {
  if (file && !(*file << text << std::flush)) throw std::runtime_error(*path + ": cannot be written");
}

/// By the limits given; without any, by an error that many models bear.
Recommendation recommendation(const Options& options, const Comparison& comparison, const Sequences& s) {
  constexpr double kUsualError = 0.1;
  Wish wish{options.target, options.budget_ms, options.max_error};
  const bool without_limits = !wish.budget_ms && !wish.max_error;
  if (without_limits) wish.max_error = kUsualError;
  Recommendation result{recommend(comparison.rows, wish), ""};
  if (without_limits) result.advice.reason = "Without --max-error and --budget-ms: " + result.advice.reason;
  const MaskUse mask{.causal = s.causal, .keep_key = !s.keep.empty(), .keep_query = s.masks_queries()};
  result.line = line_of_cpp(facts_of(result.advice.row.method), result.advice.row.size, options.seed, mask);
  return result;
}

void run(const Options& options) {
  const int threads = make_context(options.threads).workers();
  const Sequences sequences = load(options);
  std::optional<std::ofstream> json = open(options.json), csv = open(options.csv);
  std::printf("%s\n\n", heading(sequences, threads).c_str());
  std::fflush(stdout);
  const Comparison comparison = compare(options, sequences);
  std::fputs(text_report(comparison, sequences).c_str(), stdout);
  const Recommendation advised = recommendation(options, comparison, sequences);
  const bool several_heads = sequences.num_heads() > 1;
  std::printf("\n%s\n%s%s\n", advised.advice.reason.c_str(),
              several_heads ? "For each head, or for all by attn::multi_head:\n" : "", advised.line.c_str());
  const std::string warning = before_trusting(advised.advice.row, several_heads, !options.q);
  if (!warning.empty()) std::printf("%s\n", warning.c_str());
  if ((options.max_error || options.budget_ms) && options.target == Target::softmax) {
    std::printf("\n%s", automatic_report(run_automatic(options, sequences), sequences).c_str());
  }
  write(json, options.json, json_report(comparison, sequences, threads, advised));
  write(csv, options.csv, csv_report(comparison));
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("attn_compare", run, read_options(argc, argv));
}
