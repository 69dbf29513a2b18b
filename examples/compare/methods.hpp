/// What there is to know about each of the library's methods beyond its name: what it approximates, and the C++ that
/// calls it.
#pragma once

#include "compare/any_operator.hpp"

#include <attn/any_approximator.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace attn {

// Compiled once, in methods.cpp: all methods' kernels are most of what a file would compile.
extern template std::span<const MethodEntry<float>> methods<float>();
extern template AnyApproximator<float> make_approximator<float>(std::string_view, const MethodOptions&);

}  // namespace attn

/// The exact attention that a method computes or approximates, and its error is measured against.
enum class Target { softmax, gaussian };

std::string_view target_name(Target target);

struct MethodFacts {
  std::string_view name;
  Target target;
  bool exact;                       // takes no options
  std::string_view type, sized_by;  // the option whose number is tried
};

/// The facts about the method of that name, which must be one of the library's.
const MethodFacts& facts_of(std::string_view name);

/// The exact method of a target.
const MethodFacts& exact_method(Target target);

/// Whether a method's size is a number of near clusters; else it is one of landmarks.
bool has_clusters(std::string_view method);

/// " with 64 landmarks" or " with 16 near clusters"; nothing for a size of 0.
std::string with_size(std::string_view method, attn::Index size);

/// The method of that size, other options at their defaults. 0: an exact method, which has none, or one with as many
/// near clusters as it takes by itself.
attn::AnyApproximator<float> make_method(const MethodFacts& method, attn::Index size, std::uint64_t seed);

/// The matrix A of that method, out = A v; for an approximation whose shift or near clusters depend on v, with those
/// that it has at v. Exact attention takes no causal mask here. The inputs must outlive it.
AnyOperator matrix_of(const MethodFacts& method, attn::Index size, std::uint64_t seed, const attn::Inputs<float>& in,
                      attn::Context& context);

/// Which masks a call has.
struct MaskUse {
  attn::Causal causal = attn::Causal::none;
  bool keep_key = false, keep_query = false;
};

/// A line of C++ that computes what make_method's result computes, for q, k, v, out, context and, in a mask, keep.
std::string line_of_cpp(const MethodFacts& method, attn::Index size, std::uint64_t seed, const MaskUse& mask);
