"""How far a run is, from the ends of its files alone: as cheap for a run of weeks as for a new one. No torch."""

import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathfm.launch.attempts import newest_checkpoint
from pathfm.lifecycle.run import Run

_TAIL_BYTES = 65_536  # some forty lines of metrics
_TRACKED = "auc_20"  # what tuning is judged by where a recipe does not say
_WRITER = re.compile(r"process (\d+) on (\S+)")


@dataclass(frozen=True)
class Progress:
    """None: not known, or not there yet. Times in seconds since the epoch."""

    step: int
    total_steps: int | None
    loss: float | None
    seconds_per_step: float | None
    samples_per_second: float | None
    logged: float | None  # when

    @property
    def has_metrics(self) -> bool:
        return self.logged is not None

    @property
    def seconds_to_go(self) -> float | None:
        if self.total_steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.total_steps - self.step) * self.seconds_per_step


@dataclass(frozen=True)
class Tuned:
    """The last tuning, by the number that the run is judged by. `student`: None when the teacher alone was tuned."""

    metric: str
    step: int
    teacher: float
    student: float | None
    best: float | None  # of the teacher, so far
    best_step: int | None
    without_improvement: int | None  # tunings in a row
    patience: int | None  # None: the run does not end for lack of improvement


def progress_of(run: Run) -> Progress:
    line, settings = _last_line(run.metrics), settings_of(run)
    timing = line.get("timing")
    timing = timing if isinstance(timing, dict) else {}
    return Progress(
        step=line.get("step", 0),
        total_steps=_total_steps(settings, line),
        loss=_number(line.get("total_loss")),
        seconds_per_step=_number(timing.get("seconds_per_step")),
        samples_per_second=_number(timing.get("samples_per_second")),
        logged=_written(run.metrics) if line else None,
    )


def tuned_of(run: Run, tracked: str) -> Tuned | None:
    """`tracked`, or the first number of the last tuning where it has none of that name; None without any."""
    for line in reversed(last_lines(run.tuning)):
        teacher, student, judged = (group(line, name) for name in ("teacher", "student", "early_stopping"))
        metric = next((name for name in (tracked, *teacher) if _number(teacher.get(name)) is not None), None)
        if metric is None or not isinstance(line.get("step"), int):
            continue
        judged = judged if judged.get("metric") == metric else {}
        return Tuned(
            metric=metric,
            step=line["step"],
            teacher=float(teacher[metric]),
            student=_number(student.get(metric)),
            best=_number(judged.get("best")),
            best_step=_whole(judged.get("best_step")),
            without_improvement=_whole(judged.get("without_improvement")),
            patience=_whole(judged.get("patience")),
        )
    return None


def tracked_of(settings: Mapping[str, Any]) -> str:
    """The number of tuning that a run is judged by."""
    tracked = group(group(settings, "tune"), "early_stopping").get("tracking")
    return tracked if isinstance(tracked, str) else _TRACKED


def settings_of(run: Run) -> dict[str, Any]:
    """recipe.yaml as it stands, not validated; empty where it cannot be read."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        settings = yaml.load(run.recipe.read_text(encoding="utf-8"), loader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}


def newest_checkpoint_of(run: Run) -> tuple[int, float | None]:
    """Its step, 0 without any, and when it was written."""
    step = newest_checkpoint(run.directory)
    return step, _written(run.checkpoints / f"step_{step:08d}") if step else None


def writer_of(run: Run) -> tuple[int, str] | None:
    """The process that holds the run, or held it last, and its host."""
    try:
        found = _WRITER.search((run.directory / ".lock").read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return (int(found[1]), found[2]) if found else None


def lives_here(writer: tuple[int, str] | None) -> bool | None:
    """Whether a writer still runs; None when it is not of this host. Never touches the lock: a start might meet it."""
    if writer is None or writer[1] != socket.gethostname():
        return None
    try:
        os.kill(writer[0], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def group(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def is_of_training(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics tells of training steps."""
    return isinstance(line.get("step"), int) and "total_loss" in line


def last_lines(file: Path) -> list[dict[str, Any]]:
    """The whole ones at its end, the newest last; what a killed process left half is passed over."""
    try:
        with file.open("rb") as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - _TAIL_BYTES))
            tail = opened.read()
    except OSError:
        return []
    lines = []
    for text in tail.split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _last_line(metrics: Path) -> dict[str, Any]:
    return next((line for line in reversed(last_lines(metrics)) if is_of_training(line)), {})


def _total_steps(settings: Mapping[str, Any], line: Mapping[str, Any]) -> int | None:
    """As the plan has it; every line of metrics tells how long an epoch is, in whatever way it came about."""
    optim, epoch_length = group(settings, "optim"), group(settings, "train").get("epoch_length")
    if isinstance(total := optim.get("total_steps"), int):
        return total
    if not epoch_length and (epoch := _number(line.get("epoch"))):
        epoch_length = round(line["step"] / epoch)
    epochs = _number(optim.get("epochs"))
    return max(1, round(epochs * epoch_length)) if epochs and isinstance(epoch_length, int) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
