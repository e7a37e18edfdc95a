"""A run's files as they grow: lines that are new, pictures and exports that are new."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathfm.files import checksum

Line = dict[str, Any]


class FollowedLines:
    """JSON lines of steps that another process appends to, and at times replaces by a file without the last of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = self._position = 0

    def look(self) -> list[Line]:
        """Those that came since the last look; all of them, when the file was replaced."""
        try:
            return list(self._new())
        except OSError:  # not there yet, or a file system that stumbles: the next look will see
            return []

    def _new(self) -> Iterator[Line]:
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._position:
                self._inode, self._position = status.st_ino, 0
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # it is being written
                self._position += len(line)
                try:
                    parsed = json.loads(line)
                except ValueError:  # what a killed process left
                    continue
                if isinstance(parsed, dict) and isinstance(parsed.get("step"), int):
                    yield parsed


@dataclass(frozen=True)
class Picture:
    """`name` is that of a series of pictures; `step` is None where the file's name tells none."""

    path: Path
    name: str
    step: int | None
    key: str  # the same for the same content


class FollowedPictures:
    """The PNG files of a folder, each content once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[Path, tuple[int, int]] = {}

    def look(self) -> list[Picture]:
        return [_picture(path) for path in _changed(self._folder, "*.png", self._seen)]


@dataclass(frozen=True)
class Export:
    """Weights of one step, or the best so far; `files` are all formats of them."""

    files: tuple[Path, ...]
    alias: str
    key: str


class FollowedExports:
    """`teacher_STEP` and `teacher_best`; they are there when the last format is, the safetensors."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[Path, tuple[int, int]] = {}

    def look(self) -> list[Export]:
        return [
            Export(
                tuple(sorted(path.parent.glob(f"{path.stem}.*"))),
                path.stem.removeprefix("teacher_"),
                f"{path.stem}:{self._seen[path][0]}",
            )
            for path in _changed(self._folder, "teacher_*.safetensors", self._seen)
        ]


def _changed(folder: Path, pattern: str, seen: dict[Path, tuple[int, int]]) -> Iterator[Path]:
    for path in sorted(folder.glob(pattern)):
        try:
            status = path.stat()
        except OSError:
            continue
        if seen.get(path) != (now := (status.st_mtime_ns, status.st_size)):
            seen[path] = now
            yield path


def _picture(path: Path) -> Picture:
    of_step = re.fullmatch(r"(.+)_(\d{3,})", path.stem)
    name, step = (of_step[1], int(of_step[2])) if of_step else (path.stem, None)
    return Picture(path, name, step, f"{path.name}:{checksum(path)}")
