#include "train_listops/options.hpp"

#include "common/option_checks.hpp"
#include "common/parse_options.hpp"

#include <CLI/CLI.hpp>

namespace {

constexpr int kMost = 10'000'000, kLongest = 100'000;

void add_method(CLI::App& app, Options& options) {
  app.add_option("--method", options.method, "attention to train with:" + list_of_methods())
      ->check(check_method)
      ->capture_default_str();
  app.add_option("--landmarks", options.of_method.num_landmarks, "landmarks of the approximations; 32 unless given")
      ->check(CLI::Range(1, kMost));
  app.add_option("--gamma", options.of_method.gamma, "ridge of skyformer and lifted-softmax")->check(check_positive);
}

void add_data(CLI::App& app, Options& options) {
  const auto count = CLI::Range(1, kMost), length = CLI::Range(1, kLongest);
  app.add_option("--min-length", options.grammar.min_length, "tokens of the shortest example")
      ->check(length)
      ->capture_default_str();
  app.add_option("--max-length", options.grammar.max_length, "tokens of the longest")
      ->check(length)
      ->capture_default_str();
  app.add_option("--max-depth", options.grammar.max_depth, "levels of a tree")
      ->check(CLI::Range(1, 100))
      ->capture_default_str();
  app.add_option("--training", options.num_training, "examples to train with")->check(count)->capture_default_str();
  app.add_option("--validation", options.num_validation, "other examples, to measure on")
      ->check(count)
      ->capture_default_str();
  app.add_option("--data-seed", options.data_seed, "seed of the examples")->capture_default_str();
}

void add_training(CLI::App& app, Options& options) {
  const auto number = [&](const char* name, int& value, int least, const char* what) {
    app.add_option(name, value, what)->check(CLI::Range(least, kMost))->capture_default_str();
  };
  number("--steps", options.steps, 1, "steps of the optimizer");
  app.add_option("--minutes", options.minutes, "stop at the step that ends after this long, validation included")
      ->check(check_positive)
      ->capture_default_str();
  number("--batch", options.batch, 1, "examples a step");
  app.add_option("--learning-rate", options.learning_rate, "of AdamW")->check(check_positive)->capture_default_str();
  number("--warmup", options.warmup, 0, "steps over which the learning rate rises to it");
  number("--every", options.every, 1, "steps between validations");
  app.add_option("--seed", options.seed, "seed of the weights, the order of examples and sampled landmarks")
      ->capture_default_str();
  app.add_option("--threads", options.threads, "threads of libtorch and attn")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
}

void add_options(CLI::App& app, Options& options) {
  options.of_method.num_landmarks = 32;
  add_method(app, options);
  add_data(app, options);
  add_training(app, options);
  app.add_option("--csv", options.csv, "write a line for each validation to this file");
  app.add_option("--spectrum", options.spectrum,
                 "write the singular values of the trained second layer's attention to this file");
}

}  // namespace

Options read_options(int argc, char** argv) {
  return parse_options("Trains a small transformer on ListOps, with the attention that you choose.", add_options, argc,
                       argv);
}
