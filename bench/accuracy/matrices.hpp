/// What each method does to 96 tokens, as matrices, for the pictures of docs/.
#pragma once

#include <nlohmann/json_fwd.hpp>

namespace accuracy {

/// {method: {matrix: [[...], ...], ...}, ...}: factors and results as the methods' pages name them, and the tokens that
/// are landmarks.
nlohmann::ordered_json method_matrices();

}  // namespace accuracy
