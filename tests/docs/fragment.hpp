/// What a fragment of C++ in the documentation finds declared: 256 tokens of 32 features, room for a result and
/// gradients, and a batch of two sequences of n tokens, with 8 query heads of 64 features and 4 key heads.
#pragma once

#include <attn/attn.hpp>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <iostream>
#include <vector>

inline const attn::Matrix<float> q = 0.5f * attn::Matrix<float>::Random(256, 32);
inline const attn::Matrix<float> k = 0.5f * attn::Matrix<float>::Random(256, 32);
inline const attn::Matrix<float> v = attn::Matrix<float>::Random(256, 32);
inline attn::Matrix<float> out(256, 32), dq(256, 32), dk(256, 32), dv(256, 32);
inline const attn::Matrix<float> dout = attn::Matrix<float>::Random(256, 32);
inline attn::Context context;
inline const attn::SoftmaxAttention<float> method;

inline constexpr attn::Index n = 100;
inline std::vector<float> queries(2 * n * 8 * 64, 0.5f), keys(2 * n * 4 * 64, 0.5f), values = keys, results = queries;
inline float *const q_data = queries.data(), *const k_data = keys.data(), *const v_data = values.data();
inline float* const out_data = results.data();
inline const std::vector<std::uint8_t> keep_first(n, 1), keep_second(n, 1);
