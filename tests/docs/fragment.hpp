/// What a fragment of C++ in the documentation finds declared: 256 tokens of 32 features, and room for a result.
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
inline attn::Matrix<float> out(256, 32);
inline attn::Context context;
inline const attn::SoftmaxAttention<float> method;
