#!/usr/bin/env bash
# Installs the Debian packages of cmake/apt-packages.txt that are missing. With all of them installed it changes nothing and needs no network.
# Usage: cmake/setup.sh [--with-torch]      --with-torch: those of the examples with libtorch, too
set -euo pipefail

folder="$(dirname "${BASH_SOURCE[0]}")"
lists=("$folder/apt-packages.txt")
case "${*}" in
  "") ;;
  --with-torch) lists+=("$folder/apt-packages-torch.txt") ;;
  *)
    echo "setup.sh: takes nothing or --with-torch, not: $*" >&2
    exit 1
    ;;
esac
mapfile -t packages < <(cat "${lists[@]}" | grep -Ev '^[[:space:]]*(#|$)')

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
  echo "setup.sh: this is no Debian system; please install what these Debian packages hold: ${packages[*]}" >&2
  exit 1
fi

missing=()
for package in "${packages[@]}"; do
  status="$(dpkg-query --show --showformat='${db:Status-Status}\n' "$package" 2>/dev/null || true)"
  grep -qx installed <<<"$status" || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
  echo "setup.sh: everything is installed"
  exit 0
fi

as_root=()
if ((EUID != 0)); then
  if ! command -v sudo >/dev/null; then
    echo "setup.sh: run it as root, or install these yourself: ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi

echo "setup.sh: installing ${missing[*]}"
"${as_root[@]}" apt-get update -q
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
