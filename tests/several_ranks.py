"""Run one function on several ranks of this machine and collect what each returns: gloo on CPU, NCCL where GPUs are."""

import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


def ranks_for(device: str, wanted: int) -> int:
    """As many ranks as a test wants; with NCCL no more than there are GPUs."""
    return wanted if device == "cpu" else min(wanted, torch.cuda.device_count())


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, device: str = "cpu") -> list[Any]:
    """`function(*arguments)` on every rank; the results in rank order. An exception of any rank is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_one_rank, (world_size, folder, device, function, arguments), nprocs=world_size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _one_rank(
    rank: int, world_size: int, folder: str, device: str, function: Callable[..., Any], arguments: tuple[Any]
) -> None:
    torch.set_num_threads(1)
    backend = "gloo"
    if device == "cuda":
        torch.cuda.set_device(rank)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    result = function(*arguments)
    (Path(folder) / f"{rank}.part").write_bytes(pickle.dumps(result))
    (Path(folder) / f"{rank}.part").rename(Path(folder) / str(rank))
    # Nobody leaves, or tears gloo down, while another may still be in a collective.
    deadline = time.monotonic() + 60
    while not all((Path(folder) / str(other)).exists() for other in range(world_size)):
        assert time.monotonic() < deadline, "a rank did not come to its end"
        time.sleep(0.01)
    os._exit(0)
