"""Goodput of a run that is interrupted: the share of wall time that became steps which were kept. Formula, simulation.

What pathfm does between two starts, and so what both assume. A save falls due every W seconds of work. It stops
training for C seconds, while the state is copied. D seconds later it is durable, and training has gone on meanwhile.
The next save waits for it, so that copies follow each other every T = max(W, D) + C seconds. A job holds its nodes for
R seconds before training goes on, and has waited Q seconds for them. Interruptions of the job come at rate l, are
independent of each other, and of what training is doing: they are exponential. One that comes without notice, a lost
node, throws away what is not durable. One with enough notice ends when the step that is under way is done and saved.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

_MOST_STEPS = 10_000_000  # between two saves that are looked at
_GRID = 4000  # intervals that are looked at first
_NORMAL_95 = 1.96

Numbers = Any  # one, or an array of them
Draws = Callable[[], tuple[Numbers, Numbers]]  # for each run: seconds until it is interrupted, whether with notice


@dataclass(frozen=True)
class Conditions:
    """Seconds, and interruptions of the whole job in a second."""

    step_s: float
    stall_s: float  # C
    durable_s: float  # D
    start_s: float  # R, from the job's start until the first new step begins; it may be interrupted too
    queue_s: float = 0.0  # Q
    sudden_per_s: float = 0.0  # without notice
    warned_per_s: float = 0.0  # with so much notice that the step under way is saved

    def __post_init__(self) -> None:
        assert self.step_s > 0, self
        assert min(self.stall_s, self.durable_s, self.start_s, self.queue_s) >= 0, self
        assert min(self.sudden_per_s, self.warned_per_s) >= 0, self

    @property
    def interruptions_per_s(self) -> float:
        return self.sudden_per_s + self.warned_per_s

    @property
    def leaving_s(self) -> float:
        """The most that a save of the step under way takes, from the notice on: the notice that suffices."""
        return self.step_s + self.stall_s + 2 * self.durable_s  # an earlier save may be on its way to the disk

    def period_s(self, every_steps: Numbers) -> Numbers:
        """T: from the end of one copy to the end of the next."""
        return np.maximum(every_steps * self.step_s, self.durable_s) + self.stall_s


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    half_width: float

    def holds(self, value: float) -> bool:
        return abs(self.mean - value) <= self.half_width


def goodput(run: Conditions, every_steps: Numbers) -> Numbers:
    """Expected share of an endless run's wall time, by renewal: what a start keeps, by how long it takes.

    A start lives X ~ Exp(l) seconds, the first R of which train nothing; exp(-l R) of the starts come further. By
    memorylessness these train another Exp(l) seconds. Copy k = 1, 2, ... ends after W + C + (k - 1) T of them, so

        copies = sum over k of P(copy k ended) = exp(-l (W + C)) / (1 - exp(-l T))

    Without notice W is kept for each copy that is durable: W copies exp(-l D). With notice all work is kept: training
    is at work with probability (1 - exp(-l W)) (1 + copies), and then half a step is added, which finishes the one
    under way. Leaving takes C + D, and the rest of D where a save is on its way already.

    That is for starts at the beginning of an interval. One that follows a notice goes on from anywhere in it, so that
    in the long run training is at work W / T of its time, and 1 / (l T) copies end.

    With D = Q = 0 and no notice this is Daly's complete model, l W exp(-l R) / (exp(l (W + C)) - 1), as a share of time
    (doi:10.1016/j.future.2004.11.016). It is exact where none has notice; where all have, it asks for D <= W and for
    steps that are short beside 1 / l; of both kinds together it leaves out something of the order of (l T)^2 / 12.
    """
    work, period, rate = every_steps * run.step_s, run.period_s(every_steps), run.interruptions_per_s
    if rate == 0:
        return work / period
    share_warned = run.warned_per_s / rate
    begin_to_train = np.exp(-rate * run.start_s)
    copies = np.exp(-rate * (work + run.stall_s)) / -np.expm1(-rate * period)
    kept_sudden = work * copies * np.exp(-rate * run.durable_s)
    at_work = _mixed(share_warned, work / period, -np.expm1(-rate * work) * (1 + copies))
    copies = _mixed(share_warned, 1 / (rate * period), copies)
    kept_warned = at_work * (1 / rate + run.step_s / 2)
    on_its_way = copies * (run.durable_s + np.expm1(-rate * run.durable_s) / rate)
    leaving = at_work * run.step_s / 2 + on_its_way + run.stall_s + run.durable_s
    kept = begin_to_train * ((1 - share_warned) * kept_sudden + share_warned * kept_warned)
    return kept / (run.queue_s + 1 / rate + share_warned * begin_to_train * leaving)


def _mixed(share: float, one: Numbers, other: Numbers) -> Numbers:
    return share * one + (1 - share) * other


def best_every_steps(run: Conditions, most: int = _MOST_STEPS) -> int:
    """The steps between saves at which `goodput` is largest; `most` where saves only cost."""
    grid = _whole_steps(1, most)
    best = int(np.argmax(goodput(run, grid)))
    between = _whole_steps(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    return int(between[np.argmax(goodput(run, between))])


def nearly_best(run: Conditions, lost: float, most: int = _MOST_STEPS) -> tuple[int, int]:
    """The fewest and the most steps between saves that cost no more than this share of the largest goodput."""
    grid = np.append(_whole_steps(1, most), best_every_steps(run, most))
    values = goodput(run, grid)
    good = grid[values >= (1 - lost) * values.max()]
    return int(good.min()), int(good.max())


def _whole_steps(least: int, most: int) -> np.ndarray:
    return np.unique(np.rint(np.geomspace(least, most, _GRID)))


def young_interval_s(stall_s: float, mean_between_s: float) -> float:
    """Seconds of work between saves, to first order (Young 1974, doi:10.1145/361147.361115)."""
    return float(np.sqrt(2 * stall_s * mean_between_s))


def daly_interval_s(stall_s: float, mean_between_s: float) -> float:
    """Seconds of work between saves, to higher order (Daly 2006, doi:10.1016/j.future.2004.11.016)."""
    if stall_s >= 2 * mean_between_s:
        return mean_between_s
    part = stall_s / (2 * mean_between_s)
    return young_interval_s(stall_s, mean_between_s) * (1 + np.sqrt(part) / 3 + part / 9) - stall_s


# ---- simulation


def simulated_goodput(
    run: Conditions, every_steps: int, rng: np.random.Generator, num_runs: int = 500, interruptions: int = 400
) -> Estimate:
    """Of runs without an end that are interrupted so often each; they know nothing of the formula."""
    if run.interruptions_per_s == 0:
        return Estimate(every_steps * run.step_s / run.period_s(every_steps), 0.0)
    draws = exponential_draws(run, rng, num_runs)
    step, wall = np.zeros(num_runs), np.zeros(num_runs)
    for _ in range(interruptions):
        lived, is_warned = draws()
        step, leaving = after_interruption(run, every_steps, step, lived, is_warned)
        wall += run.queue_s + lived + leaving
    work = step * run.step_s
    mean = work.sum() / wall.sum()
    deviation = np.std(work - mean * wall, ddof=1)
    return Estimate(float(mean), float(_NORMAL_95 * deviation / np.sqrt(num_runs) / wall.mean()))


def simulated_walls(
    run: Conditions, every_steps: int, first_step: int, last_step: int, draws: Draws, num_runs: int = 1
) -> np.ndarray:
    """Seconds until `last_step` is done, from a start at `first_step` on; as many as `draws` tells of."""
    step, wall, is_done = np.full(num_runs, float(first_step)), np.zeros(num_runs), np.zeros(num_runs, dtype=bool)
    while not is_done.all():
        lived, is_warned = draws()
        needed = run.start_s + seconds_to(run, every_steps, step, last_step)
        ends = lived >= needed
        kept, leaving = after_interruption(run, every_steps, step, np.where(ends, 0, lived), is_warned)
        wall += np.where(is_done, 0, np.where(ends, needed, lived + leaving + run.queue_s))
        step = np.where(is_done | ends, step, kept)
        is_done |= ends
    return wall


def exponential_draws(run: Conditions, rng: np.random.Generator, num_runs: int) -> Draws:
    """Interruptions by chance."""
    rate = run.interruptions_per_s

    def draws() -> tuple[np.ndarray, np.ndarray]:
        lived = rng.exponential(1 / rate, num_runs) if rate else np.full(num_runs, np.inf)
        return lived, rng.random(num_runs) * rate < run.warned_per_s

    return draws


def after_interruption(
    run: Conditions, every_steps: int, first_step: Numbers, lived_s: Numbers, is_warned: Numbers
) -> tuple[Numbers, Numbers]:
    """The step from which the next start goes on, and the seconds between notice and end of this one.

    It began at `first_step` and was interrupted, or told to leave, after `lived_s`, which is finite.
    """
    to_first_save = every_steps - first_step % every_steps
    first_copy = to_first_save * run.step_s + run.stall_s
    trained = lived_s - run.start_s
    copies = _how_many(trained - first_copy, run.period_s(every_steps))
    durable = _how_many(trained - first_copy - run.durable_s, run.period_s(every_steps))
    copied_steps = np.where(copies > 0, to_first_save + (copies - 1) * every_steps, 0)
    since_copy = trained - np.where(copies > 0, first_copy + (copies - 1) * run.period_s(every_steps), 0)
    until_save = np.where(copies > 0, every_steps, to_first_save)
    begun = np.minimum(since_copy / run.step_s, until_save)  # steps since the last copy, and a part of one
    rest_of_step = (np.ceil(begun) - begun) * run.step_s
    rest_of_save = np.where(copies > 0, np.maximum(0, run.durable_s - since_copy - rest_of_step), 0)
    kept_sudden = np.where(durable > 0, to_first_save + (durable - 1) * every_steps, 0)
    kept_warned = copied_steps + np.ceil(begun)
    leaves_in_order = is_warned & (trained >= 0)
    kept = np.where(leaves_in_order, kept_warned, np.where(trained >= 0, kept_sudden, 0))
    leaving = np.where(leaves_in_order, rest_of_step + rest_of_save + run.stall_s + run.durable_s, 0)
    return first_step + kept, leaving


def seconds_to(run: Conditions, every_steps: int, first_step: Numbers, last_step: int) -> Numbers:
    """Of training without an interruption, until `last_step` is done and before it is saved."""
    to_first_save = every_steps - first_step % every_steps
    steps = last_step - first_step
    saves = np.maximum(0, np.ceil((steps - to_first_save) / every_steps))
    last_copy = to_first_save * run.step_s + run.stall_s + (saves - 1) * run.period_s(every_steps)
    steps_behind = steps - to_first_save - (saves - 1) * every_steps
    return np.where(saves > 0, last_copy + steps_behind * run.step_s, steps * run.step_s)


def _how_many(since_first_s: Numbers, period_s: float) -> Numbers:
    """Of what happens every `period_s`, the first time at 0."""
    return np.maximum(0, np.floor(since_first_s / period_s) + 1)
