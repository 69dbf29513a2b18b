/// The figures that may be quoted: attn against the FMA peak, against its peer, and on two cores. Machines and clocks
/// vary, so everything runs in one process in turn, round after round, each sample beside one of the peak, and only
/// ratios count:
///
///   for each round, for each contender:   ratio = (flops / time of a sample) / (FMA peak measured just before)
///   table: median over the rounds, with quartiles and extremes
#include "common/flops.hpp"
#include "common/fma_peak.hpp"
#include "common/parse_options.hpp"
#include "common/samples.hpp"
#include "common/tokens.hpp"
#include "peers/peer.hpp"

#include <attn/any_approximator.hpp>
#include <attn/multi_head.hpp>
#include <attn/openmp.hpp>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using attn::Causal;
using attn::Index;
using bench::Family;
using Clock = std::chrono::steady_clock;

constexpr Index kDim = 64;

struct Settings {
  Index n = 2048;
  Index long_n = 16384;  ///< of the methods whose cost grows with n alone
  int rounds = 15;
  double sample_ms = 25, max_seconds = 75;
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

template <class T>
std::string type_name() {
  if (std::is_same_v<T, double>) return "double";
  if (std::is_same_v<T, Eigen::half>) return "half";
  return std::is_same_v<T, float> ? "float" : "bfloat16";
}

template <class T>
constexpr auto peak_of = bench::fma_peak<std::conditional_t<std::is_same_v<T, double>, double, float>>;

/// An exact method on (n, d) tokens.
template <class T>
Contender exact(const Settings& settings, const std::string& name, Index d = kDim, Causal causal = Causal::none,
                attn::Products products = attn::Products::fastest) {
  auto tokens = std::make_shared<bench::Tokens<T>>(bench::make_tokens<T>(Family::unit, settings.n, d));
  const auto method = attn::make_approximator<T>(name, {.products = products});
  return {.name = name + "/" + type_name<T>() + (products == attn::Products::fastest ? "" : "/float products") +
                  (causal == Causal::none ? "" : "/causal") + "/d:" + std::to_string(d),
          .flops = bench::attention_flops(settings.n, settings.n, d, causal),
          .run = [=](attn::Context& context) { method.forward(tokens->inputs(causal), tokens->out, context); },
          .peak = peak_of<T>};
}

/// Eigen's products on the same tokens.
Contender peer(const Settings& settings, Causal causal = Causal::none) {
  auto tokens = std::make_shared<bench::Tokens<float>>(bench::make_tokens<float>(Family::unit, settings.n, kDim));
  const bench::Peer peer = bench::eigen_blocks();
  return {.name = std::string(peer.name) + "/float" + (causal == Causal::none ? "" : "/causal") + "/d:64",
          .flops = bench::attention_flops(settings.n, settings.n, kDim, causal),
          .run = [=](attn::Context& context) { peer.forward(tokens->inputs(causal), tokens->out, context); },
          .peak = bench::fma_peak<float>};
}

/// An approximation on n smooth tokens, against the flops of its two factors, 8 n m d, and those given.
template <class T = float>
Contender approximation(const std::string& name, Index n, Index num_landmarks, double more_flops = 0) {
  auto tokens = std::make_shared<bench::Tokens<T>>(bench::make_tokens<T>(Family::smooth, n, kDim));
  const auto method = attn::find_method<T>(name).make({.num_landmarks = num_landmarks});
  return {.name = name + "/" + type_name<T>() + "/n:" + std::to_string(n) + "/d:64/m:" + std::to_string(num_landmarks),
          .flops = bench::landmark_flops(n, num_landmarks, kDim) + more_flops,
          .run = [=](attn::Context& context) { method.forward(tokens->inputs(), tokens->out, context); },
          .peak = bench::fma_peak<float>};
}

/// Multipole with its own counts, on n smooth tokens.
Contender multipole(Index n) {
  Contender contender = approximation("multipole", n, 0);
  contender.name = "multipole/float/n:" + std::to_string(n) + "/d:64";
  contender.flops = bench::multipole_flops(n, {}, kDim);
  return contender;
}

/// The two factors of a landmark method alone: m queries on n keys, then n queries on m keys.
Contender factors(Index n, Index m) {
  auto tokens = std::make_shared<bench::Tokens<float>>(bench::make_tokens<float>(Family::smooth, n, kDim));
  auto values = std::make_shared<attn::Matrix<float>>(m, kDim);
  const auto run = [=](attn::Context& context) {
    const attn::Inputs<float> in = tokens->inputs();
    const attn::ConstMatrixRef<float> q_land = in.q.topRows(m), k_land = in.k.topRows(m);
    attn::kernel_matmul(attn::SoftmaxKernel{}, attn::Inputs<float>{q_land, in.k, in.v}, *values, context);
    attn::kernel_matmul(attn::SoftmaxKernel{}, attn::Inputs<float>{in.q, k_land, *values}, tokens->out, context);
  };
  return {.name = "both factors/float/n:" + std::to_string(n) + "/d:64/m:" + std::to_string(m),
          .flops = bench::landmark_flops(n, m, kDim),
          .run = run,
          .peak = bench::fma_peak<float>};
}

/// The backward pass of a method with 64 landmarks, if any, on n tokens.
Contender backward(const std::string& name, Index n, double forward_flops) {
  using Method = attn::AnyApproximator<float>;
  struct State {
    Method method;
    bench::Tokens<float> tokens;
    attn::Matrix<float> dout, dq, dk, dv;
    Method::Saved saved{};
  };
  const attn::Matrix<float> zeros = attn::Matrix<float>::Zero(n, kDim), ones = attn::Matrix<float>::Ones(n, kDim);
  auto tokens = bench::make_tokens<float>(Family::smooth, n, kDim);
  const auto method = attn::make_approximator<float>(name);
  auto state = std::make_shared<State>(State{method, std::move(tokens), ones, zeros, zeros, zeros});
  attn::Context context;
  state->method.forward(state->tokens.inputs(), state->tokens.out, context, state->saved);
  const auto run = [s = std::move(state)](attn::Context& on) {
    const attn::Gradients<float> gradients{.dq = s->dq, .dk = s->dk, .dv = s->dv};
    s->method.backward(s->tokens.inputs(), s->tokens.out, s->dout, s->saved, gradients, on);
  };
  return {.name = name + "/float/backward/n:" + std::to_string(n) + "/d:64",
          .flops = bench::kBackwardOverForward * forward_flops,
          .run = run,
          .peak = bench::fma_peak<float>};
}

/// multi_head on 8 heads of n tokens.
Contender heads(const std::string& name, Index n, double flops_of_one, Causal causal = Causal::none) {
  constexpr Index kHeads = 8;
  auto tokens = std::make_shared<bench::Tokens<float>>(bench::make_tokens<float>(Family::smooth, kHeads * n, kDim));
  const auto method = attn::find_method<float>(name).make({.num_landmarks = 64});
  const auto view = [n](attn::Matrix<float>& m) { return attn::head_major(m.data(), 1, kHeads, n, kDim); };
  const auto run = [=](attn::Context& on) {
    const attn::Mask mask{.causal = causal};
    attn::multi_head(method, view(tokens->q), view(tokens->k), view(tokens->v), view(tokens->out), {&mask, 1}, on);
  };
  return {
      .name = name + "/float" + (causal == Causal::none ? "" : "/causal") + "/heads:8/n:" + std::to_string(n) + "/d:64",
      .flops = static_cast<double>(kHeads) * flops_of_one,
      .run = run,
      .peak = bench::fma_peak<float>};
}

/// softmax on 8 heads of n tokens each.
Contender softmax_heads(Index n, Causal causal = Causal::none) {
  return heads("softmax", n, bench::attention_flops(n, n, kDim, causal), causal);
}

/// How many calls of each contender make a sample; leaves the context warm.
std::vector<int> calls_per_sample(const std::vector<Contender>& contenders, double seconds, attn::Context& context) {
  std::vector<int> calls;
  for (const Contender& c : contenders) calls.push_back(bench::calls_for(seconds, [&] { c.run(context); }));
  return calls;
}

/// All that is measured on one core; what is compared stands close together in time too.
std::vector<Contender> one_core_contenders(const Settings& s) {
  const Index n = s.n, m = std::min<Index>(256, n / 4);
  return {exact<float>(s, "softmax"),
          peer(s),
          exact<Eigen::half>(s, "softmax"),
          exact<Eigen::bfloat16>(s, "softmax"),
          exact<float>(s, "softmax", kDim, Causal::upper_left),
          peer(s, Causal::upper_left),
          exact<float>(s, "softmax", 32),
          exact<float>(s, "softmax", 128),
          exact<double>(s, "softmax"),
          exact<double>(s, "softmax", kDim, Causal::upper_left),
          exact<float>(s, "gaussian"),
          approximation("skyformer", n, m / 2),
          backward("softmax", n, bench::attention_flops(n, n, kDim)),
          approximation("nystrom", s.long_n, 64),
          approximation("shifted-nystrom", s.long_n, 64),
          approximation("skyformer", s.long_n, 64),
          backward("nystrom", s.long_n, bench::landmark_flops(s.long_n, 64, kDim)),
          approximation("nystrom", 2 * n, m, bench::pinv_flops(m)),
          factors(s.long_n, 64),
          approximation<Eigen::half>("nystrom", s.long_n, 64),
          multipole(n),
          multipole(s.long_n),
          backward("multipole", s.long_n, bench::multipole_flops(s.long_n, {}, kDim)),
          exact<Eigen::bfloat16>(s, "softmax", kDim, Causal::none, attn::Products::float32),
          exact<Eigen::bfloat16>(s, "softmax", kDim, Causal::upper_left),
          softmax_heads(64),
          softmax_heads(256),
          softmax_heads(64, Causal::upper_left),
          softmax_heads(256, Causal::upper_left),
          softmax_heads(512, Causal::upper_left)};
}

/// One contender's time as so many times another's, both by their places in the list.
struct Pair {
  std::size_t slow, fast;
};
constexpr Pair kPairs[] = {{1, 0},   {5, 4},   {2, 0},   {0, 3},   {23, 3}, {4, 24}, {12, 0},
                           {10, 11}, {14, 13}, {16, 13}, {19, 13}, {0, 20}, {22, 21}};

/// A quantity sampled once a round.
struct Series {
  std::string name;
  std::vector<double> samples{};
};

/// Each contender's fraction of the peak, and one's time over another's in the same round.
struct OneCore {
  std::vector<Series> of_peak, times;
};

OneCore measure_one_core(const Settings& settings, Clock::time_point deadline) {
  const std::vector<Contender> contenders = one_core_contenders(settings);
  OneCore result;
  for (const Contender& c : contenders) result.of_peak.push_back({c.name});
  for (const auto [slow, fast] : kPairs) {
    result.times.push_back({contenders[slow].name + " / " + contenders[fast].name});
  }

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
      result.times[p].samples.push_back(seconds[kPairs[p].slow] / seconds[kPairs[p].fast]);
    }
  }
  return result;
}

