// What both translation units of the program share.
#pragma once

#ifdef CONSUMER_SINGLE_HEADER
#include <attn_single.hpp>
#else
#include <attn/attn.hpp>
#endif

inline attn::Matrix<float> ones(attn::Index tokens) {
  return attn::Matrix<float>::Ones(tokens, 4);
}

/// Attention of three equal queries to equal keys, as many as v (n, d_v) has rows.
attn::Matrix<float> by_other_unit(const attn::Matrix<float>& v);
