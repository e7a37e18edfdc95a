"""A copy of the code as it is at submission, so that a job that waits for days runs what was submitted."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pathfm.files import directory_written_aside, write_json, write_text
from pathfm.lifecycle.run import ORIGIN, commit_and_diff

_FOLDERS = ("pathfm", "configs")  # of a checkout; the package finds its recipes beside itself
_HASH_LETTERS = 12


@dataclass(frozen=True)
class Snapshot:
    """The package and the recipes beside it, with a name that follows from their content."""

    source: Path
    files: Mapping[PurePosixPath, bytes]
    name: str


def snapshot_of(source: Path) -> Snapshot:
    """`source`: the folder that holds the package. Everything is read at once, so that an editor cannot part it."""
    files = {PurePosixPath(path.relative_to(source)): path.read_bytes() for path in sorted(_files(source))}
    facts = [f"{path} {hashlib.sha256(content).hexdigest()}" for path, content in files.items()]
    return Snapshot(source, files, _hash("\n".join(facts)))


def write_snapshot(snapshot: Snapshot, code: Path) -> Path:
    """Below `code`; a copy of the same content that is there already is taken. Returns the folder to import from."""
    folder = code / snapshot.name
    if not folder.is_dir():
        with directory_written_aside(folder) as aside:
            for path, content in snapshot.files.items():
                (aside / path).parent.mkdir(parents=True, exist_ok=True)
                (aside / path).write_bytes(content)
            origin = {**commit_and_diff(snapshot.source), "checkout": str(snapshot.source)}
            write_json(aside / ORIGIN, origin)
    return folder


def frozen_recipe(text: str, code: Path) -> Path:
    """Where a recipe with this text lies below `code`."""
    return code / f"recipe_{_hash(text)}.yaml"


def write_recipe(text: str, code: Path) -> Path:
    path = frozen_recipe(text, code)
    if not path.is_file():
        write_text(path, text)
    return path


def _files(source: Path) -> Iterator[Path]:
    """Without caches and hidden files."""
    for folder in _FOLDERS:
        for path in (source / folder).rglob("*"):
            parts = path.relative_to(source).parts
            if path.is_file() and "__pycache__" not in parts and not any(part.startswith(".") for part in parts):
                yield path


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_LETTERS]
