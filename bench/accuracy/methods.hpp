/// The library's methods as the studies use them, compiled once.
#pragma once

#include "accuracy/tokens.hpp"

#include <attn/any_approximator.hpp>

#include <cstdint>
#include <string_view>

namespace accuracy {

/// A method by its name, in float, with m landmarks or, for multipole, near clusters, its other options at their
/// defaults.
attn::AnyApproximator<float> make_method(std::string_view name, Index m, std::uint64_t seed);

/// The matrix A of a method: out = A v. That of shifted-nystrom is frozen at the tokens' v.
Matrix<float> method_matrix(std::string_view name, Index num_landmarks, std::uint64_t seed,
                            const Tokens<float>& tokens);

/// That of ShiftedNystrom in any mode; in row mode frozen at v.
Matrix<float> shifted_matrix(attn::ShiftMode mode, Index num_landmarks, const Tokens<float>& tokens);

}  // namespace accuracy
