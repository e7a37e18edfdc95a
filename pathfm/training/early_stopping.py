"""Whether a run still gets better: the best teacher so far by one number of tuning, and the patience that is left."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from pathfm.training.config import EarlyStoppingConfig, GuardConfig

_NO_GUARD = GuardConfig()


@dataclass(frozen=True)
class TuningState:
    """What a checkpoint keeps of tuning."""

    tuned_at: int = 0  # the last step that was tuned; 0: none
    metric: str = ""  # what `best` is a value of
    best: float | None = None
    best_step: int = 0
    without_improvement: int = 0  # tunings in a row
    at_start: float | None = None  # the teacher's value before the first step, where there is a guard


class Judgement(NamedTuple):
    state: TuningState
    improved: bool
    stop: bool
    forgot: float | None = None  # how far the teacher fell below its value at step 0, when that is too far


def judge(
    before: TuningState,
    step: int,
    teacher: Mapping[str, float],
    student: Mapping[str, float],
    config: EarlyStoppingConfig,
    total_steps: int,
    guard: GuardConfig = _NO_GUARD,
) -> Judgement:
    """An improvement is a teacher that is better than the best before, and better than its student.

    A teacher that its student overtakes has stopped to average out noise; it is no better for a number that rose.
    With another metric than before the comparison begins anew. Stopping is for runs that ask for it. Step 0 is where a
    guard compares from, and no candidate for the best.
    """
    metric = config.tracking
    if before.metric != metric:
        before = TuningState(metric=metric)
    value = teacher[metric]
    if step == 0:
        return Judgement(replace(before, at_start=value), False, False)
    forgot = _drop(before.at_start, value, guard)
    is_over = forgot is not None and guard.action == "stop"
    improved = value > student[metric] and (before.best is None or value > before.best)
    if improved:
        return Judgement(TuningState(step, metric, value, step, at_start=before.at_start), True, is_over, forgot)
    state = replace(before, tuned_at=step, without_improvement=before.without_improvement + 1)
    is_old_enough = step >= config.min_pct * total_steps
    ran_out = config.enable and is_old_enough and state.without_improvement >= config.patience
    return Judgement(state, False, is_over or ran_out, forgot)


def _drop(at_start: float | None, value: float, guard: GuardConfig) -> float | None:
    if at_start is None or guard.max_drop is None or at_start - value <= guard.max_drop:
        return None
    return at_start - value
