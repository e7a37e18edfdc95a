"""From positions to batches: samples are read and decoded by worker processes, one part of a rank's batch at a time.

What a batch holds depends on its number alone: not on the workers, and, put together, not on ranks and parts.
"""

import os
import re
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process, resource_tracker, util
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from pathfm.batch import Batch, Skipped
from pathfm.data.config import MAX_NEIGHBOURS
from pathfm.data.decode import DecodeError
from pathfm.data.decode import decode as decode_image
from pathfm.data.order import BatchPlan, Order
from pathfm.errors import UserError, listed

_SHIELDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_LONGEST_TEMPORARY = 75  # bytes of the temporary folder's path: /pymp-xxxxxxxx/listener-xxxxxxxx comes after it
_OWN_FOLDER = len("/pymp-xxxxxxxx")
_SECONDS_BETWEEN_LOOKS = 1.0  # of a worker for its trainer


class ImageDataset(Protocol):
    """What a data set must offer to be loaded. It travels to the workers by pickle."""

    def __len__(self) -> int: ...

    def read_bytes(self, sample: int) -> bytes: ...

    def will_need(self, samples: list[int]) -> None: ...

    def name_of(self, sample: int) -> str: ...

    def tar_of(self, sample: int) -> Path: ...

    def cohort_of(self, sample: int) -> str: ...

    def neighbours(self, sample: int, at_most: int) -> list[int]: ...


@dataclass(frozen=True)
class Sample:
    """A decoded image and where it comes from; all random draws are keyed by the position."""

    position: int  # in the sample order
    sample: int  # row of the data set that was read
    image: np.ndarray  # uint8 [H, W, 3], or float [h, w, D] for a grid of patch features


Decode = Callable[[bytes], np.ndarray]  # raises `DecodeError`
Assemble = Callable[[list[Sample], int], Batch]  # samples of a part of a rank's batch, and the batch's number


