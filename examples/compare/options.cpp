#include "compare/options.hpp"

#include "common/option_checks.hpp"
#include "common/parse_options.hpp"

#include <CLI/CLI.hpp>

#include <algorithm>
#include <map>

namespace {

using attn::Causal;
using attn::Index;
using families::Family;

constexpr Index kMost = 100'000'000;

const std::map<std::string, Family> kFamilyNames{{"unit", Family::unit},
                                                 {"init", Family::init},
                                                 {"smooth", Family::smooth},
                                                 {"self", Family::self},
                                                 {"clusters", Family::clusters}};
const std::map<std::string, Causal> kCausalNames{{"upper_left", Causal::upper_left},
                                                 {"lower_right", Causal::lower_right}};
const std::map<std::string, Target> kTargetNames{{"softmax", Target::softmax}, {"gaussian", Target::gaussian}};

constexpr const char* kExamples = R"(Examples:
  attn_compare                                                      made tokens: how the table looks
  attn_compare --q q.npy --k k.npy --v v.npy                        which method for these, within an error of 0.1
  attn_compare --q q.npy --k k.npy --v v.npy --max-error 0.02       within another error
  attn_compare --q q.npy --k k.npy --v v.npy --budget-ms 5          the most accurate within a time
  attn_compare --q q.npy --k k.npy --v v.npy --mask mask.npy --causal
  attn_compare --n 8192 --methods multipole,nystrom --threads 1     without files, only these

Files are NumPy's, in C or Fortran order, little-endian: of float16, float32 or float64, and masks of bool, uint8,
int32 or int64 too. From PyTorch:  numpy.save("q.npy", q.detach().float().cpu().numpy()))";

/// An option whose value is one of the names.
template <class T>
CLI::Option* add_name(CLI::App& app, const char* option, T& value, const std::map<std::string, T>& names,
                      const char* what) {
  const auto initial = std::ranges::find(names, value, [](const auto& entry) { return entry.second; });
  return app
      .add_option_function<std::string>(
          option, [&](const std::string& name) { value = names.at(name); }, what)
      ->check(CLI::IsMember(names))
      ->default_str(initial->first);
}

void add_inputs(CLI::App& app, Options& options) {
  const auto file = [&](const char* name, std::optional<std::string>& path, const char* what) {
    return app.add_option(name, path,
                          std::string(what) + ", a .npy file of shape (n, d), (heads, n, d) or (batch, heads, n, d)");
  };
  CLI::Option* q = file("--q", options.q, "queries");
  CLI::Option* k = file("--k", options.k, "keys");
  CLI::Option* v = file("--v", options.v, "values");
  q->needs(k)->needs(v);
  k->needs(q)->needs(v);
  v->needs(q)->needs(k);
  const auto made = [&](CLI::Option* option) { option->excludes(q); };
  made(add_name(app, "--family", options.family, kFamilyNames,
                "without files: tokens of this family, see tests/common/families.hpp"));
  made(app.add_option("--n", options.n, "how many of them")->check(CLI::Range(Index{1}, kMost))->capture_default_str());
  made(app.add_option("--d", options.d, "with how many features each")
           ->check(CLI::Range(Index{1}, kMost))
           ->capture_default_str());
  app.add_option("--seed", options.seed, "seed of those tokens and of sampled landmarks")->capture_default_str();
  CLI::Option* mask = app.add_option("--mask", options.mask,
                                     "tokens to keep, a .npy file: (n) or (batch, n). 0 or false drops one; of "
                                     "floating-point numbers 1 keeps and 0 drops, or, where they are 0 and -inf (or at "
                                     "most -10000) as added to scores, 0 keeps. For keys, and for queries where there "
                                     "are as many");
  app.add_option("--keep-length", options.keep_length, "keep only the first tokens, this many, in the same way")
      ->check(CLI::Range(Index{1}, kMost))
      ->excludes(mask);
  app.add_flag("--causal{lower_right}", options.causal,
               "causal attention; --causal=upper_left aligns the first query with the first key")
      ->check(CLI::IsMember(kCausalNames));
}

void add_options(CLI::App& app, Options& options) {
  add_inputs(app, options);
  app.add_option("--landmarks", options.landmarks, "numbers of landmarks to try, such as 64,128")
      ->delimiter(',')
      ->check(CLI::Range(Index{1}, kMost))
      ->capture_default_str();
  app.add_option("--near", options.near,
                 "numbers of multipole's near clusters to try, such as 8,64; 0: as many as it takes by itself")
      ->delimiter(',')
      ->check(CLI::Range(Index{0}, kMost))
      ->capture_default_str();
  app.add_option(
         "--methods", options.methods,
         "methods to run besides exact softmax, such as nystrom,skyformer; without it, all of" + list_of_methods())
      ->delimiter(',')
      ->check(check_method);
  add_name(app, "--target", options.target, kTargetNames,
           "what the model was trained with: only methods that approximate it are recommended");
  app.add_option("--budget-ms", options.budget_ms,
                 "recommend the most accurate method that takes no longer, all heads together")
      ->check(check_positive);
  app.add_option(
         "--max-error", options.max_error,
         "recommend the fastest method whose error is no larger in any head, 0.1 where neither is given; and what "
         "attn::Automatic chooses for each head")
      ->check(check_positive);
  app.add_option("--spectral-seconds", options.spectral_seconds,
                 "time for the errors in the spectral norm, which are left out where it is too short; 0: none")
      ->check(check_not_negative)
      ->capture_default_str();
  app.add_option("--threads", options.threads, "OpenMP threads; 0: as many as OpenMP would use")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_option("--repetitions", options.repetitions,
                 "timed runs of each method, more of quick ones and fewer of slow ones, after one that warms up; the "
                 "median counts")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--json", options.json, "write the table to this file as JSON");
  app.add_option("--csv", options.csv, "write the table to this file as comma-separated values");
}

}  // namespace

std::string family_name(Family family) {
  return std::ranges::find(kFamilyNames, family, [](const auto& entry) { return entry.second; })->first;
}

attn::Causal wanted_causal(const Options& options) {
  return options.causal.empty() ? Causal::none : kCausalNames.at(options.causal);
}

Options read_options(int argc, char** argv) {
  return parse_options("Compares exact attention with every approximation of it, on tokens from files or on made ones.",
                       add_options, argc, argv, kExamples);
}
