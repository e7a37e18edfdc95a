"""Reading checkpoints: into the tensors of a run, whatever ranks hold them, or as whole tensors for anyone."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from pathfm.checkpoint.manifest import DamagedCheckpoint, Manifest, damages, describe, key_differences, read_manifest
from pathfm.dist.collect import decided_by_first, gather_lists
from pathfm.dist.env import ALONE, Ranks
from pathfm.errors import listed


def load_into(tensors: Mapping[str, Tensor], folder: Path, ranks: Ranks = ALONE) -> Manifest:
    """Verify a checkpoint, then fill `tensors` (whole, or spread over ranks) in place. All ranks call this together.

    Raises `DamagedCheckpoint` on every rank, before anything is changed, when the manifest is missing, a file is not
    what it says, or the keys are not those of `tensors`, naming the first few.
    """
    manifest = decided_by_first(lambda: read_manifest(folder))
    if mistakes := list(key_differences(describe(tensors), manifest.tensors)):
        raise DamagedCheckpoint(f"{len(mistakes)} keys differ: {listed(mistakes)}")
    verify_by_all(folder, manifest, ranks)
    _read(dict(tensors), folder, alone=ranks.world_size == 1)
    return manifest


def verify_by_all(folder: Path, manifest: Manifest, ranks: Ranks = ALONE) -> None:
    """Raises `DamagedCheckpoint` on every rank when one finds a damaged file. All ranks call this together."""
    if found := gather_lists(list(damages(folder, manifest, ranks.rank, ranks.world_size))):
        raise DamagedCheckpoint(listed(found))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, in this process's memory; verified first. Raises `DamagedCheckpoint`."""
    verify_by_all(folder, read_manifest(folder))
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(facts.size, dtype=facts.properties.dtype)
        for name, facts in stored.items()
        if isinstance(facts, TensorStorageMetadata)
    }
    _read(tensors, folder, alone=True)
    return tensors


def _read(tensors: dict[str, Tensor], folder: Path, *, alone: bool) -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    try:
        load(tensors, storage_reader=FileSystemReader(folder), no_dist=alone)
    except CheckpointException as error:  # of every rank that failed, whatever it was
        rank, (cause, _) = min(error.failures.items())
        raise DamagedCheckpoint(f"rank {rank} could not read it: {' '.join(str(cause).split())}") from error
