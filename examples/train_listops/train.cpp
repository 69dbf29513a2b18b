#include "train_listops/train.hpp"

#include "train_listops/model.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <optional>
#include <ratio>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using listops::Example;
using torch::Tensor;

/// Examples to train with and others to measure on, which lie in order of their length, so that batches have little
/// padding.
struct Data {
  std::vector<Example> training, validation;
  listops::Baselines baselines;
};

Data make_data(const Options& options) {
  listops::Generator generator(options.grammar, options.data_seed);
  std::vector<Example> training = listops::distinct_examples(generator, options.num_training + options.num_validation);
  std::vector<Example> validation(training.end() - static_cast<std::ptrdiff_t>(options.num_validation), training.end());
  training.resize(options.num_training);
  std::ranges::stable_sort(validation, {}, [](const Example& example) { return example.tokens.size(); });
  const listops::Baselines baselines = listops::baselines(training, validation);
  return {std::move(training), std::move(validation), baselines};
}

/// n examples, example_of(0) and so on, padded to the longest of them.
template <class ExampleOf>
Batch make_batch(std::size_t n, const ExampleOf& example_of) {
  std::size_t longest = 0;
  for (std::size_t i = 0; i < n; ++i) longest = std::max(longest, example_of(i).tokens.size());
  std::vector<std::int64_t> tokens(n * longest, listops::kPadding), values(n);
  for (std::size_t i = 0; i < n; ++i) {
    const Example& example = example_of(i);
    std::ranges::copy(example.tokens, tokens.begin() + static_cast<std::ptrdiff_t>(i * longest));
    values[i] = example.value;
  }
  const Tensor padded = torch::tensor(tokens).view({static_cast<long>(n), static_cast<long>(longest)});
  return {padded, padded != listops::kPadding, torch::tensor(values)};
}

Batch make_batch(std::span<const Example> examples) {
  return make_batch(examples.size(), [&](std::size_t i) -> const Example& { return examples[i]; });
}

/// Draws batches from the examples, each once before any comes again.
class Batches {
 public:
  Batches(std::span<const Example> examples, std::size_t batch)
      : examples_(examples), batch_(std::min(batch, examples.size())) {}

  Batch next() {
    if (!order_.defined() || at_ + batch_ > examples_.size()) {
      order_ = torch::randperm(static_cast<long>(examples_.size()), torch::kLong);
      at_ = 0;
    }
    const std::int64_t* chosen = order_.data_ptr<std::int64_t>() + at_;
    at_ += batch_;
    return make_batch(batch_,
                      [&](std::size_t i) -> const Example& { return examples_[static_cast<std::size_t>(chosen[i])]; });
  }

 private:
  std::span<const Example> examples_;
  std::size_t batch_, at_ = 0;
  Tensor order_;
};

/// Adds up what it runs, on the clock and on this process's processors, which do not count while other programs have
/// them.
class Stopwatch {
 public:
  template <class Body>
  void run(const Body& body) {
    const auto start = std::chrono::steady_clock::now();
    const std::clock_t cpu_start = std::clock();
    body();
    seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    cpu_seconds_ += static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC;
  }

  double seconds() const { return seconds_; }
  double cpu_seconds() const { return cpu_seconds_; }

 private:
  double seconds_ = 0, cpu_seconds_ = 0;
};

struct Measured {
  double loss, accuracy;
};

/// What is known after so many steps.
struct Report {
  int step;
  const Stopwatch& watch;
  double training_loss;
  Measured validation;
  double instability;
};

/// A file that a user asked for, or nothing. Opened before anything is trained.
class OutputFile {
 public:
  explicit OutputFile(const std::optional<std::string>& path) : wanted_(path.has_value()), path_(path.value_or("")) {
    if (wanted_) file_.open(path_);
    check();
  }

  void line(const std::string& text) {
    if (wanted_) file_ << text << std::endl;
    check();
  }

