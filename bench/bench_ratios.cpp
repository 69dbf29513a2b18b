/// The figures that may be quoted: attn against the FMA peak, against its peer, and on two cores. Machines and clocks
/// vary, so everything runs in one process in turn, round after round, each sample beside one of the peak, and only
/// ratios count:
///
///   for each round, for each contender:   ratio = (flops / time of a sample) / (FMA peak measured just before)
///   table: median over the rounds, with quartiles and extremes
#include <attn/exact.hpp>
#include <attn/nystrom.hpp>
#include <attn/openmp.hpp>
#include <attn/skyformer.hpp>
#include <attn/spectral_shift.hpp>

#include "common/eigen_blocks.hpp"
#include "common/flops.hpp"
#include "common/fma_peak.hpp"
#include "common/samples.hpp"
#include "common/tokens.hpp"

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using attn::Causal;
using attn::Index;
using Clock = std::chrono::steady_clock;

struct Settings {
  Index n = 2048, num_landmarks = 128;
  Index long_n = 16384;  ///< of the methods whose cost grows with n alone
  int rounds = 15;
  double sample_ms = 25, max_seconds = 50;
  std::string json;

  double sample_seconds() const { return sample_ms / 1e3; }
};

/// One line of the tables: something to run, and the peak of its scalar type.
struct Contender {
  std::string name;
  double flops;
  std::function<void(attn::Context&)> run;
  double (*peak)(double seconds, int threads);
};

template <class Method>
Contender contender(std::string name, const Method& method, bench::Tokens<typename Method::Scalar> tokens, double flops,
                    Causal causal = Causal::none) {
  using T = typename Method::Scalar;
  auto shared = std::make_shared<bench::Tokens<T>>(std::move(tokens));
  return {.name = std::move(name),
          .flops = flops,
          .run = [=](attn::Context& context) { method.forward(shared->inputs(causal), shared->out, context); },
          .peak = bench::fma_peak<T>};
}

/// An exact method on (n, d) tokens, named after both.
template <class Method>
Contender exact(const Settings& settings, Index d, Causal causal = Causal::none) {
  using T = typename Method::Scalar;
  const std::string name = std::string(Method::kName) + (std::is_same_v<T, float> ? "/float" : "/double") +
                           (causal == Causal::none ? "" : "/causal") + "/d:" + std::to_string(d);
  return contender(name, Method{}, bench::normal_tokens<T>(settings.n, d),
                   bench::attention_flops(settings.n, settings.n, d, causal), causal);
}

Contender skyformer(const Settings& settings) {
  constexpr Index kDim = 64;
  return contender("skyformer/float/d:64/m:" + std::to_string(settings.num_landmarks),
                   attn::Skyformer<float>{attn::UniformSample{.num_landmarks = settings.num_landmarks}},
                   bench::smooth_tokens<float>(settings.n, kDim), bench::landmark_flops(settings.n, settings.num_landmarks, kDim));
}

/// A method with segment means on long sequences, against 8 n m d flops: its two factors count, its m x m algebra does not.
template <class Method>
Contender segment_means(const Settings& settings) {
  constexpr Index kDim = 64, kLandmarks = 64;
  const std::string name = std::string(Method::kName) + "/float/n:" + std::to_string(settings.long_n) + "/d:64/m:64";
  return contender(name, Method{attn::SegmentMeans{.num_landmarks = kLandmarks}}, bench::smooth_tokens<float>(settings.long_n, kDim),
                   bench::landmark_flops(settings.long_n, kLandmarks, kDim));
}

/// How many calls of each contender make a sample; leaves the context warm.
std::vector<int> calls_per_sample(const std::vector<Contender>& contenders, double seconds, attn::Context& context) {
  std::vector<int> calls;
  for (const Contender& c : contenders) calls.push_back(bench::calls_for(seconds, [&] { c.run(context); }));
  return calls;
}

/// All that is measured on one core; softmax, its peer and so on stand beside one another in time too.
std::vector<Contender> one_core_contenders(const Settings& settings) {
  using Softmax = attn::SoftmaxAttention<float>;
  using SoftmaxDouble = attn::SoftmaxAttention<double>;
  using Peer = bench::EigenBlocks<float>;
  return {exact<Softmax>(settings, 64),
          exact<Peer>(settings, 64),
          exact<Softmax>(settings, 64, Causal::upper_left),
          exact<Peer>(settings, 64, Causal::upper_left),
          skyformer(settings),
          exact<attn::GaussianAttention<float>>(settings, 64),
          exact<Softmax>(settings, 32),
          exact<Softmax>(settings, 128),
          exact<SoftmaxDouble>(settings, 64),
          exact<SoftmaxDouble>(settings, 64, Causal::upper_left),
          segment_means<attn::Nystrom<float>>(settings),
          segment_means<attn::ShiftedNystrom<float>>(settings)};
}

/// The contenders above of which the first is said to be so many times faster than the second.
struct Pair {
  std::size_t fast, slow;
};
constexpr Pair kPairs[] = {{0, 1}, {2, 3}, {4, 5}, {10, 11}};

/// A quantity sampled once a round.
struct Series {
  std::string name;
  std::vector<double> samples{};
};

/// Each contender's fraction of the peak, and how many times faster one is than its neighbour in the same round.
struct OneCore {
  std::vector<Series> of_peak, speed_ups;
};

