"""A tiny run and what happens to it: shared by the tests that start, kill and continue training processes.

torch is imported by what reads weights alone: a host that only submits has none.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2

from pathfm.data.pack import PackRequest, pack
from pathfm.jobs.synthetic_tissue import draw_tile

if TYPE_CHECKING:
    from torch import Tensor

TINY = """
dino: {head_n_prototypes: 64, head_bottleneck_dim: 16, head_hidden_dim: 32, koleo_group_size: 4}
ibot: {separate_head: true, head_n_prototypes: 48, head_bottleneck_dim: 16, head_hidden_dim: 32}
train: {batch_size_per_gpu: 8, precision: fp32, num_workers: 0, log_every_steps: 3, device: cpu}
student: {arch: vit_tiny, patch_size: 16, drop_path_rate: 0.2}
optim: {total_steps: 16, base_lr: 2.0e-3, warmup_pct: 0.2}
crops: {global_crops_size: 48, local_crops_size: 32, local_crops_number: 2}
checkpoint: {every_steps: 4}
"""
# Of a shipped recipe, to be tried in seconds.
SMALL = (
    "dino.head_n_prototypes=64",
    "dino.head_bottleneck_dim=16",
    "dino.head_hidden_dim=32",
    "train.batch_size_per_gpu=4",
    "train.precision=fp32",
    "train.device=cpu",
)
NUM_TILES = 40
Done = subprocess.CompletedProcess[str]


def make_tiles(folder: Path, number: int = NUM_TILES) -> Path:
    """A packed data set of small drawn tiles; returns its root."""
    tiles = folder / "tiles"
    tiles.mkdir(parents=True)
    for index in range(number):
        cv2.imwrite(str(tiles / f"tile_{index:03d}.png"), draw_tile(0, index, 64)[:, :, ::-1])
    pack(PackRequest(tiles, "pretrain", folder / "data"))
    return folder / "data"


def command(recipe: Path, data: Path, run: Path, *overrides: str, launcher: Sequence[str] = ()) -> list[str]:
    """The ancestors' command for a run on `data`."""
    dataset = f"train.dataset_path=Pathology:root={data}"
    start = [*(launcher or [sys.executable]), "-m", "pathfm.train"]
    return [*start, "--config-file", str(recipe), "--output-dir", str(run), dataset, *overrides]


def train(recipe: Path, data: Path, run: Path, *overrides: str, launcher: Sequence[str] = ()) -> Done:
    """Run to the end of the process."""
    words = command(recipe, data, run, *overrides, launcher=launcher)
    return subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=300)


class RankProcesses:
    """A run on several ranks of this machine, each a process that was started by itself, as srun does."""

    def __init__(self, recipe: Path, data: Path, run: Path, number: int, *overrides: str) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.log = run / "log.txt"
        words = command(recipe, data, run, *overrides)
        port = str(_free_port())
        with self.log.open("w") as log:
            self.processes = [
                subprocess.Popen(words, env=_rank_environment(rank, number, port), stdout=log, stderr=log)
                for rank in range(number)
            ]

    def wait(self, seconds: float = 240) -> list[int]:
        """The exit status of every rank."""
        try:
            return [process.wait(timeout=seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def said(self) -> str:
        return self.log.read_text()


def _rank_environment(rank: int, number: int, port: str) -> dict[str, str]:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    return {**environment(), **ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(is_so: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.005)


def newest_checkpoint(run: Path) -> int:
    steps = [int(path.name[5:]) for path in (run / "checkpoints").glob("step_????????")]
    return max(steps, default=0)


def segments(run: Path) -> int:
    """How often training has begun in this run."""
    path = run / "provenance.json"
    return len(json.loads(path.read_text())) if path.exists() else 0


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def weights(run: Path, step: int) -> dict[str, "Tensor"]:
    """Everything that the checkpoint of a step holds."""
    from pathfm.checkpoint.reading import read_tensors

    return read_tensors(run / "checkpoints" / f"step_{step:08d}")


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Equal bit for bit: every logged number and every tensor of the last checkpoint."""
    assert metrics(one) == metrics(other)
    left, right = weights(one, step), weights(other, step)
    assert left.keys() == right.keys()
    assert [name for name in left if not left[name].equal(right[name])] == []
