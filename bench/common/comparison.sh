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

# The median of the numbers on standard input, one a line.
median() {
  sort -g | awk '{ x[NR] = $1 } END { print (x[int((NR + 1) / 2)] + x[int(NR / 2) + 1]) / 2 }'
}
