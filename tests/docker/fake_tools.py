"""docker, podman, buildah, apptainer and git as scripts that write down what they are told, and a copy of the code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import locks

from pathfm import __version__

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_DIGEST = f"sha256:{'d' * 64}"

# As much of the real ones as the scripts look at: what they print, and the files that they are asked to write.
_TOOL = """#!/usr/bin/env bash
[ -e "$TOLD/broken.{name}" ] && exit 1
[ "$1" = info ] && exit
[ "$1" = inspect ] && [ -e "$TOLD/no_image" ] && exit 1
printf '%q ' {name} "$@" | sed 's/ $//' >> "$TOLD/commands"; echo >> "$TOLD/commands"
words=("$@")
for number in "${{!words[@]}}"; do
  case "${{words[number]}}" in
    --iidfile) echo sha256:built > "${{words[number + 1]}}" ;;
    --digestfile) echo {digest} > "${{words[number + 1]}}" ;;
    --output) echo archive > "${{words[number + 1]}}" ;;
    oci-archive:*) archive=${{words[number]#*:}}; echo archive > "${{archive%%:*}}" ;;
    *smoke.py) [ ! -e "$TOLD/unfit" ] || exit 1 ;;
  esac
done
[ "$1" = from ] && echo container-1
[ "$1 ${{4-}}" = 'inspect --format' ] && echo "registry.local/group/pathfm@{digest}"
exit 0
"""
_GIT = f"""#!/bin/sh
case "$1" in
  rev-parse) echo {COMMIT} ;;
  status) cat "$TOLD/changes" 2>/dev/null || true ;;
esac
"""


class Tools:
    """A folder of programs that is all that a script finds, beside the system's own."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.folder, self.tree, programs = folder, folder / "tree", folder / "bin"
        programs.mkdir()
        for name in names:
            self._program(programs / name, _TOOL.format(name=name, digest=_DIGEST))
        self._program(programs / "git", _GIT)
        shutil.copytree(ROOT / "docker", self.tree / "docker", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "Singularity.def", self.tree)
        (self.tree / "pathfm").mkdir()
        shutil.copy(ROOT / "pathfm" / "__init__.py", self.tree / "pathfm")
        for needed in ("bash", "cat", "dirname", "env", "head", "mkdir", "mktemp", "mv", "rm", "sed"):
            (programs / needed).symlink_to(str(shutil.which(needed)))
        (programs / "python3").symlink_to(Path(sys.executable).resolve())

    def run(self, script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """A script of docker/, started in the copy's folder."""
        known = {"PATH": str(self.folder / "bin"), "TOLD": str(self.folder), "HOME": str(self.folder)}
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        command = [str(self.tree / "docker" / script), *words]
        return subprocess.run(
            command,
            cwd=self.tree,
            env={**known, "TMPDIR": str(temporary), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def mark(self, name: str, text: str = "") -> None:
        """`broken.NAME`, `no_image`, `unfit`: how things stand; `changes`: what git says of the work tree."""
        (self.folder / name).write_text(text)

    def commands(self) -> list[str]:
        """What was run, with names in the place of what depends on the day."""
        told = self.folder / "commands"
        return self.plain(told.read_text()).splitlines() if told.exists() else []

    def plain(self, text: str) -> str:
        names = {str(self.tree): "TREE", str(self.folder / "tmp"): "TMP", COMMIT: "COMMIT", COMMIT[:12]: "COMMIT12"}
        names |= {locks.lock_hash(flavour): f"LOCK_{flavour.upper()}" for flavour in locks.FLAVOURS}
        names |= {_DIGEST: "DIGEST", __version__: "VERSION"}
        for value, name in names.items():
            text = text.replace(value, name)
        return text

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text)
        os.chmod(path, 0o755)
