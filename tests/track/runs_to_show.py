"""A run's files as a trainer writes them, and what the W&B client's offline files hold of it."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from pathfm.track.config import WandbConfig
from pathfm.track.json_lines import JsonLines
from pathfm.track.wandb_mirror.mirror import Mirror
from pathfm.track.wandb_mirror.offline_files import records_of
from pathfm.track.wandb_mirror.sent import Mode

BATCH = 4
RECIPE = {"train": {"global_batch_size": BATCH}, "optim": {"base_lr": 1e-3}}
OFFLINE = {**os.environ, "WANDB_MODE": "offline"}


class RunToShow:
    """Writes what a trainer writes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics = JsonLines(directory / "metrics.jsonl")
        self.tunings = JsonLines(directory / "results" / "tuning.jsonl")
        self.alarms = JsonLines(directory / "alarms.jsonl")

    def steps(self, first: int, behind: int, left_out: int = 0, every: int = 1) -> None:
        for step in range(first, behind, every):
            self.metrics.append(metrics_line(step, left_out))

    def tuning(self, step: int, by: str = "run") -> None:
        intervals = {"teacher": {"acc_20": [0.4, 0.6]}}
        line = {"step": step, "samples_seen": step * BATCH, "by": by, "teacher": {"acc_20": 0.5}}
        self.tunings.append({**line, "student": {"auc_20": 0.7}, "intervals": intervals})

    def picture(self, name: str, grey: int = 0) -> None:
        (self.directory / "previews").mkdir(exist_ok=True)
        Image.new("L", (8, 8), grey).save(self.directory / "previews" / name)

    def alarm(self, step: int, alarm: str, time: str = "2026-01-01T00:00:00+00:00") -> None:
        self.alarms.append({"step": step, "time": time, "alarm": alarm, "text": f"of step {step}"})

    def exports(self, *names: str) -> None:
        (self.directory / "exports").mkdir(exist_ok=True)
        for name in names:
            for ending in ("pth", "safetensors"):
                (self.directory / "exports" / f"teacher_{name}.{ending}").write_text("weights")


def show(run: RunToShow, mode: Mode = "offline", **settings: Any) -> None:
    """As a mirror does at the end of a segment, but in this process, which saves its start."""
    import wandb

    mirror = Mirror(run.directory, mode, WandbConfig(**settings), RECIPE)
    mirror.look()
    mirror.finish()
    wandb.teardown()  # so that files are complete, and the next one reads the environment


def metrics_line(step: int, left_out: int = 0) -> dict[str, Any]:
    return {
        "step": step,
        "samples_seen": step * BATCH,
        "total_loss": 1 / step + left_out,
        "koleo_loss": None,
        "batches_passed_over": left_out,
        "timing": {"seconds_per_step": 0.5},
    }


def offline_folders(run: Path) -> list[Path]:
    return sorted((run / "wandb").glob("offline-run-*"))


def records(run: Path, kind: str) -> list[Any]:
    """Of all offline files of a run."""
    files = [file for folder in offline_folders(run) for file in folder.glob("*.wandb")]
    found = (record for file in files for record in records_of(file))
    return [getattr(record, kind) for record in found if record.WhichOneof("record_type") == kind]


def offline_rows(run: Path) -> list[dict[str, Any]]:
    """Every row, with the client's own `_step`."""
    return [dict(_items(history)) for history in records(run, "history")]


def offline_config(run: Path) -> dict[str, Any]:
    updates = [one for record in records(run, "config") for one in record.update]
    return {update.key: json.loads(update.value_json) for update in updates}


def numbers_of(rows: list[dict[str, Any]]) -> list[int]:
    return [row["_step"] for row in rows]


def _items(history: Any) -> Iterator[tuple[str, Any]]:
    for item in history.item:
        yield item.key or "/".join(item.nested_key), json.loads(item.value_json)


def key_free(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if not name.startswith("WANDB_")}
