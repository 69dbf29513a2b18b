# shellcheck shell=bash disable=SC2034  # what these set is used where it is sourced
# For scripts that compare programs: sets rounds from the first argument, include and eigen_cflags for the compiler, and
# folder, which is removed at the end.
rounds="$1"
if ! [[ "$rounds" =~ ^[1-9][0-9]*$ ]]; then
  echo "$(basename "$0"): the number of rounds should be positive, not $rounds" >&2
  exit 1
fi
include="$(cd "$(dirname "${BASH_SOURCE[0]}")/../../include" && pwd)"
eigen_cflags="${EIGEN_CFLAGS:-$(pkg-config --cflags eigen3)}"
folder="$(mktemp -d)"
trap 'rm -r "$folder"' EXIT

# The quantile $1 (0 to 1) of the numbers on standard input, one a line; between two of them, in proportion.
quantile() {
  sort -g | awk -v p="$1" '{ x[NR - 1] = $1 } END { at = p * (NR - 1); i = int(at); print x[i] + (at - i) * (x[i + (i < NR - 1)] - x[i]) }'
}

median() { quantile 0.5; }
