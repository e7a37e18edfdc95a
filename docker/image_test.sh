#!/usr/bin/env bash
# Build the CPU flavour on a Debian of debootstrap and run the smoke test in it: root and buildah, no registry of images.
#
# usage: docker/image_test.sh [OPTION of docker/build.sh]...
#
# The Debian and pip's downloads are kept below ${XDG_CACHE_HOME:-~/.cache}/pathfm; images are not, unless
# PATHFM_IMAGES names a folder for them: then a build takes what the last one made.
set -euo pipefail
# shellcheck source=docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1-}" in -h | --help) show_help docker/image_test.sh ;; esac
[ "$(id -u)" = 0 ] || fail "needs root, for debootstrap and for buildah without user namespaces"
command -v buildah >/dev/null || fail "buildah is not on PATH; install it"

cache=${XDG_CACHE_HOME:-$HOME/.cache}/pathfm
base_tar=$cache/bookworm.tar base=localhost/pathfm-base:bookworm
docker/base.sh "$base_tar"

mkdir -p "$cache/tmp"
images=${PATHFM_IMAGES:-$(mktemp -d "$cache/images.XXXXXX")}
clean_up() {
  # first what a build that was cut off left mounted
  awk -v below="$images/" 'index($2, below) == 1 { print $2 }' /proc/self/mounts | sort -r | xargs -r umount
  rm -rf --one-file-system "$images"
}
at_the_end() {
  # a disk that is full is not what buildah calls it: "read/write on closed pipe"
  [ "$1" = 0 ] || { echo "the image failed; this is the room that there was:" && df -h "$images" /var/tmp; } >&2
  [ -n "${PATHFM_IMAGES-}" ] || clean_up
}
trap 'at_the_end $?' EXIT
mkdir -p "$images"

overlay_works() {
  local folder=$images/overlay_test status=0
  mkdir -p "$folder"/{lower,upper,work,merged}
  mount -t overlay overlay -o "lowerdir=$folder/lower,upperdir=$folder/upper,workdir=$folder/work" "$folder/merged" \
    2>/dev/null && umount "$folder/merged" || status=1
  rm -rf "$folder"
  return "$status"
}
driver=${STORAGE_DRIVER-}
[ -n "$driver" ] || driver=$(if overlay_works; then echo overlay; else echo vfs; fi)
# vfs works anywhere, and copies the whole image for every layer: so it gets one
[ "$driver" != vfs ] || export BUILDAH_LAYERS=${BUILDAH_LAYERS:-false}

export CONTAINERS_STORAGE_CONF=$images/storage.conf BUILDAH_ISOLATION=chroot
export TMPDIR=$cache/tmp # buildah keeps pip's cache there
printf '[storage]\ndriver = "%s"\ngraphroot = "%s"\nrunroot = "%s"\n' \
  "$driver" "$images/root" "$images/run" > "$CONTAINERS_STORAGE_CONF"

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$base_tar" / >/dev/null
  buildah commit --quiet --rm "$container" "$base" >/dev/null
fi
docker/build.sh --tool buildah --flavour cpu --base "$base" "$@"
