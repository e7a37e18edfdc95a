"""What a checkpoint says about itself: the list of all that it must hold, without which it does not exist."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pathfm.files import checksum, write_json

_FORMAT = 2  # 1 was one safetensors file, written by one process
MANIFEST = "manifest.json"
FileFacts = dict[str, Any]  # bytes and xxh3_128
KeyFacts = list[Any]  # dtype and shape


class DamagedCheckpoint(ValueError):
    """A published checkpoint that is not what its manifest says, or not of this run."""


@dataclass(frozen=True)
class Manifest:
    """step, plain values, every key with dtype and shape, every file with size and checksum."""

    step: int
    ranks: int  # that wrote it
    is_good: bool  # no step without a finite loss just before it
    values: Mapping[str, Any]
    tensors: Mapping[str, KeyFacts]
    files: Mapping[str, FileFacts]

    @property
    def bytes(self) -> int:
        return sum(facts["bytes"] for facts in self.files.values())

    def write(self, folder: Path) -> None:
        facts = asdict(self)
        write_json(folder / MANIFEST, {"format": _FORMAT, "checksum": _checksum(facts), **facts})


def read_manifest(folder: Path) -> Manifest:
    """Raises `DamagedCheckpoint` when it is missing or not one of ours."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} is not readable: {error}") from error
    if not isinstance(facts, dict) or facts.pop("format", None) != _FORMAT:
        raise DamagedCheckpoint(f"{MANIFEST} is of another format than {_FORMAT}")
    if facts.pop("checksum", None) != _checksum(facts):
        raise DamagedCheckpoint(f"{MANIFEST} differs from its checksum")
    return Manifest(**facts)


def _checksum(facts: Mapping[str, Any]) -> str:
    """Of what it says, however it is laid out."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def facts_of(file: Path) -> FileFacts:
    return {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}


def damages(folder: Path, manifest: Manifest, rank: int = 0, world_size: int = 1) -> Iterator[str]:
    """What is wrong with the files, in words; each of several ranks looks at its share of them."""
    for name in sorted(manifest.files)[rank::world_size]:
        file, facts = folder / name, manifest.files[name]
        try:
            if (size := file.stat().st_size) != facts["bytes"]:
                yield f"{name} has {size:,} bytes, its manifest says {facts['bytes']:,}"
            elif checksum(file) != facts["xxh3_128"]:
                yield f"{name} differs from its checksum"
        except FileNotFoundError:
            yield f"{name} is missing"
        except OSError as error:
            yield f"{name} cannot be read ({error})"


def describe(tensors: Mapping[str, Tensor]) -> dict[str, KeyFacts]:
    """Key -> [dtype, shape], as manifests hold it; of a tensor that is spread over ranks, the whole one's."""
    return {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for name, tensor in tensors.items()}


def key_differences(expected: Mapping[str, KeyFacts], found: Mapping[str, KeyFacts]) -> Iterator[str]:
    """Every key that is missing, unexpected, or of another shape or dtype, in words."""
    for name in sorted(expected.keys() - found.keys()):
        yield f"{name} is missing"
    for name in sorted(found.keys() - expected.keys()):
        yield f"{name} is not part of this run"
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            yield f"{name} is {found[name]}, this run has {expected[name]}"
