"""Checkpoints of a run: each a directory that appears by one rename, with a manifest that proves it complete.

checkpoints/step_00012000/state.safetensors   every tensor of the state, by name
checkpoints/step_00012000/manifest.json       step, plain values, keys with shape and dtype, sizes, checksums
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pathfm.checkpoint.config import CheckpointConfig
from pathfm.files import aside_of, directory_written_aside, sha256, write_json
from pathfm.log import get_logger

_log = get_logger(__name__)
_FORMAT = 1
_TENSORS = "state.safetensors"
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8,})")


class DamagedCheckpoint(ValueError):
    """A published checkpoint that is not what its manifest says."""


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds: tensors by name, and plain JSON values."""

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]


class Store:
    """The `checkpoints/` directory of one run. One process writes; the caller holds the run's lock."""

    def __init__(self, directory: Path, config: CheckpointConfig) -> None:
        self.directory = directory
        self.config = config

    def save(self, snapshot: Snapshot) -> Path:
        """Write and publish a checkpoint, then drop those that need not stay. Raises `OSError` when it cannot.

        Whatever goes wrong, what was published before stays as it was.
        """
        published = self.path_of(snapshot.step)
        if published.exists():  # the same step of the same run: law 3 makes it the same state
            return published
        with directory_written_aside(published) as aside:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in snapshot.tensors.items()}
            try:
                save_file(tensors, aside / _TENSORS)
            except SafetensorError as error:  # it wraps the operating system's error
                raise OSError(str(error)) from error
            write_json(aside / _MANIFEST, _manifest(snapshot, tensors, aside / _TENSORS))
        try:
            self._drop_old()
        except OSError as error:
            _log.warning("an old checkpoint could not be removed: %s", error)
        return published

    def whole(self) -> Iterator[Snapshot]:
        """Checkpoints that are whole, newest first. Every damaged one is named with the reason."""
        for path in reversed(self.paths()):
            try:
                yield read_checkpoint(path)
            except DamagedCheckpoint as damage:
                _log.warning("checkpoint %s is passed over: %s", path.name, damage)

    def path_of(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}"

    def paths(self) -> list[Path]:
        """Published checkpoints, oldest first, damaged ones included."""
        found = self.directory.iterdir() if self.directory.is_dir() else ()
        return sorted((path for path in found if _NAME.fullmatch(path.name)), key=_step_of)

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints newer than `step`: damaged ones, whose steps a resumed run is about to write again."""
        for path in self.paths():
            if _step_of(path) > step:
                damaged = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(damaged, ignore_errors=True)
                path.rename(damaged)

    def _drop_old(self) -> None:
        for path in self.paths()[: -self.config.keep_last]:
            stays = self.config.keep_every_steps and _step_of(path) % self.config.keep_every_steps == 0
            if not stays:  # renamed first: half a checkpoint must not bear a published name
                path = path.rename(aside_of(path))
                shutil.rmtree(path)


def read_checkpoint(path: Path) -> Snapshot:
    """Read and verify one checkpoint. Raises `DamagedCheckpoint` with what is wrong."""
    manifest = _read_manifest(path)
    file = path / _TENSORS
    if not file.is_file():
        raise DamagedCheckpoint(f"{_TENSORS} is missing")
    if (size := file.stat().st_size) != manifest["bytes"]:
        raise DamagedCheckpoint(f"{_TENSORS} has {size:,} bytes, its manifest says {manifest['bytes']:,}")
    try:
        if sha256(file) != manifest["sha256"]:
            raise DamagedCheckpoint(f"{_TENSORS} differs from its checksum")
        return Snapshot(manifest["step"], load_file(file), manifest["values"])
    except OSError as error:
        raise DamagedCheckpoint(f"{_TENSORS} cannot be read ({error})") from error


def describe(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Key -> [dtype, shape], as manifests hold it."""
    return {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()}


def key_differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> Iterator[str]:
    """Every key that is missing, unexpected, or of another shape or dtype, in words."""
    want, have = describe(expected), describe(found)
    for name in want.keys() - have.keys():
        yield f"{name} is missing"
    for name in have.keys() - want.keys():
        yield f"{name} is not part of this run"
    for name in want.keys() & have.keys():
        if want[name] != have[name]:
            yield f"{name} is {have[name]}, this run has {want[name]}"


def _manifest(snapshot: Snapshot, tensors: Mapping[str, Tensor], file: Path) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "step": snapshot.step,
        "values": dict(snapshot.values),
        "bytes": file.stat().st_size,
        "sha256": sha256(file),
        "tensors": describe(tensors),
    }


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{_MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{_MANIFEST} is not readable: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise DamagedCheckpoint(f"{_MANIFEST} is of another format than {_FORMAT}")
    if missing := {"step", "values", "bytes", "sha256"} - manifest.keys():
        raise DamagedCheckpoint(f"{_MANIFEST} lacks {', '.join(sorted(missing))}")
    return manifest


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, path
    return int(match.group(1))
