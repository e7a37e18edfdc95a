#!/usr/bin/env bash
# Make a small Debian to build the image on where no registry of images can be reached. Needs root and debootstrap.
#
# usage: docker/base.sh FILE.tar [SUITE [MIRROR]]
#   FILE.tar  gets the root file system; if it is there already, nothing is done
#   SUITE     default: bookworm, whose Python is 3.11
#   MIRROR    default: debootstrap's own
set -euo pipefail
# shellcheck source=docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1-}" in
  '') fail "which file? docker/base.sh FILE.tar" ;;
  -h | --help) show_help docker/base.sh ;;
  -*) fail "unknown option '$1'; see docker/base.sh --help" ;;
esac
tar=$(from_caller "$1")
[ ! -e "$tar" ] || exit 0
[ "$(id -u)" = 0 ] || fail "debootstrap needs root"
command -v debootstrap >/dev/null || fail "debootstrap is not on PATH; install it"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
debootstrap --variant=minbase "${2:-bookworm}" "$folder/root" ${3:+"$3"} >"$folder/log" || {
  tail -n 5 "$folder/log" >&2
  fail "debootstrap made no ${2:-bookworm}"
}
rm -rf "$folder"/root/var/cache/apt/archives/*.deb "$folder"/root/var/lib/apt/lists/*
mkdir -p "$(dirname "$tar")"
tar --numeric-owner --one-file-system --create --file "$tar.new" --directory "$folder/root" .
mv "$tar.new" "$tar"
