/// Queries, keys and values of trained models, read from folders.
#pragma once

#include "accuracy/tokens.hpp"

#include <string>
#include <vector>

namespace accuracy {

/// A head of a trained model; its name starts with the model's and an underscore.
struct Head {
  std::string name;
  bool causal;  ///< whether its model masks the future
  Tokens<float> tokens;

  attn::Inputs<float> inputs() const;
  /// "dinov2" of "dinov2_l5h4".
  std::string model() const { return name.substr(0, name.find('_')); }
};

/// The heads that the index.json of each folder lists, of at most so many keys. Throws std::runtime_error where a file
/// cannot be read.
std::vector<Head> read_heads(const std::vector<std::string>& folders, Index longest);

/// n tokens: the given ones over and over, each with a noise of its own, independent normal of a tenth of their root
/// mean square in q, k and v.
Tokens<float> tiled(const Tokens<float>& tokens, Index n, std::uint64_t seed);

}  // namespace accuracy
