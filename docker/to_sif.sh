#!/usr/bin/env bash
# Convert an image to a .sif file, which Apptainer runs on clusters; the smoke test runs in it at the end.
#
# usage: docker/to_sif.sh [--flavour cuda|cpu] [--image IMAGE | --archive FILE | --pull REGISTRY/NAME@sha256:...]
#                         [--tool docker|podman|buildah] FILE.sif [-- OPTION...]
#   --flavour     of the image that docker/build.sh made of this code (default: cuda)
#   --image       another image that the tool has
#   --archive     an OCI archive, such as docker/build.sh --archive writes; needs nothing but Apptainer
#   --pull        an image in a registry; needs nothing but Apptainer
#   --tool        default: the first one that works here
#   -- OPTION...  for apptainer build, such as -- --fakeroot
set -euo pipefail
# shellcheck source=docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flavour=cuda tool='' image='' archive='' pulled='' sif=''
options=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) show_help docker/to_sif.sh ;;
    --flavour) flavour=$(value_of "$1" $# "${2-}"); shift ;;
    --image) image=$(value_of "$1" $# "${2-}"); shift ;;
    --archive) archive=$(value_of "$1" $# "${2-}"); shift ;;
    --pull) pulled=$(value_of "$1" $# "${2-}"); shift ;;
    --tool) tool=$(value_of "$1" $# "${2-}"); shift ;;
    --) shift; options+=("$@"); break ;;
    -*) fail "unknown option '$1'; see docker/to_sif.sh --help" ;;
    *)
      [ -z "$sif" ] || fail "one FILE.sif only, not both $sif and $1"
      sif=$1
      ;;
  esac
  shift
done

demand_flavour "$flavour"
[ -n "$sif" ] || fail "what is it to be called? docker/to_sif.sh FILE.sif"
sif=$(from_caller "$sif")
[ ! -e "$sif" ] || fail "$sif is there already; remove it first, or choose another name"
sources=("$image" "$archive" "$pulled")
given=0
for source in "${sources[@]}"; do [ -z "$source" ] || given=$((given + 1)); done
[ "$given" -le 1 ] || fail "give one of --image, --archive and --pull"
command -v apptainer >/dev/null || fail "apptainer is not on PATH; load its module, or convert on a machine that has it"

if [ -n "$archive" ]; then
  bootstrap=oci-archive from=$(from_caller "$archive")
  [ -f "$from" ] || fail "there is no archive $from"
elif [ -n "$pulled" ]; then
  bootstrap=docker from=$pulled
else
  tool=$(find_tool "$tool")
  image=${image:-$(image_of_code "$flavour")}
  demand_image "$tool" "$image"
  if [ "$tool" = docker ]; then
    bootstrap=docker-daemon from=$image
  else
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    bootstrap=oci-archive from=$folder/image.tar
    write_archive "$tool" "$image" "$from"
  fi
fi

apptainer build ${options[@]+"${options[@]}"} --build-arg "bootstrap=$bootstrap" --build-arg "from=$from" "$sif" Singularity.def
echo "$sif"