OneCore measure_one_core(const Settings& settings, Clock::time_point deadline) {
  const std::vector<Contender> contenders = one_core_contenders(settings);
  OneCore result;
  for (const Contender& c : contenders) result.of_peak.push_back({c.name});
  for (const auto [fast, slow] : kPairs) result.speed_ups.push_back({contenders[fast].name + " over " + contenders[slow].name});

  attn::Context context;
  const std::vector<int> calls = calls_per_sample(contenders, settings.sample_seconds(), context);
  std::vector<double> seconds(contenders.size());
  for (int round = 0; round < settings.rounds && (round == 0 || Clock::now() < deadline); ++round) {
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      const Contender& c = contenders[i];
      const double peak = c.peak(settings.sample_seconds(), 1);
      seconds[i] = bench::seconds_of(calls[i], [&] { c.run(context); }) / calls[i];
      result.of_peak[i].samples.push_back(c.flops / seconds[i] / peak);
    }
    for (std::size_t p = 0; p < std::size(kPairs); ++p) {
      result.speed_ups[p].samples.push_back(seconds[kPairs[p].slow] / seconds[kPairs[p].fast]);
    }
  }
  return result;
}

/// What a second OpenMP worker brings, divided by what the second core brings to the peak: 1 is all there is to be had.
std::vector<Series> measure_two_workers(const Settings& settings, Clock::time_point deadline) {
  const std::vector<Contender> contenders{exact<attn::SoftmaxAttention<float>>(settings, 64),
                                          exact<attn::SoftmaxAttention<float>>(settings, 64, Causal::upper_left),
                                          skyformer(settings)};
  Series peak_gain{"fma_peak/float (its own gain)"};
  std::vector<Series> shares;
  for (const Contender& c : contenders) shares.push_back({c.name});

  attn::Context one, two{attn::OpenMP{.threads = 2}};
  const std::vector<int> calls = calls_per_sample(contenders, settings.sample_seconds(), one);
  calls_per_sample(contenders, settings.sample_seconds(), two);  // only to warm it up
  for (int round = 0; round < settings.rounds && (round == 0 || Clock::now() < deadline); ++round) {
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      const Contender& c = contenders[i];
      const double peak_one = c.peak(settings.sample_seconds(), 1);
      const double seconds_one = bench::seconds_of(calls[i], [&] { c.run(one); });
      const double seconds_two = bench::seconds_of(calls[i], [&] { c.run(two); });
      const double gain = c.peak(settings.sample_seconds(), 2) / peak_one;
      peak_gain.samples.push_back(gain);
      shares[i].samples.push_back(seconds_one / seconds_two / gain);
    }
  }
  shares.push_back(std::move(peak_gain));
  return shares;
}

void print(const char* title, const std::vector<Series>& table) {
  std::printf("\n%-66s  median   quartiles      extremes\n", title);
  for (const Series& row : table) {
    const bench::Spread s = bench::spread(row.samples);
    std::printf("  %-64s %7.3f   %.3f .. %.3f  %.3f .. %.3f   (%zu)\n", row.name.c_str(), s.median, s.first_quartile,
                s.third_quartile, s.minimum, s.maximum, row.samples.size());
  }
}

nlohmann::ordered_json to_json(const std::vector<Series>& table) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const Series& row : table) {
    const bench::Spread s = bench::spread(row.samples);
    rows.push_back({{"name", row.name},
                    {"median", s.median},
                    {"quartiles", {s.first_quartile, s.third_quartile}},
                    {"extremes", {s.minimum, s.maximum}},
                    {"samples", row.samples}});
  }
  return rows;
}

/// Whether the file could be written.
bool write_json(const Settings& settings, const OneCore& one_core, const std::vector<Series>& two_workers) {
  const nlohmann::ordered_json report{
      {"n", settings.n},
      {"sample_ms", settings.sample_ms},
      {"compiler", __VERSION__},
      {"vector_bytes", bench::kVectorBytes},
      {"of_fma_peak", to_json(one_core.of_peak)},
      {"speed_ups", to_json(one_core.speed_ups)},
      {"two_workers_over_fma_peak_gain", to_json(two_workers)},
  };
  std::ofstream file(settings.json);
  file << report.dump(2) << std::endl;
  return file.good();
}

Settings parse(int argc, char** argv) {
  Settings settings;
  CLI::App app{"attn against the FMA peak of this machine, as ratios within one run"};
  const auto add = [&](const char* name, auto& value, const char* text) {
    app.add_option(name, value, text)->check(CLI::PositiveNumber)->capture_default_str();
  };
  add("--n", settings.n, "tokens");
  add("--long-n", settings.long_n, "tokens of the methods with segment means");
  add("--landmarks", settings.num_landmarks, "Skyformer's landmarks");
  add("--rounds", settings.rounds, "samples of each contender");
  add("--sample-ms", settings.sample_ms, "length of a sample");
  add("--max-seconds", settings.max_seconds, "no new round after this");
  app.add_option("--json", settings.json, "also write every sample to this file");
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::exit(app.exit(error));
  }
  return settings;
}

}  // namespace

int main(int argc, char** argv) {
  const Settings settings = parse(argc, argv);
  Eigen::setNbThreads(1);
  const auto after = [start = Clock::now()](double seconds) {
    return start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  };
  std::printf("n = %td, %d-byte vectors; ratios only, each to a sample of the FMA peak taken beside it (number of samples)\n",
              settings.n, bench::kVectorBytes);
#ifndef __OPTIMIZE__
  std::printf("compiled without optimisation: the peak is not one, and no ratio below means anything\n");
#endif
  const OneCore one_core = measure_one_core(settings, after(0.7 * settings.max_seconds));
  print("one core, as a fraction of the FMA peak", one_core.of_peak);
  print("one core, times faster", one_core.speed_ups);
  const std::vector<Series> two_workers = measure_two_workers(settings, after(settings.max_seconds));
  print("two workers' speed-up over the FMA peak's", two_workers);
  if (!settings.json.empty() && !write_json(settings, one_core, two_workers)) {
    std::fprintf(stderr, "bench_ratios: cannot write %s\n", settings.json.c_str());
    return 1;
  }
}
