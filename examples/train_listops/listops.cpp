#include "train_listops/listops.hpp"

#include <algorithm>
#include <array>
#include <numeric>
#include <set>
#include <sstream>
#include <stdexcept>
#include <utility>

namespace listops {
namespace {

template <class... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

bool is_digit(Token token) {
  return token >= kDigits && token < kMin;
}
bool is_operator(Token token) {
  return token >= kMin && token < kClose;
}

int apply(Token operation, std::vector<int> x) {
  if (operation == kSumMod) return std::accumulate(x.begin(), x.end(), 0) % 10;
  std::ranges::sort(x);
  if (operation == kMin) return x.front();
  if (operation == kMax) return x.back();
  return (x[(x.size() - 1) / 2] + x[x.size() / 2]) / 2;
}

/// A list that is not yet closed.
struct Open {
  Token operation;
  std::vector<int> values{};
};

const std::array<std::string, kVocabulary> kWords{"<pad>", "0", "1", "2",    "3",    "4",    "5",   "6",
                                                  "7",     "8", "9", "[MIN", "[MAX", "[MED", "[SM", "]"};

}  // namespace

int evaluate(std::span<const Token> tokens) {
  std::vector<Open> open{{kPadding}};  // the outermost one takes the result
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const Token token = tokens[i];
    const bool ends_empty = token == kClose && (open.size() == 1 || open.back().values.empty());
    const bool follows_the_end = open.size() == 1 && !open.front().values.empty();
    if (ends_empty || follows_the_end || token == kPadding || token > kClose) {
      throw std::invalid_argument(text_of("listops: token ", i, " of ", tokens.size(), " does not belong there"));
    }
    if (is_operator(token)) {
      open.push_back({token});
    } else if (is_digit(token)) {
      open.back().values.push_back(token - kDigits);
    } else {
      const int value = apply(open.back().operation, open.back().values);
      open.pop_back();
      open.back().values.push_back(value);
    }
  }
  if (open.size() > 1 || open.front().values.empty()) {
    throw std::invalid_argument(text_of("listops: ", tokens.size(), " tokens end within a list, or there are none"));
  }
  return open.front().values.front();
}

std::string to_text(std::span<const Token> tokens) {
  std::string text;
  for (const Token token : tokens) text += (text.empty() ? "" : " ") + kWords.at(token);
  return text;
}

std::vector<Token> from_text(std::string_view text) {
  std::vector<Token> tokens;
  std::istringstream words{std::string(text)};
  for (std::string word; words >> word;) {
    const auto found = std::find(kWords.begin() + kDigits, kWords.end(), word);
    if (found == kWords.end())
      throw std::invalid_argument(text_of("listops: ", word, " is no digit, no operator and no ]"));
    tokens.push_back(static_cast<Token>(found - kWords.begin()));
  }
  return tokens;
}

Generator::Generator(const Grammar& grammar, std::uint64_t seed) : grammar_(grammar), random_(seed) {
  const auto check = [](bool good, const char* name, auto value, const std::string& wanted) {
    if (!good) throw std::invalid_argument(text_of("listops: ", name, " is ", value, ", should be ", wanted));
  };
  check(grammar.p_operator >= 0 && grammar.p_operator <= 1, "p_operator", grammar.p_operator, "from 0 to 1");
  check(grammar.max_depth >= 1, "max_depth", grammar.max_depth, "at least 1");
  check(grammar.max_arguments >= 2, "max_arguments", grammar.max_arguments, "at least 2");
  check(grammar.min_length >= 1, "min_length", grammar.min_length, "at least 1");
  check(grammar.max_length >= grammar.min_length, "max_length", grammar.max_length,
        text_of("at least min_length, ", grammar.min_length));
}

/// Stops adding where the tree is too long anyway.
void Generator::add_node(int depth) {
  if (tokens_.size() > grammar_.max_length) return;
  if (depth == grammar_.max_depth || random_.uniform() >= grammar_.p_operator) {
    tokens_.push_back(static_cast<Token>(kDigits + random_.below(10)));
    return;
  }
  tokens_.push_back(static_cast<Token>(kMin + random_.below(4)));
  const auto arguments = 2 + random_.below(grammar_.max_arguments - 1);
  for (attn::Index i = 0; i < arguments; ++i) add_node(depth + 1);
  tokens_.push_back(kClose);
}

Example Generator::operator()() {
  constexpr int kTries = 1'000'000;
  for (int i = 0; i < kTries; ++i) {
    tokens_.clear();
    add_node(1);
    if (tokens_.size() < grammar_.min_length || tokens_.size() > grammar_.max_length) continue;
    return {tokens_, evaluate(tokens_)};
  }
  throw std::runtime_error(
      text_of("listops: of ", kTries, " trees none has ", grammar_.min_length, " to ", grammar_.max_length, " tokens"));
}

std::vector<Example> distinct_examples(Generator& generator, std::size_t n) {
  constexpr std::size_t kRepetitions = 10'000;
  std::set<std::string> seen;
  std::vector<Example> examples;
  for (std::size_t repeated = 0; examples.size() < n;) {
    Example example = generator();
    if (seen.emplace(example.tokens.begin(), example.tokens.end()).second) {
      examples.push_back(std::move(example));
      repeated = 0;
    } else if (++repeated > kRepetitions) {
      throw std::runtime_error(text_of("listops: found ", examples.size(), " different examples, not ", n));
    }
  }
  return examples;
}

Baselines baselines(std::span<const Example> training, std::span<const Example> tests) {
  using Counts = std::array<int, kClasses>;
  const auto commonest = [](const Counts& counts) {
    return static_cast<int>(std::ranges::max_element(counts) - counts.begin());
  };
  Counts all{};
  std::array<Counts, kVocabulary> by_first{};
  for (const Example& example : training) {
    ++all[static_cast<std::size_t>(example.value)];
    ++by_first[example.tokens.front()][static_cast<std::size_t>(example.value)];
  }
  double majority = 0, root_operator = 0;
  for (const Example& test : tests) {
    majority += test.value == commonest(all) ? 1 : 0;
    root_operator += test.value == commonest(by_first[test.tokens.front()]) ? 1 : 0;
  }
  const auto n = static_cast<double>(tests.size());
  return {majority / n, root_operator / n};
}

}  // namespace listops
