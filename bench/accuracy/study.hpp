/// What a study is, and what it finds.
#pragma once

#include <attn/matrix.hpp>

#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace accuracy {

using attn::Index;

struct Settings {
  int seeds = 3;
  bool quick = false;                                    ///< small and few, to see that it runs
  std::vector<std::string> tensors{ATTN_BENCH_TENSORS};  ///< the folders that heads of trained models are read from
  std::vector<std::string> growth{"dinov2_l5h4", "words", "smooth"};  ///< what study_growth has: heads and families
  Index longest = 65536;                                              ///< the most tokens of study_growth
  int problems = 1000;                                                ///< of study_automatic
};

/// A quantity with a sample for each seed.
struct Figure {
  std::string name;
  std::vector<double> samples;
};

/// A line of a table: what it is of, and what was measured.
struct Row {
  std::vector<std::pair<std::string, std::variant<std::string, Index, double>>> labels;
  std::vector<Figure> figures{};

  /// Adds a sample to the figure of that name, a new one if there is none.
  void add(std::string_view figure, double sample);
};

/// Rows with the same labels and figures.
struct Table {
  std::string name, title;
  std::vector<Row> rows{};
};

/// The error against the number of landmarks, in the spectral norm.
std::vector<Table> study_features(const Settings& settings);
/// Spectral shifting against Nystrom as the spectrum's decay slows, and the best that either could do.
std::vector<Table> study_shift(const Settings& settings);
/// What each number of steps of Nystrom's inverse leaves over, and its error.
std::vector<Table> study_iterations(const Settings& settings);
/// Error against time.
std::vector<Table> study_pareto(const Settings& settings);
/// Error, time and speed-up of every method on queries, keys and values of trained models.
std::vector<Table> study_tensors(const Settings& settings);
/// Multipole's time, speed-up and error as the number of tokens grows.
std::vector<Table> study_growth(const Settings& settings);
/// Estimates of errors, how often Automatic keeps its promise, and what its search takes.
std::vector<Table> study_automatic(const Settings& settings);
/// Singular values and condition numbers of softmax and Gaussian attention.
std::vector<Table> study_spectrum(const Settings& settings);
/// How often Skyformer's theorem holds, against the number of landmarks.
std::vector<Table> study_loewner(const Settings& settings);

}  // namespace accuracy
