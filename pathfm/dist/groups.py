"""The device and the process group of a rank, and how its process ends."""

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from pathfm.dist.env import Ranks
from pathfm.dist.rendezvous import rendezvous_url
from pathfm.errors import UserError, exit_status


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


def start_process_group(ranks: Ranks, device: torch.device) -> None:
    """NCCL for GPU tensors beside gloo for CPU tensors; nothing at all when this process is alone.

    It lasts as long as the process, which must end by `run_rank`.
    """
    if ranks.world_size == 1:
        return
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method=rendezvous_url(ranks),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(minutes=10),
    )


def run_rank(command: Callable[[], int | None]) -> NoReturn:
    """Run a command to the end of this process.

    One rank of several leaves without tearing its process group down: gloo's threads can trip over a peer that closes
    its connections at the same moment (SIGABRT), and wait for ever for one that was lost.
    """
    try:
        status = exit_status(command)
    except Exception:
        traceback.print_exc()
        status = 1
    if dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status)
