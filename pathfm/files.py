"""Files that exist completely or not at all: written aside, flushed to disk, then renamed."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ASIDE = ".partial"  # suffix of whatever is not yet published; safe to delete when its writer is dead


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed and renamed over `path`, on failure removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        yield aside
        flush_to_disk(aside)
        os.replace(aside, path)
        flush_to_disk(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def directory_written_aside(path: Path) -> Iterator[Path]:
    """Like `written_aside` for a directory that must not exist yet; every file in it is flushed before the rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        publish_directory(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def publish_directory(aside: Path, path: Path) -> None:
    """Flush every file of `aside`, then rename it to `path`, which must not exist yet."""
    for file in sorted(aside.rglob("*")):
        flush_to_disk(file)
    flush_to_disk(aside)
    os.rename(aside, path)
    flush_to_disk(path.parent)


def aside_of(path: Path) -> Path:
    """Where this process writes what becomes `path`; no other process of any host writes there."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}{_ASIDE}")


def remove_leftovers(directory: Path) -> int:
    """Delete what dead writers left aside in `directory` (the caller holds the directory's lock). Returns how many."""
    leftovers = list(directory.glob(f".*{_ASIDE}")) if directory.is_dir() else []
    for entry in leftovers:
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    return len(leftovers)


def write_text(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def flush_to_disk(path: Path) -> None:
    """fsync a file or a directory, so that a power cut cannot undo a rename that was reported."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path) -> str:
    """xxh3_128, against accidents: it costs less than reading, where sha256 would cost as much as writing."""
    import xxhash

    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
