"""Writing checkpoints while training goes on: a copy in memory first, then a thread that writes, checks and publishes.

Every rank copies its share and writes its own file; rank 0 publishes when all have. The threads of the ranks talk over
a process group of their own, so that they never meet what the training threads say to each other.
"""

import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save
from torch.serialization import get_crc32_options, set_crc32_options

from pathfm.checkpoint.manifest import FileFacts, Manifest, describe, facts_of
from pathfm.checkpoint.store import Store
from pathfm.dist.collect import decided_by_first, gather_lists
from pathfm.dist.env import ALONE, Ranks
from pathfm.log import get_logger

_log = get_logger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """All that a checkpoint holds: tensors by name, whole or this rank's share of them, and plain JSON values."""

    step: int
    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]
    is_good: bool = True  # no step without a finite loss just before it


@dataclass(frozen=True)
class Outcome:
    """How a save ended; step and error are the same on every rank."""

    step: int
    error: str | None  # None: it is published
    seconds: float  # until it was durable, or had failed


class Saver:
    """One save at a time. All ranks call `start` together; the other methods concern this rank alone."""

    def __init__(self, store: Store, ranks: Ranks = ALONE, group: ProcessGroup | None = None) -> None:
        self.store = store
        self.ranks = ranks
        self.group = group
        self._stager = DefaultStager(_staging_options())
        self._thread: Thread | None = None
        self._outcomes: list[Outcome] = []

    def start(self, snapshot: Snapshot) -> float:
        """Copy the state and begin to write it. Returns the seconds that training stood still.

        An earlier save that is still going on is waited for. A step that is published already is not written again:
        law 3 makes it the same state.
        """
        started = time.perf_counter()
        self.wait()
        staged = self._stager.stage(dict(snapshot.tensors))
        assert isinstance(staged, dict)  # a future only where staging itself is left to a thread
        copy = Snapshot(snapshot.step, staged, snapshot.values, snapshot.is_good)
        self._thread = Thread(target=self._save, args=(copy,), name=f"checkpoint of step {copy.step}", daemon=True)
        self._thread.start()
        return time.perf_counter() - started

    def wait(self, within_s: float | None = None) -> bool:
        """Wait until nothing is being written. False: the time was up before."""
        if self._thread is not None:
            self._thread.join(within_s)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    def outcomes(self) -> list[Outcome]:
        """Of saves that ended since this was last asked."""
        ended = [*self._outcomes]
        del self._outcomes[: len(ended)]
        return ended

    def _save(self, snapshot: Snapshot) -> None:
        started = time.perf_counter()
        try:
            error = self._write(snapshot)
        except Exception as failure:  # of the process group: a rank is lost, which the training threads notice too
            error = f"{type(failure).__name__}: {failure}"
        self._outcomes.append(Outcome(snapshot.step, error, time.perf_counter() - started))

    def _write(self, snapshot: Snapshot) -> str | None:
        """Returns what went wrong on any rank, and leaves nothing behind then."""
        try:
            aside = decided_by_first(lambda: self._room_for(snapshot.step), self.group)
            if aside is None:
                return None
        except OSError as error:
            return str(error)
        problems = gather_lists(self._own_files_into(aside, snapshot), self.group)
        errors = [problem for problem in problems if isinstance(problem, str)]
        files = dict(problem for problem in problems if not isinstance(problem, str))
        try:
            decided_by_first(lambda: self._publish(aside, snapshot, files, errors), self.group)
        except OSError as error:
            return str(error)
        return None

    def _room_for(self, step: int) -> Path | None:
        return None if self.store.path_of(step).exists() else self.store.new(step)

    def _own_files_into(self, aside: Path, snapshot: Snapshot) -> list[tuple[str, FileFacts] | str]:
        """Name and facts of every file that this rank wrote, or what went wrong."""
        try:
            _write_tensors(snapshot.tensors, aside, self.group, alone=self.ranks.world_size == 1)
            own = [*aside.glob(f"__{self.ranks.rank}_*"), *([aside / ".metadata"] if self.ranks.is_first else [])]
            return [(file.name, facts_of(file)) for file in own]
        except OSError as error:
            return [str(error)]
        except Exception as error:  # whatever it is: the other ranks wait for a word
            return [f"{type(error).__name__}: {error}"]

    def _publish(self, aside: Path, snapshot: Snapshot, files: dict[str, FileFacts], errors: list[str]) -> None:
        """Rank 0's. Raises `OSError`; then nothing was published and nothing is left."""
        try:
            if errors:
                raise OSError(errors[0])
            tensors, values = describe(snapshot.tensors), dict(snapshot.values)
            ranks, is_good = self.ranks.world_size, snapshot.is_good
            Manifest(snapshot.step, ranks, is_good, values, tensors, files).write(aside)
            self.store.publish(aside, snapshot.step)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        try:
            self.store.drop_old()
        except OSError as error:
            _log.warning("an old checkpoint could not be removed: %s", error)


def _write_tensors(tensors: Mapping[str, Tensor], folder: Path, group: ProcessGroup | None, *, alone: bool) -> None:
    """Every rank's share into `folder`, flushed to disk. Raises `OSError` on every rank when one could not write."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    # One thread: what goes wrong in further ones is lost there, and with it a part of the checkpoint.
    writer = FileSystemWriter(folder, thread_count=1, overwrite=False)
    try:
        with _without_checksums_of_zip():
            save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)
    except CheckpointException as error:  # of every rank that failed, whatever it was
        rank, (cause, _) = min(error.failures.items())
        raise OSError(f"rank {rank}: {' '.join(str(cause).split())}") from error


@contextmanager
def _without_checksums_of_zip() -> Iterator[None]:
    """torch.save's own take a third of the time, and the manifest has one of the whole file. For all threads: whoever
    writes a file for others to read waits for the save first."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _staging_options() -> StagingOptions:
    """One buffer in memory, taken at the first save and used again; page-locked where a GPU copies into it."""
    has_gpu = torch.cuda.is_available()
    return StagingOptions(
        use_pinned_memory=has_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=has_gpu
    )