/// What a second OpenMP worker brings, divided by what the second core brings to the peak: 1 is all there is to be had.
std::vector<Series> measure_two_workers(const Settings& settings, Clock::time_point deadline) {
  const std::vector<Contender> contenders{
      exact<float>(settings, "softmax"),
      exact<float>(settings, "softmax", kDim, Causal::upper_left),
      softmax_heads(settings.n),
      approximation("nystrom", settings.long_n, 64),
      heads("nystrom", settings.long_n / 4, bench::landmark_flops(settings.long_n / 4, 64, kDim)),
      approximation("skyformer", settings.long_n, 64),
      multipole(settings.long_n)};
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
  std::printf("\n%-90s  median   quartiles      extremes\n", title);
  for (const Series& row : table) {
    const bench::Spread s = bench::spread(row.samples);
    std::printf("  %-88s %7.3f   %.3f .. %.3f  %.3f .. %.3f   (%zu)\n", row.name.c_str(), s.median, s.first_quartile,
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
      {"times", to_json(one_core.times)},
      {"two_workers_over_fma_peak_gain", to_json(two_workers)},
  };
  std::ofstream file(settings.json);
  file << report.dump(2) << std::endl;
  return file.good();
}

void add_options(CLI::App& app, Settings& settings) {
  const auto add = [&](const char* name, auto& value, const char* text) {
    app.add_option(name, value, text)->check(CLI::PositiveNumber)->capture_default_str();
  };
  add("--n", settings.n, "tokens");
  add("--long-n", settings.long_n, "tokens of the approximations");
  add("--rounds", settings.rounds, "samples of each contender");
  add("--sample-ms", settings.sample_ms, "length of a sample");
  add("--max-seconds", settings.max_seconds, "no new round after this");
  app.add_option("--json", settings.json, "also write every sample to this file");
}

}  // namespace

int main(int argc, char** argv) {
  const Settings settings =
      parse_options("attn against the FMA peak of this machine, as ratios within one run", add_options, argc, argv);
  const auto after = [start = Clock::now()](double seconds) {
    return start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
  };
  std::printf("n = %td, %d-byte vectors; ratios to the FMA peak beside each sample (number of samples)\n", settings.n,
              bench::kVectorBytes);
#ifndef __OPTIMIZE__
  std::printf("compiled without optimisation: the peak is not one, and no ratio below means anything\n");
#endif
  const OneCore one_core = measure_one_core(settings, after(0.7 * settings.max_seconds));
  print("one core, as a fraction of the FMA peak", one_core.of_peak);
  print("one core, the first's time as so many times the second's", one_core.times);
  const std::vector<Series> two_workers = measure_two_workers(settings, after(settings.max_seconds));
  print("two workers' speed-up over the FMA peak's", two_workers);
  if (!settings.json.empty() && !write_json(settings, one_core, two_workers)) {
    std::fprintf(stderr, "bench_ratios: cannot write %s\n", settings.json.c_str());
    return 1;
  }
}
