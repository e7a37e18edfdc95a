"""A small run of the real trainer, killed at random and started again at once: how much of its time is kept?

Between its starts another run of the same recipe is started, left alone for a few saves, and stopped: the seconds of
an undisturbed step, save and start, from which the prediction is made, come from the same minutes of the same machine.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from goodput import Conditions, after_interruption, exponential_draws, goodput, simulated_walls
from measuring import machine

from pathfm.checkpoint.store import step_of
from pathfm.data.pack import PackRequest, pack
from pathfm.errors import UserError
from pathfm.lifecycle.run import Run
from pathfm.random_streams import stream

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "vittiny14.yaml"
EVERY_STEPS = 20  # between saves
_SETTINGS = (  # a third of a second a step, on one core
    *("dino.head_n_prototypes=1024", "dino.head_hidden_dim=256", "dino.head_bottleneck_dim=64"),
    *("crops.global_crops_size=70", "crops.local_crops_size=28", "crops.local_crops_number=4"),
    *("train.batch_size_per_gpu=4", "train.precision=fp32", "train.num_workers=0", "train.log_every_steps=1"),
    *("train.epoch_length=100", f"checkpoint.every_steps={EVERY_STEPS}"),
)
_LOOK_EVERY_S = 0.02
_TAIL_BYTES = 16_384  # some lines of metrics
_WARM_UP = 2  # steps, whose slowness belongs to the start
_AFTERMATH = 6  # steps that the writing of a save slows down
_SAVES_UNDISTURBED = 2  # in each start that is left alone
_MEAN_IN_INTERVALS = 4  # between two interruptions: so many times a start and the work between two saves
_NO_END = 1_000_000  # steps
_SIMULATED_RUNS = 20_000


@dataclass
class Start:
    """What was seen of one process, in seconds since it was started."""

    steps: dict[int, float] = field(default_factory=dict)  # when each was done
    saves: dict[int, float] = field(default_factory=dict)  # when the checkpoint of a step was durable
    now: float = 0.0

    @property
    def last_step(self) -> int:
        return max(self.steps, default=0)


@dataclass(frozen=True)
class Times:
    """Seconds, one number for each start or save that was seen."""

    steps: Sequence[float]  # means of a start's steps that neither the start nor a save slows down
    stalls: Sequence[float]  # that a save costs training
    durables: Sequence[float]  # from a save's due until it is durable
    starts: Sequence[float]

    @property
    def step_s(self) -> float:
        return fmean(self.steps)

    @property
    def stall_s(self) -> float:
        return max(0.0, fmean(self.stalls))

    @property
    def durable_s(self) -> float:
        """After the stall."""
        return max(0.0, fmean(self.durables) - self.stall_s)

    @property
    def start_s(self) -> float:
        """Until the first new step begins."""
        return fmean(self.starts)


@dataclass(frozen=True)
class Interrupted:
    """A run from step `first` to `last`, and how long each of its starts lived; the last one reached its end."""

    first: int
    last: int
    starts: Sequence[Start]

    @property
    def wall_s(self) -> float:
        return sum(start.now for start in self.starts)

    @property
    def steps_trained(self) -> int:
        return sum(len(start.steps) for start in self.starts)


def measured_section(data: Path, work: Path, interruptions: int, mean_s: float | None, seed: int) -> str:
    """Train, interrupt, compare, in Markdown; takes minutes. `mean_s`: between two interruptions; None: what suits.

    Raises `UserError` when the work folder is there or the trainer fails.
    """
    if work.exists():
        raise UserError(f"{work} is there already; remove it, or name another by --work")
    if interruptions < 1:
        raise UserError(f"--interruptions must be 1 or more, not {interruptions}")
    pack(PackRequest(data, "pretrain", work / "data"))
    alone = trainer_of(work / "undisturbed", work / "data", _NO_END)
    alone.start(_is_begun)
    first = alone.start(_has_saved_enough)
    conditions, last_step = _to_interrupt(times([first]), interruptions, mean_s)
    run = trainer_of(work / "interrupted", work / "data", last_step)
    run.start(_is_begun)
    interrupted, others = _taking_turns(run, alone, last_step, 1 / conditions.sudden_per_s, seed)
    return section(interrupted, [first, *others], 1 / conditions.sudden_per_s, seed)


def _to_interrupt(seen: Times, interruptions: int, mean_s: float | None) -> tuple[Conditions, int]:
    """How often, and the last step of a run that is interrupted about so many times."""
    mean_s = mean_s or round(_MEAN_IN_INTERVALS * (seen.start_s + EVERY_STEPS * seen.step_s))
    run = conditions_of(seen, mean_s)
    return run, EVERY_STEPS + max(1, round(interruptions * mean_s * goodput(run, EVERY_STEPS) / run.step_s))


def _taking_turns(
    run: "Trainer", alone: "Trainer", last_step: int, mean_s: float, seed: int
) -> tuple[Interrupted, list[Start]]:
    """The run to its end, and as many starts of the other one, each behind one of the run's."""
    lives = stream(seed, 0, "interruptions")
    starts: list[Start] = []
    others: list[Start] = []
    while not starts or starts[-1].last_step < last_step:
        life = lives.exponential(mean_s)
        starts.append(run.start(lambda start, life=life: start.now >= life or start.last_step == last_step))
        print(f"start {len(starts)}: step {starts[-1].last_step:,} of {last_step:,}", file=sys.stderr)
        others.append(alone.start(_has_saved_enough))
    return Interrupted(EVERY_STEPS, last_step, starts), others


