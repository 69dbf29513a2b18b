#include "train_listops/listops.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using listops::Example;
using listops::Generator;
using listops::Grammar;
using listops::Token;

int value_of(const std::string& text) {
  return listops::evaluate(listops::from_text(text));
}

TEST(ListOps, KnownValues) {
  EXPECT_EQ(value_of("7"), 7);
  EXPECT_EQ(value_of("[MIN 3 1 9 ]"), 1);
  EXPECT_EQ(value_of("[MAX 3 1 9 ]"), 9);
  EXPECT_EQ(value_of("[MED 9 1 3 ]"), 3);
  EXPECT_EQ(value_of("[MED 9 1 4 3 ]"), 3);  // 3.5, rounded down
  EXPECT_EQ(value_of("[SM 9 8 5 ]"), 2);
  EXPECT_EQ(value_of("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]"), 5);
  EXPECT_EQ(value_of("[SM [SM 6 6 ] [MAX 0 [MIN 8 7 ] ] [MED 2 2 ] ]"), 1);
}

TEST(ListOps, RefusesWhatIsNoExpression) {
  for (const char* text : {"", "]", "[MAX ]", "[MAX 1", "1 2", "[MIN 1 ] 2", "[MIN 1 ] ]"}) {
    EXPECT_THROW(static_cast<void>(value_of(text)), std::invalid_argument) << text;
  }
  EXPECT_THROW(static_cast<void>(listops::evaluate(std::vector<Token>{listops::kPadding})), std::invalid_argument);
  EXPECT_THROW(static_cast<void>(listops::from_text("[AVG 1 2 ]")), std::invalid_argument);
}

/// What a tree is made of, read off its text.
struct Shape {
  int depth = 0;
  std::size_t fewest_arguments = 99, most_arguments = 0;
};

Shape shape_of(const Example& example) {
  Shape shape{.depth = 1};
  std::vector<std::size_t> arguments;
  for (const Token token : example.tokens) {
    if (token == listops::kClose) {
      shape.fewest_arguments = std::min(shape.fewest_arguments, arguments.back());
      shape.most_arguments = std::max(shape.most_arguments, arguments.back());
      arguments.pop_back();
      continue;
    }
    if (!arguments.empty()) ++arguments.back();
    shape.depth = std::max(shape.depth, static_cast<int>(arguments.size()) + 1);
    if (token >= listops::kMin) arguments.push_back(0);
  }
  return shape;
}

TEST(ListOps, RespectsTheGrammar) {
  const Grammar grammar{.max_depth = 4, .max_arguments = 6, .min_length = 20, .max_length = 40};
  Generator generator(grammar, 1);
  std::size_t shortest = 99, longest = 0, fewest = 99, most = 0;
  int depth = 0;
  for (int i = 0; i < 2000; ++i) {
    const Example example = generator();
    EXPECT_EQ(listops::evaluate(listops::from_text(listops::to_text(example.tokens))), example.value);
    const Shape shape = shape_of(example);
    shortest = std::min(shortest, example.tokens.size());
    longest = std::max(longest, example.tokens.size());
    fewest = std::min(fewest, shape.fewest_arguments);
    most = std::max(most, shape.most_arguments);
    depth = std::max(depth, shape.depth);
  }
  EXPECT_EQ(shortest, 20U);
  EXPECT_EQ(longest, 40U);
  EXPECT_EQ(fewest, 2U);
  EXPECT_EQ(most, 6U);
  EXPECT_EQ(depth, 4);
}

TEST(ListOps, MakesTheFullLengths) {
  Generator generator({}, 2);
  for (int i = 0; i < 20; ++i) {
    const Example example = generator();
    EXPECT_GE(example.tokens.size(), 500U);
    EXPECT_LE(example.tokens.size(), 2000U);
    EXPECT_LE(shape_of(example).depth, 10);
  }
}

TEST(ListOps, DrawsOperatorsAndDigitsAlike) {
  Generator generator({.max_depth = 2, .min_length = 1, .max_length = 100}, 3);
  std::map<Token, int> first;
  constexpr int kDraws = 40'000;
  for (int i = 0; i < kDraws; ++i) ++first[generator().tokens.front()];
  for (int token = listops::kDigits; token < listops::kClose; ++token) {
    const double p = token < listops::kMin ? 0.75 / 10 : 0.25 / 4;
    EXPECT_NEAR(first[static_cast<Token>(token)], p * kDraws, 5 * std::sqrt(p * kDraws));
  }
}

/// On every platform, so that results can be compared.
TEST(ListOps, ASeedGivesTheSameExamples) {
  const Grammar grammar{.min_length = 10, .max_length = 40};
  Generator one(grammar, 4), same(grammar, 4), other(grammar, 5);
  const auto a = listops::distinct_examples(one, 50), b = listops::distinct_examples(same, 50);
  const auto c = listops::distinct_examples(other, 50);
  EXPECT_TRUE(std::ranges::equal(a, b, {}, &Example::tokens, &Example::tokens));
  EXPECT_FALSE(std::ranges::equal(a, c, {}, &Example::tokens, &Example::tokens));
  EXPECT_EQ(listops::to_text(a.front().tokens),
            "[SM [MAX 6 7 ] 6 [MAX 2 8 [MED 6 3 5 [MAX 7 [MAX 2 8 0 1 0 8 4 1 ] ] ] 7 8 ] ]");
}

TEST(ListOps, RepeatsNoExample) {
  Generator generator({.min_length = 4, .max_length = 5}, 6);
  const auto examples = listops::distinct_examples(generator, 3000);
  std::set<std::string> different;
  for (const Example& example : examples) different.insert(listops::to_text(example.tokens));
  EXPECT_EQ(different.size(), examples.size());
  Generator digits({.min_length = 1, .max_length = 1}, 7);
  EXPECT_EQ(listops::distinct_examples(digits, 10).size(), 10U);
  EXPECT_THROW(static_cast<void>(listops::distinct_examples(digits, 11)), std::runtime_error);
}

TEST(ListOps, RefusesOptionsOutOfRange) {
  EXPECT_THROW(Generator({.p_operator = 1.5}, 0), std::invalid_argument);
  EXPECT_THROW(Generator({.max_depth = 0}, 0), std::invalid_argument);
  EXPECT_THROW(Generator({.max_arguments = 1}, 0), std::invalid_argument);
  EXPECT_THROW(Generator({.min_length = 30, .max_length = 20}, 0), std::invalid_argument);
  Generator impossible({.min_length = 2, .max_length = 2}, 0);
  EXPECT_THROW(static_cast<void>(impossible()), std::runtime_error);
}

TEST(ListOps, Baselines) {
  const auto examples = [](const std::vector<std::string>& texts) {
    std::vector<Example> all;
    for (const std::string& text : texts) all.push_back({listops::from_text(text), value_of(text)});
    return all;
  };
  const auto training = examples({"[MAX 9 1 ]", "[MAX 9 2 ]", "[MAX 8 2 ]", "[MIN 0 1 ]", "[MIN 0 2 ]", "[SM 8 1 ]"});
  const auto tests = examples({"[MAX 9 3 ]", "[MAX 4 3 ]", "[MIN 0 3 ]", "[SM 2 3 ]"});
  const auto [majority, root_operator] = listops::baselines(training, tests);
  EXPECT_EQ(majority, 0.25);       // 9
  EXPECT_EQ(root_operator, 0.50);  // 9, 9, 0, 9
}

}  // namespace
