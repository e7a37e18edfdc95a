"""The loop: batches in, steps, reports, checkpoints; it leaves between two steps and says why."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal, TypeVar

import torch

from pathfm.batch import Batch, Skipped
from pathfm.checkpoint.config import CheckpointConfig
from pathfm.checkpoint.store import Store
from pathfm.data.config import CorruptPolicy
from pathfm.dist.collect import agree_any, gather_lists
from pathfm.dist.env import Ranks
from pathfm.errors import UserError
from pathfm.log import get_logger
from pathfm.track.report import Report
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.plan import TrainingPlan
from pathfm.training.state import TrainingState
from pathfm.training.step import train_step

_log = get_logger(__name__)
Verdict = Literal["done", "interrupted"]
Item = TypeVar("Item")


class NotFinite(UserError):
    """Too many steps in a row without a finite loss and gradient."""


class TooManyCorrupt(UserError):
    """More samples could not be decoded than `data.corrupt_samples` allows."""


@dataclass(frozen=True)
class Surroundings:
    """What the loop talks to; everything here may be replaced in a test."""

    store: Store
    report: Report
    leave: Callable[[], str | None]  # a reason to stop between two steps, e.g. a signal's name
    quarantine: Callable[[int, Skipped], None]  # called on rank 0 for every sample that was passed over
    accident: Callable[[int, dict[str, float]], None]  # called on rank 0 for every step that was passed over
    export: Callable[[int], bool]  # called on rank 0 when the teacher's weights are due; False: it failed


@dataclass
class Loop:
    """Trains `state` to the plan's last step."""

    state: TrainingState
    plan: TrainingPlan
    train: TrainConfig
    optim: OptimConfig
    checkpoint: CheckpointConfig
    corrupt: CorruptPolicy
    ranks: Ranks
    device: torch.device
    around: Surroundings
    _watch: "_Stopwatch" = field(default_factory=lambda: _Stopwatch())
    _skipped: list[Skipped] = field(default_factory=list)
    _saves_failed: int = 0

    def run(self, batches: Iterable[Batch]) -> Verdict:
        """Raises `NotFinite`, `TooManyCorrupt`, and whatever the loader raises."""
        if self._must_leave():  # a signal came while torch was imported or the checkpoint read
            self.save()
            return "interrupted"
        self._judge_samples()  # a run that its data stopped stops again, unless the policy is another now
        for batch in self._watch.waiting(batches):
            self._step(batch)
            if self._is_due(self.train.log_every_steps):
                self._report()
            if self._is_due(self._steps_between_saves()):
                self.save()
            if (every := self.checkpoint.export_every_steps) and self.state.step % every == 0 and self.ranks.is_first:
                self.around.export(self.state.step)
            self._judge_samples()
            if self._must_leave():
                self.save()
                return "interrupted"
        self.save()
        return "done"

    def save(self) -> None:
        """Write a checkpoint. A write that fails harms nothing that was published, and training goes on."""
        self._quarantine()  # so that the count in the checkpoint is that of its own step
        snapshot = self.state.snapshot()
        self.around.report.flush()
        if not self.ranks.is_first:
            return
        try:
            self.around.store.save(snapshot)
            self._saves_failed = 0
        except OSError as error:
            self._saves_failed += 1
            _log.warning(
                "the checkpoint of step %d could not be written (%s; failure %d in a row); earlier ones are untouched",
                snapshot.step, error, self._saves_failed,
            )  # fmt: skip

    @property
    def last_save_failed(self) -> bool:
        return self._saves_failed > 0

    def _step(self, batch: Batch) -> None:
        self._skipped.extend(batch.skipped)
        values = self.plan.schedules.at(self.state.step)
        train_step(self.state, batch.to(self.device), values, self.train, self.optim, self.ranks.rank)
        self.around.report.step(self.state.step)

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.plan.total_steps

    def _steps_between_saves(self) -> int:
        return self.checkpoint.every_steps or max(1, round(self.checkpoint.every_epochs * self.plan.epoch_length))

    def _must_leave(self) -> bool:
        if self.state.step == self.plan.total_steps:
            return False
        reason = self.around.leave()
        if reason:
            _log.info("%s: a checkpoint of step %d is written, then this process leaves", reason, self.state.step)
        return agree_any(reason is not None)

    def _report(self) -> None:
        self._quarantine()
        series = self.state.meter.read()
        self._look_for_accidents(series)
        self.around.report.interval(self._line(series))
        self.state.meter.clear()

    def _line(self, series: dict[str, list[float]]) -> dict[str, Any]:
        step = self.state.step
        values = self.plan.schedules.at(step - 1)
        return {
            "step": step,
            "samples_seen": step * self.plan.global_batch_size,
            "epoch": step / self.plan.epoch_length,
            "lr": values.lr,
            "weight_decay": values.weight_decay,
            "momentum": values.momentum,
            "teacher_temp": values.teacher_temp,
            **{name: _mean_of_finite(column) for name, column in series.items() if name != "finite"},
            "steps_skipped": sum(1 for finite in series["finite"] if finite < 1),
            "samples_skipped": self.state.samples_skipped,
            "timing": self._watch.lap(self.plan.global_batch_size),
        }

    def _quarantine(self) -> None:
        skipped = gather_lists(self._skipped)
        self._skipped.clear()
        self.state.samples_skipped += len({sample.position for sample in skipped})  # of a position there may be several
        for sample in skipped if self.ranks.is_first else ():
            self.around.quarantine(self.state.step, sample)

    def _judge_samples(self) -> None:
        """Stop, with a checkpoint to go on from, when more samples were passed over than the policy allows.

        All ranks judge the same count. It is brought up to date at every report, under the policy `raise` at once.
        """
        if self.corrupt.kind == "raise" and agree_any(bool(self._skipped)):
            self._quarantine()
        num_seen = self.state.step * self.plan.global_batch_size
        if self.corrupt.is_broken_by(self.state.samples_skipped, num_seen):
            self.save()
            raise TooManyCorrupt(
                f"{self.state.samples_skipped:,} of the {num_seen:,} samples so far could not be decoded, more than "
                f"data.corrupt_samples={self.corrupt} allows; go on with data.corrupt_samples=skip, "
                "or begin anew on mended data"
            )

    def _look_for_accidents(self, series: dict[str, list[float]]) -> None:
        """Every step was already passed over on the device; here it is counted, written down, and enough is enough."""
        first = self.state.step - len(series["finite"])
        for offset, finite in enumerate(series["finite"]):
            self.state.steps_skipped_in_a_row = 0 if finite == 1 else self.state.steps_skipped_in_a_row + 1
            if finite < 1 and self.ranks.is_first:
                self.around.accident(first + offset, {name: column[offset] for name, column in series.items()})
            if self.state.steps_skipped_in_a_row >= self.optim.max_skipped_steps:
                raise NotFinite(
                    f"the loss or gradient was not finite for {self.state.steps_skipped_in_a_row} steps in a row, "
                    f"the last one step {first + offset}; the samples and losses are in the run's accidents/ folder, "
                    "its checkpoints are as they were. Begin another run with a lower optim.base_lr or "
                    "train.precision=fp32"
                )


class _Stopwatch:
    """Wall time of the steps, and how much of it was spent waiting for the loader."""

    def __init__(self) -> None:
        self._begin_lap()

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - started
            self._steps += 1
            yield item

    def lap(self, samples_per_step: int) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._started, 1e-9)
        speed = {
            "seconds_per_step": seconds / max(self._steps, 1),
            "samples_per_second": self._steps * samples_per_step / seconds,
            "data_wait_fraction": self._waited / seconds,
        }
        self._begin_lap()
        return speed

    def _begin_lap(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
        self._steps = 0


def _mean_of_finite(column: list[float]) -> float | None:
    """JSON has no NaN: a metric that was never finite in the interval is null."""
    finite = [value for value in column if math.isfinite(value)]
    return fmean(finite) if finite else None
