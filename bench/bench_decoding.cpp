/// How near attention of a few queries comes to reading its cache once, which is all that it needs: 1 is the limit, as
/// long as the multiply-adds take no longer. Everything runs in one process in turn, round after round, each sample
/// beside one of the reading, and only ratios count:
///
///   for each round, for each contender:   ratio = (time to read k and v) / (time of a call)
///   table: median over the rounds, with quartiles and extremes
///
/// Multipole attention, of a token by a KeyCache, reads a part of the keys alone: its ratio is above 1.
#include "common/parse_options.hpp"
#include "common/read_rate.hpp"
#include "common/samples.hpp"

#include <attn/exact.hpp>
#include <attn/key_cache.hpp>
#include <attn/matrix.hpp>
#include <attn/multi_head.hpp>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

namespace {

using attn::Index;
using Clock = std::chrono::steady_clock;

constexpr Index kKeyHeads = 8;

struct Settings {
  Index longest = 65536;  ///< keys of a head; others have an eighth of them, and a 64th
  Index dim = 64;
  int rounds = 15;
  double sample_ms = 20, max_seconds = 75;

  double sample_seconds() const { return sample_ms / 1e3; }
};

/// Numbers in [-1, 1], as good as any.
template <class T>
void fill(std::vector<T>& x, std::uint32_t seed) {
  for (T& element : x) {
    seed = seed * 1664525 + 1013904223;
    element = static_cast<T>(static_cast<float>(seed >> 8) * 0x1p-23F - 1);
  }
}

/// Keys and values of all heads.
template <class T>
struct Cache {
  Index length, dim;
  std::vector<T> k, v;

  Cache(Index n_k, Index d) : length(n_k), dim(d), k(size()), v(size()) {
    fill(k, 1);
    fill(v, 2);
  }

