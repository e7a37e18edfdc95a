"""Tuning in a run that trains: when it is due, what becomes of its numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pathfm.training.config import TuneConfig
from pathfm.training.early_stopping import Judgement, TuningState, judge
from pathfm.training.plan import TrainingPlan

Tune = Callable[[Callable[[], bool]], dict[str, Any]]  # `Tuner.run` of student and teacher


@dataclass(frozen=True)
class Online:
    """Tuning every so many steps, and after the last one."""

    config: TuneConfig
    plan: TrainingPlan
    tune: Tune | None  # None: never

    def is_due(self, step: int, state: TuningState) -> bool:
        """Also for a step whose tuning was left out, as its run was told to leave."""
        if self.tune is None:
            return False
        if step == 0:
            return self.config.has_guard and state.at_start is None
        if step <= state.tuned_at:
            return False
        return step % self._steps_between() == 0 or step == self.plan.total_steps

    def score(self, step: int, state: TuningState, go_on: Callable[[], bool]) -> tuple[Judgement, dict[str, Any]]:
        """What is to be thought of it, and the line for `tuning.jsonl`. All ranks call this together.

        `go_on` is asked before every batch; raises `ToldToLeave` on all ranks when one may not.
        """
        assert self.tune is not None
        found = self.tune(go_on)
        settings = self.config.early_stopping
        teacher, student, guard = found["teacher"], found["student"], self.config.guard
        judgement = judge(state, step, teacher, student, settings, self.plan.total_steps, guard)
        return judgement, {**self.plan.place(step), "by": "run", **found, "early_stopping": self._standing(judgement)}

    def _steps_between(self) -> int:
        if samples := self.config.tune_every_samples:
            return max(1, round(samples / self.plan.global_batch_size))
        return max(1, round((self.config.tune_every_pct or 1.0) * self.plan.epoch_length))

    def _standing(self, judgement: Judgement) -> dict[str, Any]:
        settings, state = self.config.early_stopping, judgement.state
        return {
            "metric": state.metric,
            "best": state.best,
            "best_step": state.best_step,
            "without_improvement": state.without_improvement,
            "patience": settings.patience if settings.enable else None,
        }
