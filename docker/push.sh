#!/usr/bin/env bash
# Push an image to a registry, and print and record the digest by which clusters should name it.
#
# usage: docker/push.sh [--flavour cuda|cpu] [--image IMAGE] [--latest] [--tool docker|podman|buildah] REGISTRY/NAME
#   REGISTRY/NAME  where to; the tag is that of the image, VERSION-FLAVOUR-COMMIT
#   --flavour      of the image that docker/build.sh made of this code (default: cuda)
#   --image        push this one instead
#   --latest       then let the tag latest-FLAVOUR point to it as well
#   --tool         default: the first one that works here
#
# A line `REGISTRY/NAME:TAG REGISTRY/NAME@sha256:...` is added to build/image_digest.txt.
set -euo pipefail
# shellcheck source=docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

flavour=cuda tool='' image='' latest=no destination=''
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) show_help docker/push.sh ;;
    --flavour) flavour=$(value_of "$1" $# "${2-}"); shift ;;
    --image) image=$(value_of "$1" $# "${2-}"); shift ;;
    --latest) latest=yes ;;
    --tool) tool=$(value_of "$1" $# "${2-}"); shift ;;
    -*) fail "unknown option '$1'; see docker/push.sh --help" ;;
    *)
      [ -z "$destination" ] || fail "one REGISTRY/NAME only, not both $destination and $1"
      destination=$1
      ;;
  esac
  shift
done

demand_flavour "$flavour"
[ -n "$destination" ] || fail "where to? docker/push.sh REGISTRY/NAME"
[[ $destination == */* ]] || fail "'$destination' names no registry; give REGISTRY/NAME"
[[ ${destination##*/} != *[:@]* ]] || fail "'$destination' has a tag; it gets that of the image"
tool=$(find_tool "$tool")
image=${image:-$(image_of_code "$flavour")}
[[ ${image##*/} == *:* ]] || fail "the image '$image' has no tag"
tag=${image##*:}
[ "$tag" != latest ] || fail "'latest' says nothing about what is inside; give the image a tag"
demand_image "$tool" "$image"

# Pushes under a tag, and prints the digest.
push() {
  local target=$destination:$1 digest
  if [ "$tool" = docker ]; then
    docker tag "$image" "$target"
    docker push --quiet "$target" >/dev/null
    docker inspect --type image --format '{{join .RepoDigests "\n"}}' "$target" | sed -n "s|^$destination@||p" | head -n 1
  else
    digest=$(mktemp)
    "$tool" push --quiet --digestfile "$digest" "$image" "docker://$target" >/dev/null
    cat "$digest"
    rm "$digest"
  fi
}
digest=$(push "$tag")
[[ $digest == sha256:* ]] || fail "$tool pushed $destination:$tag and told no digest"
[ "$latest" = no ] || push "latest-$flavour" >/dev/null

mkdir -p build
echo "$destination:$tag $destination@$digest" >> build/image_digest.txt
echo "$destination@$digest"