 private:
  void check() const {
    if (wanted_ && !file_) throw std::runtime_error(path_ + ": cannot be written");
  }

  bool wanted_;
  std::string path_;
  std::ofstream file_;
};

template <class... Values>
std::string text_of(const char* format, Values... values) {
  char text[512];
  std::snprintf(text, sizeof text, format, values...);
  return text;
}

class Training {
 public:
  explicit Training(const Options& options)
      : options_(options),
        csv_(options.csv),
        spectrum_(options.spectrum),
        data_(make_data(options)),
        batches_(data_.training, static_cast<std::size_t>(options.batch)),
        model_(shape(options), attention(options)),
        optimizer_(model_->parameters(), torch::optim::AdamWOptions(options.learning_rate)) {}

  void run() {
    print_heading();
    const auto start = std::chrono::steady_clock::now();
    const auto minutes = [&] {
      return std::chrono::duration<double, std::ratio<60>>(std::chrono::steady_clock::now() - start);
    };
    for (int step = 1; step <= options_.steps; ++step) {
      const bool late = minutes().count() >= options_.minutes;
      const bool last = step == options_.steps || late;
      take_step(step, last || step % options_.every == 0);
      if (last) break;
    }
    write_spectrum();
  }

 private:
  static ModelShape shape(const Options& options) {
    return {listops::kVocabulary, listops::kClasses, static_cast<long>(options.grammar.max_length)};
  }

  static attn_torch::Attention attention(const Options& options) {
    at::set_num_threads(options.threads);
    torch::manual_seed(options.seed);  // the weights are drawn next, the order of the examples after them
    const attn::MethodEntry<float>& method = attn::find_method<float>(options.method);
    attn::MethodOptions of_method = options.of_method;
    if (!method.takes("num_landmarks")) of_method.num_landmarks.reset();
    if (method.takes("seed")) of_method.seed = options.seed;
    return attn_torch::Attention(options.method, of_method);
  }

  void print_heading() {
    std::printf("%s: %zu examples of %zu to %zu tokens, %ld parameters, %d thread%s\n", options_.method.c_str(),
                data_.training.size(), options_.grammar.min_length, options_.grammar.max_length, num_parameters(),
                options_.threads, options_.threads == 1 ? "" : "s");
    std::printf("accuracy without a model: majority class %.4f, root operator alone %.4f\n\n", data_.baselines.majority,
                data_.baselines.root_operator);
    std::printf("%7s %9s %8s %13s %15s %9s %9s %9s\n", "step", "seconds", "s/step", "training loss", "validation loss",
                "accuracy", "majority", "root op.");
    csv_.line(
        "method,seed,step,seconds,cpu_seconds,training_loss,validation_loss,validation_accuracy,majority,"
        "root_operator,instability");
  }

  long num_parameters() const {
    long n = 0;
    for (const Tensor& parameter : model_->parameters()) n += parameter.numel();
    return n;
  }

  /// One step of the optimizer and, where it is time, a line about all since the last one.
  void take_step(int step, bool measure) {
    const double rate =
        options_.learning_rate * std::min(1.0, static_cast<double>(step) / std::max(1, options_.warmup));
    static_cast<torch::optim::AdamWOptions&>(optimizer_.param_groups()[0].options()).lr(rate);
    const Probe before = measure ? probe() : Probe{};
    double loss = 0;
    watch_.run([&] { loss = descend(); });
    if (!std::isfinite(loss))
      throw std::runtime_error(text_of("the loss is not finite at step %d: training diverged", step));
    sum_of_losses_ += loss;
    ++num_losses_;
    if (!measure) return;
    report({step, watch_, sum_of_losses_ / num_losses_, validate(), instability(before)});
    sum_of_losses_ = 0;
    num_losses_ = 0;
  }

