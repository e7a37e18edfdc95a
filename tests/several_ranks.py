"""Run one function on several gloo ranks of this machine and collect what each returns."""

import os
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on every rank; the results in rank order. An exception of any rank is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_one_rank, (world_size, folder, function, arguments), nprocs=world_size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _one_rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    result = function(*arguments)
    (Path(folder) / f"{rank}.part").write_bytes(pickle.dumps(result))
    (Path(folder) / f"{rank}.part").rename(Path(folder) / str(rank))
    # Nobody leaves, or tears gloo down, while another may still be in a collective.
    deadline = time.monotonic() + 60
    while not all((Path(folder) / str(other)).exists() for other in range(world_size)):
        assert time.monotonic() < deadline, "a rank did not come to its end"
        time.sleep(0.01)
    os._exit(0)