def _is_begun(start: Start) -> bool:
    """What only a first start does is done: pictures, a checkpoint of step 0."""
    return EVERY_STEPS in start.saves


def _has_saved_enough(start: Start) -> bool:
    saves = sorted(start.saves)
    return len(saves) >= _SAVES_UNDISTURBED and start.last_step >= saves[-1] + _AFTERMATH


class Trainer:
    """Starts a run again and again, each time until it is told to end it: by SIGKILL, with all its processes."""

    def __init__(self, directory: Path, command: Sequence[str]) -> None:
        self.run = Run(directory)
        self.command = command
        self.log = directory.with_suffix(".log")

    def start(self, is_over: Callable[[Start], bool]) -> Start:
        """Raises `UserError` when the trainer ends by itself before that."""
        seen, began = Start(), time.perf_counter()
        last_line, known = _last_step(self.run.metrics), self._checkpoints()
        with self.log.open("ab") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
            process = subprocess.Popen(
                self.command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        try:
            while not is_over(seen):
                if process.poll() is not None:
                    raise UserError(f"the trainer ended with {process.returncode} by itself; see {self.log}")
                time.sleep(_LOOK_EVERY_S)
                line, saves = _last_step(self.run.metrics), self._checkpoints()
                seen.now = time.perf_counter() - began
                if line > last_line:  # fewer: it went back to a checkpoint and forgot what came after
                    seen.steps[line] = seen.now
                seen.saves.update(dict.fromkeys(saves - known, seen.now))
                last_line, known = line, known | saves
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return seen

    def _checkpoints(self) -> set[int]:
        folder = self.run.checkpoints
        found = folder.iterdir() if folder.is_dir() else ()
        return {step_of(path) for path in found if path.name.removeprefix("step_").isdigit()}


def trainer_of(directory: Path, data: Path, total_steps: int) -> Trainer:
    settings = [f"train.dataset_path=Pathology:root={data}", f"optim.total_steps={total_steps}", *_SETTINGS]
    program = [sys.executable, "-m", "pathfm.train", "--config-file", str(CONFIG), "--output-dir", str(directory)]
    return Trainer(directory, [*program, *settings])


def _last_step(metrics: Path) -> int:
    """Of the last whole line; 0 where there is none."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(json.loads(lines[-1])["step"]) if lines else 0


# ---- what was seen, in numbers


def times(starts: Sequence[Start]) -> Times:
    """Of the starts that lived long enough; at least one must have steps that neither it nor a save slows down."""
    steady = [fmean(seconds) for start in starts if (seconds := _steady(start))]
    step_s = fmean(steady)
    return Times(
        steps=steady,
        stalls=[cost for start in starts for cost in _costs_of_saves(start, step_s)],
        durables=[
            start.saves[step] - start.steps[step] for start in starts for step in start.saves if step in start.steps
        ],
        starts=[_ready(start, step_s) for start in starts if len(start.steps) >= _WARM_UP],
    )


def conditions_of(seen: Times, mean_s: float) -> Conditions:
    """Of a process that is killed every `mean_s` seconds in the mean, and started again at once."""
    return Conditions(seen.step_s, seen.stall_s, seen.durable_s, seen.start_s, sudden_per_s=1 / mean_s)


def _laps(start: Start) -> dict[int, float]:
    """Seconds of every step but the first."""
    return {step: start.steps[step] - start.steps[step - 1] for step in start.steps if step - 1 in start.steps}


def _steady(start: Start) -> list[float]:
    first = min(start.steps, default=0)
    return [
        seconds
        for step, seconds in _laps(start).items()
        if step >= first + _WARM_UP and (step - 1) % EVERY_STEPS >= _AFTERMATH
    ]


def _costs_of_saves(start: Start, step_s: float) -> list[float]:
    """How much longer than usual the steps after a save take: the copy, and what its writing takes from training."""
    return [
        start.steps[save + _AFTERMATH] - start.steps[save] - _AFTERMATH * step_s
        for save in start.steps
        if save % EVERY_STEPS == 0 and save + _AFTERMATH in start.steps
    ]


def _ready(start: Start, step_s: float) -> float:
    """When the first step would have begun, had it and the next taken no longer than later ones."""
    return start.steps[min(start.steps) + _WARM_UP - 1] - _WARM_UP * step_s


# ---- in words


def section(interrupted: Interrupted, undisturbed: Sequence[Start], mean_s: float, seed: int) -> str:
    """The comparison in Markdown."""
    alone, within = times(undisturbed), times(interrupted.starts)
    run, kept = conditions_of(alone, mean_s), interrupted.last - interrupted.first
    by_chance = kept * run.step_s / _walls(run, interrupted, stream(seed, 1, "interruptions"))
    replayed = replayed_steps(run, interrupted)
    replayed_by_own = replayed_steps(conditions_of(within, mean_s), interrupted)
    measured = kept * run.step_s / interrupted.wall_s
    low, high = np.quantile(by_chance, (0.025, 0.975))
    found = {
        "formula, a run without an end": f"{goodput(run, EVERY_STEPS):.3f}",
        "simulated, runs of this length: mean, and where 95 % of them lie": (
            f"{1 / np.mean(1 / by_chance):.3f} ({low:.3f} to {high:.3f})"
        ),
        "simulated, starts cut off when they were in fact": f"{replayed * run.step_s / interrupted.wall_s:.3f}",
        "measured": f"{measured:.3f}",
    }
    is_within = "lies within" if low <= measured <= high else "LIES OUTSIDE"
    return "\n".join(
        [
            f"{machine()}, {date.today()}. ViT-Ti/14 on small crops, one process with one thread, saved every "
            f"{EVERY_STEPS} steps, killed by SIGKILL at exponential times of {mean_s:g} s in the mean (seed {seed}) "
            f"and started again at once. {len(interrupted.starts) - 1} interruptions in {interrupted.wall_s:.0f} s; "
            f"{interrupted.steps_trained:,} steps were trained and {kept:,} kept.",
            "",
            "| seconds: mean, range, number of starts or saves | left alone | in the interrupted run |",
            "| --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in _in_rows(alone, within)),
            "",
            "| goodput | |",
            "| --- | --- |",
            *(f"| {what} | {value} |" for what, value in found.items()),
            "",
            f"The measured value {is_within} the band, which is wide because the interruptions are few. Cut off when "
            f"it was, the run kept {_beside(kept, replayed)} steps than is predicted from {len(undisturbed)} starts "
            f"that were left alone, between its own, and {_beside(kept, replayed_by_own)} than from the times seen in "
            "the run itself: the first tests the model and the steadiness of the machine, the second only the model.",
        ]
    )


def _in_rows(*columns: Times) -> list[Sequence[str]]:
    """A row for each kind of time: means, and the range over starts or saves."""
    names = {"steps": "of one step", "stalls": "that a save costs", "durables": "from its due until a save is durable"}
    names["starts"] = "from a start to its first new step"
    return [[text, *(_mean_and_range(getattr(column, kind)) for column in columns)] for kind, text in names.items()]


def _beside(kept: float, predicted: float) -> str:
    return f"{abs(kept / predicted - 1):.1%} {'more' if kept > predicted else 'fewer'}"


def _mean_and_range(seconds: Sequence[float]) -> str:
    return f"{fmean(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f}; {len(seconds)})" if seconds else ""


def _walls(run: Conditions, interrupted: Interrupted, rng: np.random.Generator) -> np.ndarray:
    draws = exponential_draws(run, rng, _SIMULATED_RUNS)
    return simulated_walls(run, EVERY_STEPS, interrupted.first, interrupted.last, draws, _SIMULATED_RUNS)


def replayed_steps(run: Conditions, interrupted: Interrupted) -> float:
    """How many would be kept, were the starts cut off when they were in fact; the last one is left at its last step."""
    step: Any = interrupted.first
    for start in interrupted.starts[:-1]:
        step, _ = after_interruption(run, EVERY_STEPS, step, start.now, False)
    step, _ = after_interruption(run, EVERY_STEPS, step, interrupted.starts[-1].now, True)
    return float(step) - interrupted.first
