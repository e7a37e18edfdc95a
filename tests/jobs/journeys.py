"""A tiny run and what happens to it: shared by the tests that start, kill and continue training processes."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch

from pathfm.checkpoint.reading import read_tensors
from pathfm.data.pack import PackRequest, pack
from pathfm.jobs.synthetic_tissue import draw_tile

TINY = """
dino: {head_n_prototypes: 64, head_bottleneck_dim: 16, head_hidden_dim: 32, koleo_group_size: 4}
ibot: {separate_head: true, head_n_prototypes: 48, head_bottleneck_dim: 16, head_hidden_dim: 32}
train: {batch_size_per_gpu: 8, precision: fp32, num_workers: 0, log_every_steps: 3, device: cpu}
student: {arch: vit_tiny, patch_size: 16, drop_path_rate: 0.2}
optim: {total_steps: 16, base_lr: 2.0e-3, warmup_pct: 0.2}
crops: {global_crops_size: 48, local_crops_size: 32, local_crops_number: 2}
checkpoint: {every_steps: 4}
"""
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


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Everything that the checkpoint of a step holds."""
    return read_tensors(run / "checkpoints" / f"step_{step:08d}")


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Equal bit for bit: every logged number and every tensor of the last checkpoint."""
    assert metrics(one) == metrics(other)
    left, right = weights(one, step), weights(other, step)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
