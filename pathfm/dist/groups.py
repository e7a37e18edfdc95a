"""The process group of a run, for as long as it lasts."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pathfm.dist.env import Ranks
from pathfm.dist.rendezvous import rendezvous_url
from pathfm.errors import UserError


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


@contextmanager
def process_group(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """NCCL for GPU tensors beside gloo for CPU tensors; nothing at all when this process is alone."""
    if ranks.world_size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        init_method=rendezvous_url(ranks),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(minutes=10),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
