/// What the papers claim of their approximations, measured again: runs the studies, prints a table of each and writes
/// all of them as JSON, which bench/plot.py draws. Or writes what every method does to a few tokens, for pictures of
/// it.
#include "accuracy/matrices.hpp"
#include "accuracy/report.hpp"
#include "accuracy/study.hpp"
#include "common/parse_options.hpp"
#include "common/run_program.hpp"

#include <CLI/CLI.hpp>
#include <Eigen/Core>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using Study = std::vector<accuracy::Table> (*)(const accuracy::Settings&);

const std::vector<std::pair<std::string, Study>> kStudies{
    {"features", accuracy::study_features},     {"shift", accuracy::study_shift},
    {"iterations", accuracy::study_iterations}, {"pareto", accuracy::study_pareto},
    {"tensors", accuracy::study_tensors},       {"growth", accuracy::study_growth},
    {"automatic", accuracy::study_automatic},   {"spectrum", accuracy::study_spectrum},
    {"loewner", accuracy::study_loewner}};

struct Options {
  std::vector<std::string> studies;  ///< none: all
  accuracy::Settings settings;
  bool matrices = false;  ///< in place of the studies
  std::string json;
};

void add_options(CLI::App& app, Options& options) {
  std::vector<std::string> names;
  for (const auto& study : kStudies) names.push_back(study.first);
  app.add_option("--study", options.studies, "run only these, such as features,shift")
      ->delimiter(',')
      ->check(CLI::IsMember(names));
  app.add_option("--seeds", options.settings.seeds, "samples of each figure, with tokens of their own")
      ->check(CLI::Range(1, 100))
      ->capture_default_str();
  app.add_flag("--quick", options.settings.quick, "small tokens and few of them: seconds, to see that it runs");
  app.add_option("--tensors", options.settings.tensors,
                 "folders of trained models' heads: index.json, and files as it names them")
      ->check(CLI::ExistingDirectory)
      ->capture_default_str();
  app.add_option("--growth", options.settings.growth, "what the study growth measures: families and heads to be tiled")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--longest", options.settings.longest, "the most tokens of the study growth; 1048576 takes a minute")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--problems", options.settings.problems, "random problems of the study automatic")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  CLI::Option* const json = app.add_option("--json", options.json, "write all figures to this file");
  app.add_flag("--matrices", options.matrices, "run no study; write every method's matrices for 96 tokens to that file")
      ->needs(json);
}

/// Runs what is wanted, printing as it goes.
nlohmann::ordered_json run(const Options& options) {
  nlohmann::ordered_json tables = nlohmann::ordered_json::object();
  for (const auto& [name, study] : kStudies) {
    if (!options.studies.empty() && std::ranges::find(options.studies, name) == options.studies.end()) continue;
    const auto start = std::chrono::steady_clock::now();
    for (const accuracy::Table& table : study(options.settings)) {
      std::printf("%s\n", accuracy::text_of(table).c_str());
      tables[table.name] = accuracy::json_of(table);
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    std::printf("%s took %.1f s\n\n", name.c_str(), seconds);
    std::fflush(stdout);
  }
  return {{"quick", options.settings.quick}, {"seeds", options.settings.seeds}, {"tables", tables}};
}

/// Throws std::runtime_error where a file cannot be read or written.
void write_report(const Options& options) {
  std::ofstream file;
  if (!options.json.empty()) file.open(options.json);
  const bool wanted = file.is_open();
  if (wanted != !options.json.empty()) throw std::runtime_error("cannot write " + options.json);
  const nlohmann::ordered_json report = options.matrices ? accuracy::method_matrices() : run(options);
  if (wanted && !(file << report.dump(1) << std::endl)) throw std::runtime_error("cannot write " + options.json);
}

}  // namespace

int main(int argc, char** argv) {
  Eigen::setNbThreads(1);
  const Options options =
      parse_options("The papers' claims about approximate attention, measured again", add_options, argc, argv);
  return run_program("bench_accuracy", write_report, options);
}
