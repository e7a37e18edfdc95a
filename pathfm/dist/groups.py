"""The device and the process group of a rank, and how its process ends."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from pathfm.dist.env import Ranks
from pathfm.dist.rendezvous import rendezvous_url
from pathfm.dist.watch import Watch, WatchSettings
from pathfm.errors import EXIT_INTERRUPTED, UserError, exit_status

_LONGEST_SILENCE = timedelta(minutes=10)  # of a rank in a collective; one that is lost is noticed much sooner
_SLOWEST_DISK = timedelta(hours=2)  # while ranks wait for each other's part of a checkpoint
_SECONDS_TO_FIND_OUT = 20.0  # who is lost


def device_of(ranks: Ranks, requested: str) -> torch.device:
    """`auto`, `cpu` or `cuda`. Several ranks of a node take its GPUs in turn. Raises `UserError` without a GPU."""
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("train.device is cuda, but torch sees no GPU here; use train.device=auto or cpu")
    device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def demand_same_numbers(device: torch.device, wanted: bool) -> None:
    """Only kernels that add up in the same order every time: a resumed run must equal one that was left alone.

    An operation without such a kernel then raises an error that names it; warnings alone would leave attention's
    backward pass as it is.
    """
    if wanted and device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for; read at its first call
        torch.use_deterministic_algorithms(True)


@dataclass(frozen=True)
class Team:
    """What the ranks of a run share. A process that is alone has neither groups nor anyone to watch over."""

    ranks: Ranks
    device: torch.device
    watch: Watch
    agreement_group: dist.ProcessGroup | None = None  # CPU, for small numbers between steps
    checkpoint_group: dist.ProcessGroup | None = None  # CPU, for the threads that write checkpoints


class LostRank(RuntimeError):
    """Another rank is gone; the message names it."""


@contextmanager
def joined(ranks: Ranks, device: torch.device, stall_after_s: float, lost_after_s: float) -> Iterator[Team]:
    """Meet the other ranks, and watch over each other until the end. The process must end by `run_rank`.

    NCCL for GPU tensors beside gloo for CPU tensors; nothing at all when this process is alone.
    An error says to the other ranks whose fault it is; when a collective fails because a rank is lost, it becomes a
    `LostRank` that names it.
    """
    store = _met(ranks, device) if ranks.world_size > 1 else None
    settings = WatchSettings(stall_after_s=stall_after_s, lost_after_s=lost_after_s)
    watch = Watch(store, ranks.rank, ranks.world_size, settings)
    watch.start()
    try:
        yield _team(ranks, device, watch)
    except UserError as error:  # the others have it too, or are told
        watch.leaving(str(error))
        raise
    except Exception as error:
        lost = watch.who_is_lost(_SECONDS_TO_FIND_OUT) if _may_come_of_a_loss(error) else None
        watch.leaving(f"{type(error).__name__}: {error}", victim=lost is not None)
        if lost is None:
            raise
        raise LostRank(f"{lost}; start again to go on from the last checkpoint") from error
    watch.stop()


def _may_come_of_a_loss(error: Exception) -> bool:
    """gloo and NCCL raise a `RuntimeError` or one of its children."""
    return dist.is_initialized() and isinstance(error, RuntimeError)


def _met(ranks: Ranks, device: torch.device) -> Store:
    store, _, _ = next(rendezvous(rendezvous_url(ranks), ranks.rank, ranks.world_size, timeout=_LONGEST_SILENCE))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("groups", store),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=_LONGEST_SILENCE,
    )
    return store


def _team(ranks: Ranks, device: torch.device, watch: Watch) -> Team:
    if ranks.world_size == 1:
        return Team(ranks, device, watch)
    agreement, checkpoint = (
        dist.new_group(backend="gloo", timeout=limit) for limit in (_LONGEST_SILENCE, _SLOWEST_DISK)
    )
    return Team(ranks, device, watch, agreement, checkpoint)


def run_rank(command: Callable[[], int | None]) -> NoReturn:
    """Run a command to the end of this process.

    One rank of several leaves without tearing its process group down: gloo's threads can trip over a peer that closes
    its connections at the same moment (SIGABRT), and wait for ever for one that was lost.
    """
    try:
        status = exit_status(command)
    except LostRank as lost:  # the others' fault, and told in one line
        print(f"lost: {lost}", file=sys.stderr)
        status = 1
    except Exception:
        traceback.print_exc()
        status = 1
    if dist.is_initialized() or status == EXIT_INTERRUPTED:  # in the latter case a save may have been given up
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)
