/// Tokens that the studies run on: the families of the tests and examples, and two of their own.
#pragma once

#include "common/families.hpp"

#include <array>
#include <cstdint>
#include <string_view>

namespace accuracy {

using attn::Index;
using attn::Matrix;

inline constexpr Index kFeatures = 64;

template <class T>
using Tokens = families::Tokens<T>;

/// q = k = sqrt(1 - share) smooth + sqrt(share) noise, both of variance 1: from a spectrum that decays fast to one that
/// hardly decays, as tokens come to attend to themselves.
Tokens<double> mixed_tokens(Index n, double share, std::uint64_t seed);

inline constexpr std::array<std::string_view, 6> kFamilies{"smooth", "clusters", "words", "self", "init", "unit"};

/// Tokens of one of kFamilies: q, k, v (n, kFeatures). T is float or double.
template <class T>
Tokens<T> make_tokens(std::string_view family, Index n, std::uint64_t seed);

}  // namespace accuracy
