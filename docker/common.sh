# What build.sh, push.sh and to_sif.sh share: the code at hand, the program at hand, names of images. To be sourced.
# shellcheck shell=bash

caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export PYTHONDONTWRITEBYTECODE=1

fail() {
  echo "error: $*" >&2
  exit 2
}

# The comment at the top of a script is its help.
show_help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
  exit 0
}

# value_of OPTION NUMBER_OF_WORDS_LEFT VALUE
value_of() {
  [ "$2" -gt 1 ] || fail "$1 needs a value"
  printf '%s' "$3"
}

# A path as the caller meant it.
from_caller() {
  case "$1" in /*) echo "$1" ;; *) echo "$caller/$1" ;; esac
}

demand_flavour() {
  [ -e "docker/torch-$1.lock" ] || fail "there is no flavour '$1'; choose cuda or cpu"
}

# The program that was asked for, else the first one that works here.
find_tool() {
  local tool
  if [ -n "$1" ]; then
    case "$1" in docker | podman | buildah) ;; *) fail "'$1' is none of docker, podman, buildah" ;; esac
    command -v "$1" >/dev/null || fail "$1 is not on PATH"
    echo "$1"
    return
  fi
  for tool in docker podman buildah; do
    if command -v "$tool" >/dev/null && "$tool" info >/dev/null 2>&1; then
      echo "$tool"
      return
    fi
  done
  fail "neither docker (with its daemon) nor podman nor buildah works here; install one of them"
}

version_of_code() {
  sed -n 's/^__version__ = "\(.*\)"$/\1/p' pathfm/__init__.py
}

# The commit, with -dirty where a file that goes into the image is not as committed.
commit_of_code() {
  local commit changes
  commit=$(git rev-parse HEAD 2>/dev/null) || { echo unknown; return; }
  changes=$(git status --porcelain -- .dockerignore Dockerfile configs docker pathfm)
  echo "$commit${changes:+-dirty}"
}

# pathfm:VERSION-FLAVOUR-COMMIT, of the code at hand.
image_of_code() {
  local commit
  commit=$(commit_of_code)
  local dirty=${commit#"${commit%-dirty}"}
  commit=${commit%-dirty}
  echo "pathfm:$(version_of_code)-$1-${commit:0:12}$dirty"
}

demand_image() {
  local tool=$1 image=$2
  "$tool" inspect --type image "$image" >/dev/null 2>&1 || fail "$tool has no image $image; docker/build.sh makes it"
}

demand_archives() {
  [ "$1" != docker ] || fail "docker writes no OCI archive; use podman or buildah, or docker/to_sif.sh, which asks docker"
}

# write_archive TOOL IMAGE FILE: an OCI archive, which Apptainer reads.
write_archive() {
  local tool=$1 image=$2 file=$3
  mkdir -p "$(dirname "$file")"
  rm -f "$file.new"
  case "$tool" in
    podman) podman save --quiet --format oci-archive --output "$file.new" "$image" ;;
    buildah) buildah push --quiet "$image" "oci-archive:$file.new:$image" ;;
  esac
  mv "$file.new" "$file"
}
