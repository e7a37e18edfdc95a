"""The loop: batches in, steps, reports, checkpoints; it leaves between two steps and says why."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any, Literal, NamedTuple, TypeVar

import torch

from pathfm.batch import Batch, Skipped
from pathfm.checkpoint.config import CheckpointConfig
from pathfm.checkpoint.saver import Saver, Snapshot
from pathfm.data.config import CorruptPolicy
from pathfm.data.order import BatchRange, batch_of_step
from pathfm.dist.agreement import Agreement
from pathfm.dist.collect import agree_any, gather_lists
from pathfm.dist.env import Ranks
from pathfm.errors import UserError
from pathfm.log import get_logger
from pathfm.track.report import Report
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.early_stopping import Judgement
from pathfm.training.online import Online
from pathfm.training.plan import TrainingPlan
from pathfm.training.prefetch import made_ready
from pathfm.training.state import TrainingState
from pathfm.training.step import train_step
from pathfm.training.tuning import ToldToLeave

_log = get_logger(__name__)
Verdict = Literal["done", "stopped", "interrupted", "accident"]
Item = TypeVar("Item")


class TooManyCorrupt(UserError):
    """More samples could not be decoded than `data.corrupt_samples` allows."""


@dataclass(frozen=True)
class Accident:
    """A step without a finite loss or gradient: its losses and norms, the mean over ranks and of each rank."""

    step: int
    batch: int
    values: dict[str, float]
    of_ranks: list[dict[str, float]]


@dataclass(frozen=True)
class Surroundings:
    """What the loop talks to; everything here may be replaced in a test."""

    saver: Saver
    report: Report
    agreement: Agreement
    leave: Callable[[], str | None]  # a reason to stop between two steps, e.g. a signal's name
    seconds_since_told: Callable[[], float]  # since there was a reason to leave
    quarantine: Callable[[int, Skipped], None]  # called on rank 0 for every sample that was passed over
    accident: Callable[[Accident], None]  # called on rank 0 for every step that was passed over
    export: Callable[[int], bool]  # called on all ranks when the teacher's weights are due; False: it failed
    crop: Callable[[Batch], Batch] = lambda batch: batch  # makes crops of a batch on the device, if it has none yet
    doing: Callable[[int, str], None] = lambda step, what: None  # told what comes next, for whoever watches
    usage: Callable[[float], dict[str, float | None]] = lambda samples_per_second: {}  # of the GPU since last asked
    paint: Callable[[int], None] = lambda step: None  # on all ranks: a picture of what the teacher sees
    keep_best: Callable[[int, dict[str, Any]], None] = lambda step, by: None  # on all ranks, after a better tuning


class Notes(NamedTuple):
    """What a rank has to say after a step, and what it hears: the maximum over the ranks."""

    told_ms: int = 0  # since a rank was told to leave, at least 1; 0: none was
    corrupt: int = 0  # a sample could not be decoded
    save_again: int = 0  # a checkpoint could not be written, and it is time to try again


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
    online: Online
    _watch: "_Stopwatch" = field(default_factory=lambda: _Stopwatch())
    _skipped: list[Skipped] = field(default_factory=list)
    forgot: bool = False  # at the last tuning, more than the guard allows
    _painted: int = -1  # the step of the last picture
    _saves_failed: int = 0
    _save_again_at: float = math.inf

    def run(self, batches: Iterable[Batch]) -> Verdict:
        """`batches`: this rank's, from the state's step on, each in the plan's parts. All ranks call this together.

        Returns `accident` after too many steps in a row without a finite loss: go back, then run again.
        Raises `TooManyCorrupt`, and whatever the loader raises.
        """
        if agree_any(self.around.leave() is not None):  # it came while torch was imported or the checkpoint read
            return self._leave(self._since_told())
        if self.state.step == 0:
            self.save()  # a rehearsal: what could fail fails now, and an early accident has something to go back to
        self._judge_samples()  # a run that its data stopped stops again, unless the policy is another now
        if self.state.step and self.state.step == self.state.tuning.best_step:
            self._keep_best()  # it may have been killed after the checkpoint and before this
        if self._tuning_is_due() and (verdict := self._tune()):  # it left before it came to that
            return verdict
        steps = self._watch.waiting(_in_steps(self._told(batches), self.plan.parts))
        for parts in made_ready(steps, self._on_device, self.device):
            self._step(parts)
            heard = self._exchange()
            report, save = self._is_due(self.train.log_every_steps), self._is_due(self._steps_between_saves())
            tune = self._tuning_is_due()
            if (report or save or tune or heard != Notes()) and self._comes_to_an_accident():
                return "accident"
            if report:
                self._report()
            if tune and not heard.told_ms and (verdict := self._tune()):
                return verdict
            if save or heard.save_again:
                self.save()
            if (every := self.checkpoint.export_every_steps) and self.state.step % every == 0:
                self.around.saver.wait()  # it writes without the checksums that others expect in an export
                self.around.export(self.state.step)
                self._paint()
            self._judge_samples(heard.corrupt > 0)
            if heard.told_ms and (self.state.step < self.plan.total_steps or tune):
                return self._leave(heard.told_ms / 1000)
        return self._finish("done")

    def save(self) -> None:
        """Write a checkpoint. A write that fails harms nothing that was published, and training goes on."""
        self.around.doing(self.state.step, "checkpoint")
        self._save_again_at = math.inf
        self._quarantine()  # so that the count in the checkpoint is that of its own step
        values = self.state.values()
        self.around.report.flush()
        is_good = self.state.accidents_in_a_row == 0
        stalled = self.around.saver.start(Snapshot(self.state.step, self.state.tensors(), values, is_good))
        if not self.checkpoint.in_background:
            started = time.perf_counter()
            self.around.saver.wait()
            stalled += time.perf_counter() - started
        self._watch.stalled(stalled)

    @property
    def last_save_failed(self) -> bool:
        return self._saves_failed > 0

    @property
    def bad_steps(self) -> range:
        """After an accident: those in a row without a finite loss."""
        return range(self.state.steps_judged - self.state.accidents_in_a_row, self.state.steps_judged)

    def batches_of(self, steps: range) -> BatchRange:
        return self._batch_of(steps.start), self._batch_of(steps.stop - 1) + 1

    def _step(self, parts: list[Batch]) -> None:
        self.around.doing(self.state.step, "step")
        self._skipped.extend(skipped for part in parts for skipped in part.skipped)
        values = self.plan.schedules.at(self.state.step)
        train_step(self.state, parts, values, self.train, self.optim, self.ranks)
        self._watch.stepped()
        self.around.report.step(self.state.step)

    def _on_device(self, parts: list[Batch]) -> list[Batch]:
        return [self.around.crop(part.to(self.device)) for part in parts]

    def _told(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        iterator = iter(batches)
        while True:
            self.around.doing(self.state.step, "waiting for data")
            if (batch := next(iterator, None)) is None:
                return
            yield batch

    def _is_due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.plan.total_steps

    def _steps_between_saves(self) -> int:
        return self.checkpoint.every_steps or max(1, round(self.checkpoint.every_epochs * self.plan.epoch_length))

    def _exchange(self) -> Notes:
        """All ranks hear the same, at the same step."""
        self._hear_of_saves()
        self.around.doing(self.state.step, "agreement")
        told_ms = 1 + int(1000 * self.around.seconds_since_told()) if self.around.leave() is not None else 0
        corrupt = self.corrupt.kind == "raise" and bool(self._skipped)
        save_again = time.monotonic() >= self._save_again_at
        return Notes(*self.around.agreement.exchange([told_ms, int(corrupt), int(save_again)]))

    def _since_told(self) -> float:
        """The longest of all ranks, in seconds."""
        return max(gather_lists([self.around.seconds_since_told()]))

    def _leave(self, since_told_s: float) -> Verdict:
        """Save this very step if the time suffices; what is published already stays in any case."""
        deadline = time.monotonic() + self.checkpoint.leave_within_s - since_told_s
        _log.info(
            "%s: a checkpoint of step %d is written, then this process leaves",
            self.around.leave() or "another rank was told to leave", self.state.step,
        )  # fmt: skip
        saver = self.around.saver
        if saver.wait(_seconds_until(deadline)):
            self.save()
        if not saver.wait(_seconds_until(deadline)):
            _log.warning(
                "the checkpoint of step %d was not complete within checkpoint.leave_within_s=%g; this process leaves "
                "all the same, and the run goes on from step %d",
                self.state.step, self.checkpoint.leave_within_s, saver.store.newest_step() or 0,
            )  # fmt: skip
        self._hear_of_saves()
        return "interrupted"

    def _finish(self, verdict: Verdict) -> Verdict:
        self._paint()
        self._save_and_wait()
        return verdict

    def _paint(self) -> None:
        if self.state.step != self._painted:
            started, self._painted = time.perf_counter(), self.state.step
            self.around.doing(self.state.step, "picture")
            self.around.paint(self.state.step)
            self._watch.paused(time.perf_counter() - started)

    def _save_and_wait(self) -> None:
        self.save()
        self.around.saver.wait()
        self._hear_of_saves()

    def _tuning_is_due(self) -> bool:
        return self.online.is_due(self.state.step, self.state.tuning)

    def _tune(self) -> Verdict | None:
        """Score student and teacher. All ranks call this together; a verdict when the run is over, or told to leave."""
        started = time.perf_counter()
        try:
            judgement, line = self.online.score(self.state.step, self.state.tuning, self._goes_on_tuning)
        except ToldToLeave:
            return self._leave(self._since_told())
        finally:
            self._watch.paused(time.perf_counter() - started)
        self.state.tuning = judgement.state
        self.around.report.tuning(line)
        self.forgot = judgement.forgot is not None
        if self.forgot:
            self._tell_of_forgetting(judgement)
        if judgement.improved:
            self._save_and_wait()
            self._keep_best()
        self._paint()
        return self._finish("stopped") if judgement.stop else None

    def _keep_best(self) -> None:
        tuning = self.state.tuning
        self.around.keep_best(self.state.step, {"metric": tuning.metric, "value": tuning.best})

    def _tell_of_forgetting(self, judgement: Judgement) -> None:
        metric, start = judgement.state.metric, judgement.state.at_start
        self.around.report.alarm(
            self.state.step,
            "forgetting",
            f"the teacher's {metric} is {judgement.forgot:.4f} below its {start:.4f} of step 0, more than "
            f"tune.guard.max_drop={self.online.config.guard.max_drop:g}: begin another run with a lower optim.base_lr, "
            "a longer optim.freeze_backbone_pct or more student.freeze_blocks",
        )

    def _goes_on_tuning(self) -> bool:
        self.around.doing(self.state.step, "tuning")
        return self.around.leave() is None

    def _hear_of_saves(self) -> None:
        for outcome in self.around.saver.outcomes():
            if outcome.error is None:
                self._saves_failed = 0
                continue
            self._saves_failed += 1
            self._save_again_at = time.monotonic() + self.checkpoint.retry_after_s
            _log.warning(
                "the checkpoint of step %d could not be written (%s; failure %d in a row); earlier ones are untouched, "
                "training goes on and tries again",
                outcome.step, outcome.error, self._saves_failed,
            )  # fmt: skip
            if self._saves_failed == self.checkpoint.alarm_after_failures:
                self.around.report.alarm(
                    self.state.step,
                    "checkpoints",
                    f"they cannot be written: {self._saves_failed} failures in a row, the last one: {outcome.error}. "
                    f"If this process ends now, all steps since {self.around.saver.store.newest_step() or 0} are lost; "
                    "make room",
                )

    def _report(self) -> None:
        self._quarantine()
        self.around.report.interval(self._line(self.state.meter.read()))
        self.state.meter.clear()

    def _line(self, series: dict[str, list[float]]) -> dict[str, Any]:
        step = self.state.step
        values = self.plan.schedules.at(step - 1)
        return {
            **self.plan.place(step),
            "lr": values.lr,
            "weight_decay": values.weight_decay,
            "momentum": values.momentum,
            "teacher_temp": values.teacher_temp,
            **{name: _mean_of_finite(column) for name, column in series.items() if name not in ("finite", "accident")},
            "steps_skipped": sum(1 for finite in series["finite"] if finite < 1),
            "samples_skipped": self.state.samples_skipped,
            "health/skipped_share": self.state.samples_skipped / (step * self.plan.global_batch_size),
            "batches_passed_over": sum(behind - first for first, behind in self.state.passed_over),
            "timing": self._timing(),
        }

    def _timing(self) -> dict[str, float | None]:
        timing = self._watch.lap(self.plan.global_batch_size)
        return {**timing, **self.around.usage(timing["samples_per_second"])}

    def _quarantine(self) -> None:
        skipped = gather_lists(self._skipped)
        self._skipped.clear()
        self.state.samples_skipped += len({sample.position for sample in skipped})  # of a position there may be several
        for sample in skipped if self.ranks.is_first else ():
            self.around.quarantine(self.state.step, sample)

    def _judge_samples(self, corrupt: bool = False) -> None:
        """Stop, with a checkpoint to go on from, when more samples were passed over than the policy allows.

        All ranks judge the same count. It is brought up to date at every report, and under the policy `raise` when
        ranks have heard that one met a sample that it could not decode.
        """
        if corrupt:
            self._quarantine()
        num_seen = self.state.step * self.plan.global_batch_size
        if self.corrupt.is_broken_by(self.state.samples_skipped, num_seen):
            self.save()
            self.around.saver.wait()
            raise TooManyCorrupt(
                f"{self.state.samples_skipped:,} of the {num_seen:,} samples so far could not be decoded, more than "
                f"data.corrupt_samples={self.corrupt} allows; go on with data.corrupt_samples=skip, "
                "or begin anew on mended data"
            )

    def _comes_to_an_accident(self) -> bool:
        """Judge the steps since this was last asked; True as soon as there are too many in a row.

        Every such step was already passed over on the device; here it is counted and written down.
        """
        state, series = self.state, self.state.meter.read()
        first = state.step - len(series["accident"])
        while state.steps_judged < state.step:
            offset = state.steps_judged - first
            state.steps_judged += 1
            if not series["accident"][offset]:
                state.accidents_in_a_row = 0
                continue
            state.accidents_in_a_row += 1
            self._write_down(first + offset, {name: column[offset] for name, column in series.items()})
            if state.accidents_in_a_row >= self.optim.max_skipped_steps:
                return True
        return False

    def _write_down(self, step: int, values: dict[str, float]) -> None:
        of_ranks = gather_lists([self.state.meter.own(self.state.step - 1 - step)])
        if self.ranks.is_first:
            self.around.accident(Accident(step, self._batch_of(step), values, of_ranks))

    def _batch_of(self, step: int) -> int:
        return batch_of_step(step, self.state.passed_over)


class _Stopwatch:
    """Wall time of the steps, and how much of it was spent waiting for the loader and for checkpoints."""

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
            yield item

    def stepped(self) -> None:
        self._steps += 1

    def stalled(self, seconds: float) -> None:
        self._stalled += seconds

    def paused(self, seconds: float) -> None:
        """What happened between two steps and belongs to neither."""
        self._started += seconds

    def lap(self, samples_per_step: int) -> dict[str, float]:
        seconds = max(time.perf_counter() - self._started, 1e-9)
        speed = {
            "seconds_per_step": seconds / max(self._steps, 1),
            "samples_per_second": self._steps * samples_per_step / seconds,
            "data_wait_fraction": self._waited / seconds,
            "checkpoint_stall_s": self._stalled,
        }
        self._begin_lap()
        return speed

    def _begin_lap(self) -> None:
        self._started = time.perf_counter()
        self._waited = 0.0
        self._stalled = 0.0
        self._steps = 0


def _in_steps(parts: Iterator[Item], parts_per_step: int) -> Iterator[list[Item]]:
    while step := list(islice(parts, parts_per_step)):
        assert len(step) == parts_per_step, (len(step), parts_per_step)
        yield step


def _seconds_until(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _mean_of_finite(column: list[float]) -> float | None:
    """JSON has no NaN: a metric that was never finite in the interval is null."""
    finite = [value for value in column if math.isfinite(value)]
    return fmean(finite) if finite else None
