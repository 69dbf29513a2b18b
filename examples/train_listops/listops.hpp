/// ListOps: nested lists of digits with an operator each, such as [MAX 2 9 [MIN 4 7 ] 0 ], whose value is a digit.
/// Nangia and Bowman 2018; the lengths and probabilities of Long Range Arena, Tay et al. 2021.
#pragma once

#include "common/families.hpp"

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace listops {

/// 0 is left to padding. kDigits + x is the digit x; kMin to kSumMod open a list, kClose ends it.
using Token = std::uint8_t;
inline constexpr Token kPadding = 0, kDigits = 1, kMin = 11, kMax = 12, kMedian = 13, kSumMod = 14, kClose = 15;
inline constexpr int kVocabulary = 16, kClasses = 10;

struct Example {
  std::vector<Token> tokens;
  int value;
};

/// The value of a digit or of a list: the minimum, the maximum, the median (rounded down) or the sum modulo 10 of what
/// is in it. Throws std::invalid_argument with the place where the tokens are none of these.
int evaluate(std::span<const Token> tokens);

/// "[MAX 2 9 [MIN 4 7 ] 0 ]" and its tokens. from_text throws std::invalid_argument with the word that it does not
/// know.
std::string to_text(std::span<const Token> tokens);
std::vector<Token> from_text(std::string_view text);

/// A tree's node is a list with p_operator, and a digit otherwise and at max_depth; a list has an operator and 2 to
/// max_arguments nodes, all uniformly drawn. Only trees of min_length to max_length tokens count.
struct Grammar {
  double p_operator = 0.25;
  int max_depth = 10, max_arguments = 10;
  std::size_t min_length = 500, max_length = 2000;
};

/// Draws trees until one has a length of the grammar's. The same on every platform.
class Generator {
 public:
  /// Throws std::invalid_argument with an option that is out of range.
  Generator(const Grammar& grammar, std::uint64_t seed);

  /// Throws std::runtime_error where not one tree in a million has such a length.
  Example operator()();

 private:
  void add_node(int depth);

  Grammar grammar_;
  families::Random random_;
  std::vector<Token> tokens_;
};

/// n of them, no two alike. Throws std::runtime_error where there seem to be no more.
std::vector<Example> distinct_examples(Generator& generator, std::size_t n);

/// Shares of the tests' values that guesses without a model get right: the commonest value of the training examples,
/// and their commonest value below the same first token, a list's operator.
struct Baselines {
  double majority, root_operator;
};

Baselines baselines(std::span<const Example> training, std::span<const Example> tests);

}  // namespace listops
