#!/usr/bin/env bash
# Build the image, try it, and name it pathfm:VERSION-FLAVOUR-COMMIT (with -dirty where files are not as committed).
#
# usage: docker/build.sh [--flavour cuda|cpu] [--base IMAGE] [--compiler] [--archive FILE]
#                        [--tool docker|podman|buildah] [--no-smoke] [--smoke-option=OPTION]... [-- OPTION...]
#   --flavour       which torch: for NVIDIA GPUs (cuda, the default), or the small one without (cpu)
#   --base          in place of the Dockerfile's BASE_IMAGE: Ubuntu 24.04 or Debian 12
#   --compiler      with gcc, which parallel.compile=true needs at run time
#   --archive       then write the image to FILE as an OCI archive (podman, buildah)
#   --tool          default: the first one that works here
#   --no-smoke      do not run docker/smoke.py in it
#   --smoke-option  for the container that runs it, as in --smoke-option=--gpus=all
#   -- OPTION...    for the tool's own build, such as -- --no-cache
#
# From the environment, for a network with its own ways: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL (package indices),
# PIP_FIND_LINKS (a folder of wheels), PIP_CERT (a certificate). None of them is left in the image.
# buildah's own: BUILDAH_ISOLATION, CONTAINERS_STORAGE_CONF, BUILDAH_LAYERS=false (one layer in place of several).
set -euo pipefail
# shellcheck source=docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flavour=cuda base='' tool='' archive='' smoke=yes
build_options=() smoke_options=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) show_help docker/build.sh ;;
    --flavour) flavour=$(value_of "$1" $# "${2-}"); shift ;;
    --base) base=$(value_of "$1" $# "${2-}"); shift ;;
    --compiler) build_options+=(--build-arg COMPILER=gcc) ;;
    --archive) archive=$(value_of "$1" $# "${2-}"); shift ;;
    --tool) tool=$(value_of "$1" $# "${2-}"); shift ;;
    --no-smoke) smoke=no ;;
    --smoke-option=*) smoke_options+=("${1#*=}") ;;
    --) shift; build_options+=("$@"); break ;;
    *) fail "unknown option '$1'; see docker/build.sh --help" ;;
  esac
  shift
done

demand_flavour "$flavour"
tool=$(find_tool "$tool")
if [ -n "$archive" ]; then
  demand_archives "$tool"
  archive=$(from_caller "$archive")
fi

image=$(image_of_code "$flavour")
lock_hash=$(python3 docker/locks.py hash "$flavour")
[ -z "$base" ] || build_options+=(--build-arg "BASE_IMAGE=$base")
build_options+=(
  --build-arg "TORCH_FLAVOUR=$flavour"
  --build-arg "COMMIT=$(commit_of_code)"
  --build-arg "VERSION=$(version_of_code)"
  --build-arg "LOCK_HASH=$lock_hash"
)
# without their values, which the tool takes from the environment: they may hold a password
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do
  [ -z "${!name-}" ] || build_options+=(--build-arg "$name")
done
[ -z "${PIP_CERT-}" ] || build_options+=(--secret "id=certificates,src=$PIP_CERT")
[ ! -d "${PIP_FIND_LINKS-}" ] || build_options+=(--build-context "wheels=$PIP_FIND_LINKS")

mkdir -p build
identity=build/image_id.txt
case "$tool" in
  buildah) buildah build --layers="${BUILDAH_LAYERS:-true}" --iidfile "$identity" "${build_options[@]}" . ;;
  *) "$tool" build --iidfile "$identity" "${build_options[@]}" . ;;
esac
built=$(cat "$identity")

# As a cluster runs it: a stranger without a home, an image that cannot be written, batches in shared memory.
try_in_container() {
  local command=(python /opt/pathfm/code/docker/smoke.py) stranger=65534:65534
  if [ "$tool" = buildah ]; then
    local container status=0
    container=$(buildah from --pull-never "$built")
    buildah run --user "$stranger" ${smoke_options[@]+"${smoke_options[@]}"} "$container" -- "${command[@]}" || status=$?
    buildah rm "$container" >/dev/null
    return "$status"
  fi
  "$tool" run --rm --user "$stranger" --read-only --tmpfs /tmp --ipc=host \
    ${smoke_options[@]+"${smoke_options[@]}"} "$built" "${command[@]}"
}
if [ "$smoke" = yes ]; then
  try_in_container || fail "the image fails its smoke test and gets no name"
fi

"$tool" tag "$built" "$image"
echo "image $image ($built), lock $lock_hash"
if [ -n "$archive" ]; then
  write_archive "$tool" "$image" "$archive"
  echo "archive $archive"
fi
