"""The checks that need torch, in a process of their own, which prints JSON: `pathfm doctor` itself imports no torch."""

import json
import os
import sys
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.distributed as dist

from pathfm.jobs.attention_choice import Work, work_of
from pathfm.jobs.examination import devices
from pathfm.jobs.examination.devices import SILENT_GPU, SILENT_NETWORK
from pathfm.jobs.examination.finding import Finding, examined
from pathfm.recipe import Recipe, read_recipe
from pathfm.ssl.build import build_method
from pathfm.training.step import compute_dtype

_BYTES_OF_A_WEIGHT = 4 + 4 + 8  # student, teacher and the two moments of AdamW, in fp32
_SECONDS_TO_MEET = 30


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser("pathfm.jobs.examination.with_torch")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--no-gpu-verdict", choices=("ok", "warn", "fail"), default="warn")
    arguments, overrides = parser.parse_known_args(argv)
    recipe = read_recipe(arguments.config, overrides).recipe
    findings = list(_findings(recipe, arguments.no_gpu_verdict))
    size = checkpoint_bytes(recipe) if arguments.config else None
    print(json.dumps({"findings": [asdict(finding) for finding in findings], "checkpoint_bytes": size}), flush=True)
    os._exit(0)  # past threads that hang


def _findings(recipe: Recipe, no_gpu: str) -> Iterator[Finding]:
    # First, because it forks, which a process that has used a GPU must not do.
    all_reduce = examined("all-reduce", all_reduce_of_two_processes, 2 * _SECONDS_TO_MEET, SILENT_NETWORK)
    there = [] if recipe.train.device == "cpu" else [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    for device in there:
        yield examined("GPU", partial(devices.gpu, device), 120, SILENT_GPU)
    if not there:
        yield _no_gpu(no_gpu)
    where, dtype = there[0] if there else torch.device("cpu"), compute_dtype(recipe.train)
    yield examined(
        "attention",
        lambda: devices.attention(recipe.student.attention, where, dtype, _attention_work(recipe, where)),
        120,
        SILENT_GPU,
    )
    yield all_reduce


def _attention_work(recipe: Recipe, device: torch.device) -> Work:
    """Of as many samples as pass the network at once."""
    return work_of(recipe, recipe.train.micro_batch_size or recipe.train.batch_size_per_gpu, device)


def _no_gpu(verdict: str) -> Finding:
    if verdict == "ok":
        return Finding("GPU", "ok", "none is needed")
    build = " (a CPU build)" if torch.version.cuda is None else ""
    found = f"torch {torch.__version__}{build} sees no GPU here"
    if verdict == "fail":
        return Finding("GPU", "fail", found, "ask for GPUs in the profile, or set train.device=cpu")
    return Finding("GPU", "warn", found, "fine on a login node: every job looks for its own. Else see the driver")


def all_reduce_of_two_processes() -> Finding:
    """Of this process and a fork of it, by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        other = get_context("fork").Process(target=_as_rank, args=(1, folder), daemon=True)
        other.start()
        try:
            return _as_rank(0, folder)
        finally:
            other.kill()


def _as_rank(rank: int, folder: str) -> Finding:
    meeting, limit = f"file://{folder}/meet", timedelta(seconds=_SECONDS_TO_MEET)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=limit)
    found = devices.all_reduce(torch.device("cpu"))
    dist.barrier()
    return Finding(found.check, found.verdict, f"{found.found}, between two processes here", found.advice)


def checkpoint_bytes(recipe: Recipe) -> int:
    """The tensors of a checkpoint, counted on networks that take no memory."""
    size = recipe.crops.global_crops_size
    with torch.device("meta"):
        method = build_method(recipe.method, recipe.student, size, recipe.dino, recipe.ibot)
    return _BYTES_OF_A_WEIGHT * sum(weight.numel() for weight in method.student.parameters())


if __name__ == "__main__":
    main(sys.argv[1:])
