#!/usr/bin/env bash
# Make a root of Debian sid, which has Apptainer and a recent Slurm, and run commands in it as an ordinary user.
#
# usage: docker/sid_root.sh FOLDER [--bind HOST:INSIDE[:ro]]... [COMMAND...]
#   FOLDER   gets the root in FOLDER/root; if it is there already, it is used as it is
#   --bind   a file or folder that COMMAND is to see
#
# Needs root and debootstrap. In it, this checkout is /pathfm (read-only), the user is 'pathfm', whose home stays in
# FOLDER/root, and /opt/host/bin/python is a host's Python: it has all that pathfm needs but torch.
# Every mount lies in a namespace of COMMAND's own and ends with it, whatever ends it; so do its processes.
#
# From the environment: DEBIAN_MIRROR (default: debootstrap's own), and pip's variables.
set -euo pipefail
# shellcheck source=docker/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

readonly user=pathfm python=python3.13 # not sid's default one: pathfm is for Python before 3.14
packages=(
  apptainer fuse-overlayfs fuse3 squashfuse uidmap
  munge slurm-client slurmctld slurmd
  ca-certificates git netbase procps "$python" "$python-venv"
)

# ---- making it

# once FILE WHAT COMMAND...: unless FILE says that it was done for WHAT
once() {
  local file=$1 what=$2
  shift 2
  if [ "$(cat "$file" 2>/dev/null)" = "$what" ]; then return; fi
  rm -f "$file"
  "$@" >"$file.log" 2>&1 || {
    tail -n 5 "$file.log" >&2
    fail "this went wrong; $file.log has it all"
  }
  printf '%s\n' "$what" >"$file"
}

make_root() {
  command -v debootstrap >/dev/null || fail "debootstrap is not on PATH; install it"
  rm -rf --one-file-system "$1/root" "$1/python"
  # in namespaces, because debootstrap mounts /proc and leaves it there when it is killed
  in_namespaces install_debian "$1/root"
}