  double descend() {
    const Batch batch = batches_.next();
    optimizer_.zero_grad();
    const Tensor loss = torch::nn::functional::cross_entropy(model_(batch), batch.values);
    loss.backward();
    optimizer_.step();
    return loss.item<double>();
  }

  std::span<const Example> part_of_validation(std::size_t first) const {
    const std::span<const Example> all = data_.validation;
    return all.subspan(first, std::min(kMeasuredAtOnce, all.size() - first));
  }

  Measured validate() {
    const torch::NoGradGuard inference;
    double loss = 0, correct = 0;
    for (std::size_t first = 0; first < data_.validation.size(); first += kMeasuredAtOnce) {
      const Batch batch = make_batch(part_of_validation(first));
      const Tensor scores = model_(batch);
      loss += torch::nn::functional::cross_entropy(
                  scores, batch.values, torch::nn::functional::CrossEntropyFuncOptions().reduction(torch::kSum))
                  .item<double>();
      correct += (scores.argmax(-1) == batch.values).sum().item<double>();
    }
    const auto n = static_cast<double>(data_.validation.size());
    return {loss / n, correct / n};
  }

  /// Scores of some of the validation examples, and all weights.
  struct Probe {
    Tensor scores, weights;
  };

  Probe probe() {
    const torch::NoGradGuard inference;
    return {model_(make_batch(part_of_validation(0))), torch::nn::utils::parameters_to_vector(model_->parameters())};
  }

  /// |change of the scores|^2 / |change of the weights|^2 in the step since before.
  double instability(const Probe& before) {
    const Probe after = probe();
    return ((after.scores - before.scores).square().sum() / (after.weights - before.weights).square().sum())
        .item<double>();
  }

  void report(const Report& r) {
    const auto& [majority, root_operator] = data_.baselines;
    std::printf("%7d %9.1f %8.4f %13.4f %15.4f %9.4f %9.4f %9.4f\n", r.step, r.watch.seconds(),
                r.watch.seconds() / r.step, r.training_loss, r.validation.loss, r.validation.accuracy, majority,
                root_operator);
    std::fflush(stdout);
    csv_.line(text_of("%s,%llu,%d,%.3f,%.3f,%.6f,%.6f,%.6f,%.6f,%.6f,%.6g", options_.method.c_str(),
                      static_cast<unsigned long long>(options_.seed), r.step, r.watch.seconds(), r.watch.cpu_seconds(),
                      r.training_loss, r.validation.loss, r.validation.accuracy, majority, root_operator,
                      r.instability));
  }

  /// The singular values of the last layer's attention, relative to the largest one, in the mean of the longest
  /// validation examples.
  void write_spectrum() {
    if (!options_.spectrum) return;
    const torch::NoGradGuard inference;
    const std::span<const Example> all = data_.validation;
    const std::size_t n = std::min(kMeasuredAtOnce, all.size());
    Tensor sum = torch::zeros({ModelShape{}.dim});
    for (const Example& example : all.last(n)) {
      const Tensor values = torch::linalg_svdvals(model_->last_attention(make_batch({&example, 1}))[0]);
      sum.slice(0, 0, values.size(0)) += values / values[0];
    }
    spectrum_.line("method,seed,index,singular_value");
    for (long i = 0; i < sum.size(0); ++i) {
      spectrum_.line(text_of("%s,%llu,%ld,%.6g", options_.method.c_str(),
                             static_cast<unsigned long long>(options_.seed), i + 1,
                             sum[i].item<double>() / static_cast<double>(n)));
    }
  }

  static constexpr std::size_t kMeasuredAtOnce = 50;

  const Options& options_;
  OutputFile csv_, spectrum_;
  Data data_;
  Batches batches_;
  Classifier model_;
  torch::optim::AdamW optimizer_;
  Stopwatch watch_;
  double sum_of_losses_ = 0;
  int num_losses_ = 0;
};

}  // namespace

void train(const Options& options) {
  Training(options).run();
}
