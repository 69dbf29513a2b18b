#!/usr/bin/env bash
# What including attn costs a build: the seconds of processor time that four programs take to compile at -O2, in turn,
# and their ratio to the one with Eigen's header alone in the same round; medians over the rounds, and quartiles. The last is
# a file of a program that links attn::compiled, whose templates another file has.
# Usage: bench/compile_time.sh [ROUNDS]      CXX, CXXFLAGS and EIGEN_CFLAGS as set, else c++, none and pkg-config's.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common/comparison.sh
source "$(dirname "${BASH_SOURCE[0]}")/common/comparison.sh" "${1:-7}"

cat >"$folder/eigen.cpp" <<'CPP'
#include <Eigen/Core>
CPP
cat >"$folder/attn.cpp" <<'CPP'
#include <attn/attn.hpp>
CPP
cat >"$folder/call.cpp" <<'CPP'

attn::Matrix<float> nystrom(const attn::Matrix<float>& q, const attn::Matrix<float>& k, const attn::Matrix<float>& v) {
  return attn::attention(attn::Nystrom<float>{}, q, k, v);
}
CPP
cat "$folder/attn.cpp" "$folder/call.cpp" >"$folder/nystrom.cpp"
{ echo "#define ATTN_EXTERN_TEMPLATES" && cat "$folder/nystrom.cpp"; } >"$folder/compiled.cpp"

# Appends the seconds that compiling program $1 takes, user and system, to its list.
compile() {
  local TIMEFORMAT='%U %S' times
  # shellcheck disable=SC2086  # flags are lists of words
  times="$({ time "${CXX:-c++}" -std=c++20 -O2 ${CXXFLAGS:-} "-I$include" $eigen_cflags -c "$folder/$1.cpp" \
    -o "$folder/$1.o" 2>"$folder/errors"; } 2>&1)" || { cat "$folder/errors" >&2; exit 1; }
  awk '{ print $1 + $2 }' <<<"$times" >>"$folder/$1.times"
}

for ((round = 0; round < rounds; ++round)); do
  for program in eigen attn nystrom compiled; do compile "$program"; done
done

# A line for program $1, called $2: its median seconds, and its ratio to Eigen's of the same round: median, quartiles.
report() {
  paste "$folder/$1.times" "$folder/eigen.times" | awk '{ print $1 / $2 }' >"$folder/ratios"
  printf '%-46s %8.2f %6.2f  (%.2f-%.2f)\n' "$2" "$(median <"$folder/$1.times")" "$(median <"$folder/ratios")" \
    "$(quantile 0.25 <"$folder/ratios")" "$(quantile 0.75 <"$folder/ratios")"
}

printf '%-46s %8s %6s  (%s)\n' "$("${CXX:-c++}" --version | head -n 1), $rounds rounds" seconds ratio quartiles
report eigen "#include <Eigen/Core>"
report attn "#include <attn/attn.hpp>"
report nystrom "#include <attn/attn.hpp>, one Nystrom call"
report compiled "the same, linked with attn::compiled"
