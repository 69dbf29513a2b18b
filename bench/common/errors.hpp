/// How far an output is from exact attention, by the tests' oracle in double.
#pragma once

#include "tokens.hpp"

#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <string_view>

namespace bench {

/// Relative errors in the Frobenius norm, on up to 8 rows: of the output, and of the trivial answer, every row the mean
/// of v times the row's sum of weights. A method that is not better than that has found nothing.
struct Errors {
  double out, mean_v;
};

/// Against exact attention of the kernel that the method of this name approximates. O(n d) time.
Errors errors(std::string_view method, const Tokens<double>& tokens, attn::Causal causal = attn::Causal::none);

template <class T>
Errors errors(std::string_view method, const Tokens<T>& t, attn::Causal causal = attn::Causal::none) {
  const auto wide = [](const attn::Matrix<T>& m) -> attn::Matrix<double> { return m.template cast<double>(); };
  return errors(method, Tokens<double>{wide(t.q), wide(t.k), wide(t.v), wide(t.out)}, causal);
}

}  // namespace bench
