/// The tokens to compare methods on: those of one or more heads, from files or made.
#pragma once

#include "compare/options.hpp"

#include <attn/heads.hpp>
#include <attn/mask.hpp>
#include <attn/matrix.hpp>

#include <cstdint>
#include <string>
#include <vector>

/// q (batch, heads, n_q, d), k (batch, kv_heads, n_k, d), v (batch, kv_heads, n_k, d_v), keep (batch, n_k) or empty,
/// all in C order. Where there are fewer heads of k and v, each serves heads / kv_heads successive heads of q.
struct Sequences {
  std::string description;
  attn::Index batch = 1, heads = 1, kv_heads = 1, n_q = 0, n_k = 0, d = 0, d_v = 0;
  std::vector<float> q, k, v;
  std::vector<std::uint8_t> keep;
  attn::Causal causal = attn::Causal::none;

  /// All heads of all batch items.
  attn::Index num_heads() const { return batch * heads; }

  /// A view of one of them. Where n_q = n_k, a dropped token is neither a key nor a query.
  attn::Inputs<float> inputs(attn::Index head) const;

  /// @{ All heads, as multi_head takes them, and the masks of the batch items.
  attn::HeadsView<const float> all_q() const { return attn::head_major(q.data(), batch, heads, n_q, d); }
  attn::HeadsView<const float> all_k() const { return attn::head_major(k.data(), batch, kv_heads, n_k, d); }
  attn::HeadsView<const float> all_v() const { return attn::head_major(v.data(), batch, kv_heads, n_k, d_v); }
  std::vector<attn::Mask> masks() const;
  /// @}

  bool masks_queries() const { return !keep.empty() && n_q == n_k; }
};

/// What options ask for. Throws std::runtime_error, which names the file, what was expected and what was found, for
/// files that cannot be read, do not fit one another, or hold a NaN or an infinity in a token that is kept, and for
/// more made tokens than this machine has memory for.
Sequences load(const Options& options);
