#!/usr/bin/env bash
# What forgetting -march=native costs: the milliseconds that three calls take when compiled for SSE2, for AVX2 and for
# this machine, and their ratios to the last. The programs run in turn; medians over the rounds. float, one thread.
# Usage: bench/instruction_sets.sh [ROUNDS]      CXX and EIGEN_CFLAGS as set, else c++ and pkg-config's.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common/comparison.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/comparison.sh" "${1:-9}"

cat >"$folder/calls.cpp" <<'CPP'
#include <attn/attn.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <iostream>

void report(const char* name, attn::Index n, const auto& method) {
  constexpr attn::Index d = 64;
  const attn::Matrix<float> q = attn::Matrix<float>::Random(n, d), k = attn::Matrix<float>::Random(n, d);
  const attn::Matrix<float> v = attn::Matrix<float>::Random(n, d);
  attn::Matrix<float> out(n, d);
  attn::Context context;
  std::array<double, 5> ms{};
  for (double& one : ms) {
    const auto start = std::chrono::steady_clock::now();
    method.forward({.q = q, .k = k, .v = v}, out, context);
    one = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  std::sort(ms.begin(), ms.end());
  std::cout << name << ' ' << ms[ms.size() / 2] << '\n';
}

int main() {
  report("softmax,n=2048", 2048, attn::SoftmaxAttention<float>{});
  report("nystrom,n=16384,m=64", 16384, attn::Nystrom<float>{{.num_landmarks = 64}});
  report("skyformer,n=16384,m=128", 16384, attn::Skyformer<float>{{.num_landmarks = 128}});
}
CPP

declare -A flags=([SSE2]="-march=x86-64" [AVX2]="-march=haswell" [native]="-march=native")
targets=(SSE2 AVX2 native)
for target in "${targets[@]}"; do
  # shellcheck disable=SC2086  # flags are lists of words
  "${CXX:-c++}" -std=c++20 -O3 -DNDEBUG "${flags[$target]}" "-I$include" $eigen_cflags "$folder/calls.cpp" \
    -o "$folder/$target"
done
for ((round = 0; round < rounds; ++round)); do
  for target in "${targets[@]}"; do "$folder/$target" >>"$folder/$target.times"; done
done

# The median of call $2 compiled for target $1.
median_of() {
  awk -v call="$2" '$1 == call { print $2 }' "$folder/$1.times" | median
}

printf '%-26s %9s %9s %9s  %s\n' "d = 64; ms" "${targets[@]}" "ratios to native"
head -n 3 "$folder/native.times" | while read -r call _; do
  printf '%s %s %s %s\n' "$call" "$(median_of SSE2 "$call")" "$(median_of AVX2 "$call")" "$(median_of native "$call")" |
    awk '{ printf "%-26s %9.2f %9.2f %9.2f  %.2f %.2f\n", $1, $2, $3, $4, $2 / $4, $3 / $4 }'
done