  std::size_t size() const { return static_cast<std::size_t>(kKeyHeads * length * dim); }
  /// Reads all of it.
  std::uint64_t read() const {
    return bench::read_all(k.data(), size() * sizeof(T)) | bench::read_all(v.data(), size() * sizeof(T));
  }
  attn::HeadsView<const T> view(const std::vector<T>& x) const {
    return attn::head_major(x.data(), 1, kKeyHeads, length, dim);
  }
};

/// One line of the table.
struct Contender {
  std::string name;
  std::function<void()> run, read;
  std::vector<double> ratios{};
};

template <class T>
std::string type_name() {
  if (std::is_same_v<T, Eigen::half>) return "half";
  return std::is_same_v<T, float> ? "float" : "bfloat16";
}

/// n_q queries of each of so many heads.
template <class T>
Contender contender(const std::shared_ptr<Cache<T>>& cache, Index heads, Index n_q) {
  struct State {
    std::vector<T> q, out;
    attn::Context context{};
    std::uint64_t seen = 0;
  };
  const auto state = std::make_shared<State>();
  state->q.resize(static_cast<std::size_t>(heads * n_q * cache->dim));
  state->out.resize(state->q.size());
  fill(state->q, 3);
  const auto run = [=] {
    attn::multi_head(attn::SoftmaxAttention<T>{},
                     attn::head_major(static_cast<const T*>(state->q.data()), 1, heads, n_q, cache->dim),
                     cache->view(cache->k), cache->view(cache->v),
                     attn::head_major(state->out.data(), 1, heads, n_q, cache->dim), {}, state->context);
  };
  const auto read = [=] { state->seen |= cache->read(); };
  return {.name = type_name<T>() + "/heads:" + std::to_string(heads) + "/" + std::to_string(kKeyHeads) + "/n_q:" +
                  std::to_string(n_q) + "/n_k:" + std::to_string(cache->length) + "/d:" + std::to_string(cache->dim),
          .run = run,
          .read = read};
}

/// A token of each head by multipole attention. The nodes of the past are made once, before anything is timed.
template <class T>
Contender multipole_contender(const std::shared_ptr<Cache<T>>& cache) {
  struct State {
    attn::KeyCache<T> tokens;
    attn::Matrix<T> q, out;
    attn::Context context{};
    std::uint64_t seen = 0;
  };
  const Index width = kKeyHeads * cache->dim;
  const attn::CacheShape shape{.heads = kKeyHeads, .key_heads = kKeyHeads, .d = cache->dim, .d_v = cache->dim};
  const auto state = std::make_shared<State>(
      State{attn::KeyCache<T>(shape), attn::Matrix<T>::Constant(1, width, T(1)), attn::Matrix<T>(1, width)});
  const attn::ConstMatrixRef<T> k(cache->k.data(), cache->length, width, width),
      v(cache->v.data(), cache->length, width, width);
  state->tokens.append(k, v, k);
  const auto run = [=] { state->tokens.attend(state->q, state->out, state->context); };
  const auto read = [=] { state->seen |= cache->read(); };
  return {.name = type_name<T>() + "/multipole/heads:" + std::to_string(kKeyHeads) +
                  "/n_q:1/n_k:" + std::to_string(cache->length) + "/d:" + std::to_string(cache->dim),
          .run = run,
          .read = read};
}

template <class T>
void add_contenders(const Settings& settings, Index n_k, std::vector<Contender>& contenders) {
  const auto cache = std::make_shared<Cache<T>>(n_k, settings.dim);
  for (const Index n_q : {1, 2, 4, 8}) contenders.push_back(contender(cache, kKeyHeads, n_q));
  contenders.push_back(contender(cache, 4 * kKeyHeads, 1));
  if constexpr (std::is_same_v<T, float>) contenders.push_back(multipole_contender(cache));
}

/// All contenders of one length, of which float caches are the first.
std::vector<Contender> contenders_of(const Settings& settings, Index n_k) {
  std::vector<Contender> contenders;
  add_contenders<float>(settings, n_k, contenders);
  add_contenders<Eigen::half>(settings, n_k, contenders);
  add_contenders<Eigen::bfloat16>(settings, n_k, contenders);
  return contenders;
}

void measure(const Settings& settings, std::vector<Contender>& contenders, Clock::time_point deadline) {
  std::vector<int> calls;
  for (const Contender& c : contenders) calls.push_back(bench::calls_for(settings.sample_seconds(), c.run));
  for (int round = 0; round < settings.rounds && (round == 0 || Clock::now() < deadline); ++round) {
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      Contender& c = contenders[i];
      const double reading = bench::seconds_of(calls[i], c.read);
      c.ratios.push_back(reading / bench::seconds_of(calls[i], c.run));
    }
  }
}

void print(const std::vector<Contender>& contenders) {
  for (const Contender& c : contenders) {
    const bench::Spread s = bench::spread(c.ratios);
    std::printf("  %-48s %7.3f   %.3f .. %.3f  %.3f .. %.3f   (%zu)\n", c.name.c_str(), s.median, s.first_quartile,
                s.third_quartile, s.minimum, s.maximum, c.ratios.size());
  }
}

void add_options(CLI::App& app, Settings& settings) {
  const auto add = [&](const char* name, auto& value, const char* text) {
    app.add_option(name, value, text)->check(CLI::PositiveNumber)->capture_default_str();
  };
  add("--longest", settings.longest, "keys of a head; others have an eighth of them, and a 64th");
  add("--dim", settings.dim, "features of a token");
  add("--rounds", settings.rounds, "samples of each contender");
  add("--sample-ms", settings.sample_ms, "length of a sample");
  add("--max-seconds", settings.max_seconds, "no new round after this");
}

}  // namespace

int main(int argc, char** argv) {
  const Settings settings = parse_options(
      "Attention of a few queries against reading their cache once, as ratios within "
      "one run",
      add_options, argc, argv);
  std::printf("%-50s  median   quartiles      extremes\n", "time to read k and v / time of a call, one core");
  for (const Index n_k : {settings.longest / 64, settings.longest / 8, settings.longest}) {
    std::vector<Contender> contenders = contenders_of(settings, std::max<Index>(1, n_k));
    const auto share = std::chrono::duration<double>(settings.max_seconds / 3);
    measure(settings, contenders, Clock::now() + std::chrono::duration_cast<Clock::duration>(share));
    print(contenders);
  }
}
