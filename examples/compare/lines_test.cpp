/// Every line that can be recommended compiles, and computes bit by bit what the method computes that was measured.
#include "common/families.hpp"
#include "compare/methods.hpp"

#include <attn/attn.hpp>

#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

int main() {
  constexpr attn::Index kTokens = 90;
  const auto tokens = families::make_tokens<float>(families::Family::smooth, {kTokens, kTokens, 8, 5});
  const attn::Matrix<float>&q = tokens.q, &k = tokens.k, &v = tokens.v;
  std::vector<std::uint8_t> keep(kTokens, 1);
  for (std::size_t i = 0; i < keep.size(); i += 7) keep[i] = 0;
  attn::Context context;
  attn::Matrix<float> out(kTokens, 5);

  // out as text, or why there is none
  const auto result = [&](const auto& call) -> std::string {
    try {
      out.setZero();
      call();
      return {reinterpret_cast<const char*>(out.data()), static_cast<std::size_t>(out.size()) * sizeof(float)};
    } catch (const std::invalid_argument& refusal) {
      return refusal.what();
    }
  };
  int lines = 0, wrong = 0;
  const auto check = [&](std::string_view name, attn::Index size, const MaskUse& use, const auto& line) {
    attn::Inputs<float> in{q, k, v, {.causal = use.causal}};
    if (use.keep_key) in.mask.keep_key = keep;
    if (use.keep_query) in.mask.keep_query = keep;
    const auto measured = make_method(facts_of(name), size, 3);
    ++lines;
    if (result(line) == result([&] { measured.forward(in, out, context); })) return;
    std::cout << "another result than " << name << "'s: line " << lines << " of lines.inc\n";
    ++wrong;
  };
#include "lines.inc"
  std::cout << lines << " lines, " << wrong << " wrong\n";
  return lines > 0 && wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