def load_batches(
    dataset: ImageDataset,
    order: Order,
    plan: BatchPlan,
    assemble: Assemble,
    *,
    numbers: Iterable[int],
    num_workers: int = 0,
    decode: Decode = decode_image,
    max_neighbours: int = MAX_NEIGHBOURS,
    prefetch_batches: int = 2,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """This rank's share of the batches of these numbers, in order, each in `plan.parts` parts.

    A sample that cannot be decoded is replaced by the first of its cohort's next rows that can (`max_neighbours` are
    tried), keeps its position's random draws, and is reported in `Batch.skipped`. `dataset`, `assemble` and `decode`
    must be picklable when there are workers.
    Raises `UserError` for a batch larger than the data set, neighbours that are all damaged and a worker that died.
    """
    if plan.global_batch_size > order.epoch_size:
        raise UserError(f"a batch of {plan.global_batch_size} is larger than an epoch of {order.epoch_size} samples")
    batches = _RankBatches(dataset, order, plan, assemble, decode, max_neighbours)
    return load_items(batches, _Parts(numbers, plan.parts), num_workers, prefetch_batches, pin_memory)


Item = TypeVar("Item")


def load_items(
    items: Dataset[Item | UserError], keys: Iterable[Any], num_workers: int, prefetch: int, pin_memory: bool
) -> Iterator[Item]:
    """`items[key]` for every key, in order, made by workers (0: by this process) up to `prefetch` each ahead.

    A `UserError` that is handed over in place of an item is raised here; so is one that explains a worker's death.
    """
    if not num_workers:
        _keep_opencv_in_one_thread()
    loader = _loader(items, keys, num_workers, prefetch, pin_memory)
    return _or_raised(_with_clear_deaths(loader) if num_workers else iter(loader))


_Part = tuple[int, int]  # the batch's number, and which part of it


@dataclass(frozen=True)
class _Parts:
    """What is loaded, in order."""

    numbers: Iterable[int]
    parts: int

    def __iter__(self) -> Iterator[_Part]:
        return ((number, part) for number in self.numbers for part in range(self.parts))


@dataclass(frozen=True)
class _RankBatches(Dataset[Batch | UserError]):
    """A part of a batch, as this rank gets it.

    A user's mistake is handed over as a value: torch would wrap it in a traceback.
    """

    dataset: ImageDataset
    order: Order
    plan: BatchPlan
    assemble: Assemble
    decode: Decode
    max_neighbours: int

    def __getitem__(self, part: _Part) -> Batch | UserError:
        try:
            return self._batch(*part)
        except UserError as error:
            return error

    def _batch(self, number: int, part: int) -> Batch:
        positions = self.plan.positions(number, part)
        rows = self.order.samples(positions).tolist()
        self.dataset.will_need(rows)
        skipped: list[Skipped] = []
        samples = [self._sample(*place, skipped) for place in zip(positions.tolist(), rows, strict=True)]
        return replace(self.assemble(samples, number), skipped=tuple(skipped))

    def _sample(self, position: int, row: int, skipped: list[Skipped]) -> Sample:
        """The image at a position, or the first of its neighbours that can be decoded."""
        dataset = self.dataset
        for sample in self._tried(row):
            try:
                return Sample(position, sample, self.decode(dataset.read_bytes(sample)))
            except DecodeError as error:
                cohort, file = dataset.cohort_of(sample), dataset.name_of(sample)
                skipped.append(Skipped(position, sample, cohort, file, str(error)))
        files = [tried.file for tried in skipped if tried.position == position]
        are_all = len(files) <= self.max_neighbours
        raise UserError(
            f"{dataset.tar_of(row)}: {len(files)} samples in a row, from {row} on, cannot be decoded "
            f"({listed(files)}); the last one: {skipped[-1].reason}. Mend the tar"
            + ("; the cohort has no other samples" if are_all else ", or raise data.max_neighbours")
        )

    def _tried(self, row: int) -> Iterator[int]:
        yield row
        yield from self.dataset.neighbours(row, self.max_neighbours)


def _loader(
    items: Dataset[Item | UserError], keys: Iterable[Any], num_workers: int, prefetch: int, pin_memory: bool
) -> DataLoader[Item | UserError]:
    return DataLoader(
        items,
        batch_size=None,  # an item is a batch already
        sampler=keys,
        num_workers=num_workers,
        prefetch_factor=prefetch if num_workers else None,
        multiprocessing_context=_worker_context() if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its own: starting a loader must not advance the global one
        pin_memory=pin_memory,
    )


def _worker_context() -> ForkServerContext:
    """Workers are forked from a clean server process, not from the trainer.

    A trainer has threads (CUDA, NCCL, W&B), a CUDA context and locked files; its forks can hang on a lock that a
    thread held, and keep what they inherited after it is killed. The server imports this module, torch with it, once.
    """
    _keep_sockets_within_reach()
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _keep_sockets_within_reach() -> None:
    """Workers are spoken to by sockets below the temporary folder, whose paths the system cuts off at 107 bytes.

    Raises `UserError` when neither that folder nor /tmp will do.
    """
    own = tempfile.gettempdir()
    if len(os.fsencode(own)) <= _LONGEST_TEMPORARY:
        return
    tempfile.tempdir = "/tmp"
    try:
        folder = util.get_temp_dir()  # remembered by this process and its workers
    except OSError:
        folder = own
    finally:
        tempfile.tempdir = own
    if len(os.fsencode(folder)) > _LONGEST_TEMPORARY + _OWN_FOLDER:
        raise UserError(
            f"TMPDIR={own} is too long a path for the sockets of data-loading workers; set it to one of at most "
            f"{_LONGEST_TEMPORARY} letters, or train.num_workers=0"
        )


def _born_shielded(loader: DataLoader[Item]) -> Iterator[Item]:
    """Start the workers with the signals blocked that mean "save and leave" to a trainer.

    Slurm and a terminal send them to every process of the trainer's group: workers that obeyed would be gone when it
    asks them for its last batch. A mask, unlike a handler, is there from a process's birth, and survives fork and exec.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
    try:
        resource_tracker.ensure_running()  # first, because starting it unblocks TERM and INT here (bpo-33613)
        signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELDED)
        return cast(Iterator[Item], iter(loader))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(worker: int) -> None:
    """One computing thread each: the workers are the parallelism."""
    Thread(target=_obey_the_trainer_alone, daemon=True).start()
    torch.set_num_threads(1)
    _keep_opencv_in_one_thread()


def _keep_opencv_in_one_thread() -> None:
    """In the one that asks: crops are small, and a pool of threads in every worker would fight for the cores."""
    import cv2

    cv2.setNumThreads(0)


def _obey_the_trainer_alone() -> None:
    """Leave when the trainer says so or is gone, and for no one else's signals.

    A trainer that is killed cannot say goodbye, and torch's own watch looks at a worker's parent, which is here the
    fork server; the server stays while a worker lives, so they would keep each other alive for ever.
    """
    trainer = parent_process()
    assert trainer is not None
    while trainer.is_alive():
        came = signal.sigtimedwait(_SHIELDED, _SECONDS_BETWEEN_LOOKS)
        if came is not None and came.si_signo == signal.SIGTERM and came.si_pid == trainer.pid:
            break
    os._exit(1)


def _with_clear_deaths(loader: DataLoader[Item]) -> Iterator[Item]:
    """What the workers hand over; the death of one is explained."""
    items = _born_shielded(loader)
    while True:
        try:
            item = next(items, None)
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            if not _is_a_death(error):
                raise
            raise UserError(
                "a data-loading worker was killed, most often for lack of memory or of space in /dev/shm; "
                "set train.num_workers lower or give the job more"
            ) from error
        if item is None:
            return
        yield item


def _is_a_death(error: Exception) -> bool:
    """Whether a worker is gone. Torch notices, or a batch that it had announced can no longer be fetched from it.

    The thread that pins memory, where there is one, is what fetches, and ends on that.
    What a worker raised itself comes as "Caught ERROR in DataLoader worker ..." and is not that.
    """
    if isinstance(error, RuntimeError):
        return re.match(r"(DataLoader worker|Pin memory thread) .*exited unexpectedly", str(error)) is not None
    return not str(error).startswith("Caught ")


def _or_raised(items: Iterator[Item | UserError]) -> Iterator[Item]:
    """The items; a user's mistake is raised here."""
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item
