"""Whether a run still gets better: the best teacher so far by one number of tuning, and the patience that is left."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from pathfm.training.config import EarlyStoppingConfig


@dataclass(frozen=True)
class TuningState:
    """What a checkpoint keeps of tuning."""

    tuned_at: int = 0  # the last step that was tuned; 0: none
    metric: str = ""  # what `best` is a value of
    best: float | None = None
    best_step: int = 0
    without_improvement: int = 0  # tunings in a row


class Judgement(NamedTuple):
    state: TuningState
    improved: bool
    stop: bool


def judge(
    before: TuningState,
    step: int,
    teacher: Mapping[str, float],
    student: Mapping[str, float],
    config: EarlyStoppingConfig,
    total_steps: int,
) -> Judgement:
    """An improvement is a teacher that is better than the best before, and better than its student.

    A teacher that its student overtakes has stopped to average out noise; it is no better for a number that rose.
    With another metric than before the comparison begins anew. Stopping is for runs that ask for it.
    """
    metric = config.tracking
    if before.metric != metric:
        before = TuningState(metric=metric)
    value = teacher[metric]
    improved = value > student[metric] and (before.best is None or value > before.best)
    if improved:
        return Judgement(TuningState(step, metric, value, step), True, False)
    state = replace(before, tuned_at=step, without_improvement=before.without_improvement + 1)
    is_old_enough = step >= config.min_pct * total_steps
    return Judgement(state, False, config.enable and is_old_enough and state.without_improvement >= config.patience)