install_debian() {
  debootstrap --variant=minbase --include="$(listed)" sid "$1" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"}
  rm -f "$1"/var/cache/apt/archives/*.deb
  mkdir "$1/pathfm" "$1/outside" "$1/wheels"
  chroot "$1" useradd --create-home --shell /bin/bash "$user" # with subordinate ids, for apptainer --fakeroot
  echo "127.0.0.1 localhost sid n1 n2" >"$1/etc/hosts"        # a name that does not resolve makes Slurm slow
  printf '[safe]\n\tdirectory = /pathfm\n' >"$1/etc/gitconfig"
}

listed() {
  local IFS=,
  echo "${packages[*]}"
}

# What pathfm depends on, without torch, which only the image has.
packages_of_host() {
  python3 -c 'if True:
    import tomllib
    needed = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]
    print("\n".join(package for package in needed if not package.startswith("torch")))'
}

# As the development environment has them.
versions() {
  grep -oE '^[A-Za-z0-9._-]+==[^ ;\\]+' docker/cpu.lock
}

# Wheels are fetched here, where pip knows its way; the root needs no network.
make_python() {
  rm -rf "$1/wheels"
  mkdir "$1/wheels"
  packages_of_host >"$1/wheels/packages.txt"
  versions >"$1/wheels/versions.txt"
  python3 -m pip download --quiet --disable-pip-version-check --python-version "${python#python}" \
    --only-binary=:all: --constraint "$1/wheels/versions.txt" --requirement "$1/wheels/packages.txt" --dest "$1/wheels"
  in_namespaces install_python "$1"
}

install_python() {
  local root=$1/root
  mount --bind "$1/wheels" "$root/wheels"
  chroot "$root" "$python" -m venv --clear /opt/host
  chroot "$root" /opt/host/bin/pip install --no-index --find-links=/wheels --requirement=/wheels/packages.txt
  echo /pathfm >"$root/opt/host/lib/$python/site-packages/pathfm.pth"
}

# ---- running in it

# A function of this script, with its processes and mounts in namespaces that end with it.
in_namespaces() {
  local script=$PWD/docker/sid_root.sh
  (cd "$caller" && unshare --mount --propagation=private --uts --ipc --pid --fork --kill-child --mount-proc \
    bash "$script" --in-namespaces "$@")
}

run() {
  local temporary
  temporary=$(mktemp -d "$1/tmp.XXXXXX")
  chmod 1777 "$temporary"
  # shellcheck disable=SC2064 # this folder, not one of a later call
  trap "rm -rf --one-file-system '$temporary'" EXIT
  in_namespaces run_inside "$1/root" "$temporary" "${@:2}"
}

# pivot_root, not chroot: in a chroot the kernel makes no user namespace, and Apptainer lives in one.
run_inside() {
  local root=$1 temporary=$2
  shift 2
  mount --bind "$root" "$root"
  mount_system "$root"
  mount --bind "$temporary" "$root/tmp"
  bind_into "$root" "$PWD:/pathfm:ro"
  while [ "${1-}" = --bind ]; do
    bind_into "$root" "$2"
    shift 2
  done
  hostname sid
  cd "$root"
  pivot_root . outside
  umount --lazy /outside
  cd "/home/$user"
  # no exec: the first process has to be one that reaps what the daemons of Slurm leave behind
  env --ignore-environment LANG=C.UTF-8 HOME="/home/$user" USER="$user" PATH=/usr/local/bin:/usr/bin:/usr/sbin \
    setpriv --reuid="$user" --regid="$user" --init-groups "$@"
}

mount_system() {
  mount -t proc proc "$1/proc"
  mount -t sysfs -o ro sysfs "$1/sys"
  mount -t tmpfs -o mode=755 tmpfs "$1/run"
  mount -t tmpfs -o mode=755 tmpfs "$1/dev"
  make_devices "$1/dev"
  mkdir "$1/dev/pts" "$1/dev/shm"
  mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts "$1/dev/pts"
  mount -t tmpfs -o mode=1777 tmpfs "$1/dev/shm"
}

make_devices() {
  local device name major minor
  # the last two are null devices, which the test cluster takes for GPUs
  for device in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0 fuse:10:229 tty0:1:3 tty1:1:3; do
    IFS=: read -r name major minor <<<"$device"
    mknod --mode=666 "$1/$name" c "$major" "$minor"
  done
  ln -s pts/ptmx "$1/ptmx"
  ln -s /proc/self/fd "$1/fd"
  ln -s fd/0 "$1/stdin"
  ln -s fd/1 "$1/stdout"
  ln -s fd/2 "$1/stderr"
}

# bind_into ROOT HOST:INSIDE[:ro]
bind_into() {
  local outside inside mode
  IFS=: read -r outside inside mode <<<"$2"
  outside=$(from_caller "$outside") inside=$1$inside
  [ -e "$outside" ] || fail "there is no $outside to bind"
  if [ -d "$outside" ]; then mkdir -p "$inside"; else mkdir -p "$(dirname "$inside")" && touch "$inside"; fi
  mount --bind "$outside" "$inside"
  [ -z "$mode" ] || mount -o "remount,bind,$mode" "$inside"
}

case "${1-}" in
  '') fail "which folder? docker/sid_root.sh FOLDER [COMMAND...]" ;;
  -h | --help) show_help docker/sid_root.sh ;;
  --in-namespaces) "${@:2}"; exit ;;
  -*) fail "unknown option '$1'; see docker/sid_root.sh --help" ;;
esac
[ "$(id -u)" = 0 ] || fail "debootstrap and mounts need root"
folder=$(realpath "$(from_caller "$1")")
mkdir -p "$folder"
once "$folder/debian" "$(listed)" make_root "$folder"
once "$folder/python" "$(packages_of_host; versions)" make_python "$folder"
[ $# -lt 2 ] || run "$folder" "${@:2}"
