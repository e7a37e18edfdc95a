"""Run one function on several gloo ranks of this machine and collect what each returns."""

import pickle
import tempfile
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
    dist.destroy_process_group()
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(result))
