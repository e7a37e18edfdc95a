"""What a run writes for people: metrics, pictures, quarantine, accidents, exports, and where they are."""

import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pathfm.batch import Skipped
from pathfm.checkpoint.store import Store
from pathfm.errors import listed
from pathfm.export.teacher import export_teacher
from pathfm.files import write_json
from pathfm.lifecycle.run import Run
from pathfm.log import get_logger
from pathfm.parallel.tensors import whole_tensors_from_all
from pathfm.recipe import Recipe
from pathfm.tables import text_table
from pathfm.track.alarms import RunFacts, alarms
from pathfm.track.console import Console
from pathfm.track.json_lines import JsonLines
from pathfm.track.pictures import draw_losses
from pathfm.track.report import Report
from pathfm.track.weights_and_biases import WeightsAndBiases, start_wandb
from pathfm.training.loop import Accident, Loop, TooManyCorrupt, Verdict
from pathfm.training.plan import TrainingPlan
from pathfm.training.state import TrainingState

_log = get_logger(__name__)


def open_report(
    recipe: Recipe, run: Run, console: Console, state: TrainingState, plan: TrainingPlan, *, first: bool
) -> Report:
    """What the run tells from here on; what a killed segment logged after this step is dropped and logged again."""
    if not first:
        return Report(None, console, None)
    lines = JsonLines(run.metrics)
    tunings = JsonLines(run.tuning) if recipe.tune.online else None  # else another job writes them
    for logged in filter(None, (lines, tunings)):
        logged.forget_after(state.step)
    facts = RunFacts(
        log_k=math.log(recipe.dino.head_n_prototypes),
        width=state.method.student.backbone.width,
        global_batch=plan.global_batch_size,
        warmup_steps=round(recipe.optim.warmup_pct * plan.total_steps),
        quarantine=str(run.quarantine),
    )
    wandb, kept = mirror_of(recipe, run), JsonLines(run.alarms)
    return Report(lines, console, wandb, tunings, kept, judge=partial(alarms, facts=facts))


def mirror_of(recipe: Recipe, run: Run) -> WeightsAndBiases:
    """W&B's view of the run's files, if the recipe or WANDB_MODE wants one."""
    return start_wandb(recipe.wandb, run.directory, recipe.model_dump(mode="json"))


class Quarantine:
    """Rank 0's: every undecodable sample once in quarantine.jsonl. The other ranks' does nothing."""

    def __init__(self, run: Run, step: int, *, first: bool) -> None:
        self._lines = JsonLines(run.quarantine) if first else None
        self._known: set[int] = set()
        self.go_back(step)

    def go_back(self, step: int) -> None:
        """Drop what was written after `step`, whose samples are about to be met again."""
        if self._lines is not None:
            self._lines.forget_after(step)
            self._known = {line["sample"] for line in self._lines.read()}

    def add(self, step: int, skipped: Skipped) -> None:
        if self._lines is not None and skipped.sample not in self._known:
            self._known.add(skipped.sample)
            self._lines.append({"step": step, **vars(skipped)})
            _log.warning("%s of cohort %s is passed over: %s", skipped.file, skipped.cohort, skipped.reason)


def quarantine_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Which cohorts the undecodable samples are of, how many, why, and the first of their files."""
    rows: list[tuple[str, int, str, str]] = []
    for cohort, number in Counter(line["cohort"] for line in lines).most_common():
        found = [line for line in lines if line["cohort"] == cohort]
        ((reason, _),) = Counter(line["reason"] for line in found).most_common(1)
        rows.append((cohort, number, reason, listed((line["file"] for line in found), at_most=3)))
    return text_table(["cohort", "undecodable", "most often because", "files"], rows)


def accidents_of(run: Run, files_of: Callable[[int], list[str]]) -> Callable[[Accident], None]:
    """Writes the evidence of a step without a finite loss: losses, norms, and the samples of the global batch."""

    def write(accident: Accident) -> None:
        _log.warning("step %d had no finite loss or gradient and was passed over; see %s", accident.step, run.accidents)
        evidence = {
            "step": accident.step,
            "batch": accident.batch,
            "values": _readable(accident.values),
            "of_ranks": [_readable(values) for values in accident.of_ranks],
            "files": files_of(accident.batch),
        }
        write_evidence(run.accidents / f"step_{accident.step:08d}.json", evidence)

    return write


def write_evidence(path: Path, evidence: Mapping[str, Any]) -> None:
    """A file of `accidents/`; where the disk does not take it, a line in the log."""
    try:
        write_json(path, evidence)
    except OSError as error:
        _log.warning("%s could not be written (%s): %s", path, error, evidence)


def _readable(values: Mapping[str, float]) -> dict[str, str]:
    return {name: repr(value) for name, value in values.items()}  # JSON has no NaN


def exporter(run: Run, teacher: nn.Module, *, first: bool) -> Callable[[int], bool]:
    """Writes the teacher's weights and redraws the curves. Says whether the weights are there.

    All ranks call it together, since each may hold a share of the weights; rank 0 writes.
    """

    def write(step: int) -> bool:
        weights = whole_tensors_from_all(teacher.state_dict(), keep=first)
        if not first:
            return True
        draw(run.previews / "losses.png", lambda picture: draw_losses(lines.read(), picture, f"{run.name}: losses"))
        try:
            export_teacher(weights, run.exports, step)
        except OSError as error:
            _log.warning("the teacher of step %d could not be exported (%s)", step, error)
            return False
        return True

    lines = JsonLines(run.metrics)
    return write


def keeper_of_best(run: Run, store: Store, teacher: nn.Module, *, first: bool) -> Callable[[int, dict[str, Any]], None]:
    """Marks a step's checkpoint as the best so far and writes its teacher's weights as `teacher_best`.

    All ranks call it together, after the checkpoint was published; rank 0 writes.
    """

    def keep(step: int, by: dict[str, Any]) -> None:
        weights = whole_tensors_from_all(teacher.state_dict(), keep=first)
        if not first:
            return
        try:
            if store.path_of(step).exists():
                store.mark_best(step, by)
            export_teacher(weights, run.exports, step, name="best")
        except OSError as error:
            _log.warning("the best teacher so far, of step %d, could not be kept (%s)", step, error)

    return keep


def draw(picture: Path, how: Callable[[Path], None]) -> None:
    """Draw a picture. Nothing that goes wrong with one is a reason not to train."""
    try:
        how(picture)
    except Exception as error:
        _log.warning("%s could not be drawn (%s: %s)", picture, type(error).__name__, error)


def end_in_failure(run: Run, step: int, error: Exception) -> None:
    """Rank 0's: why this segment failed, in exit.json; for a person, which files when it was for them."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, TooManyCorrupt):
        table = quarantine_table(JsonLines(run.quarantine).read())
        print(f"{table}\n  all of them are in {_short(run.quarantine)}", file=sys.stderr)
        reason += f"\n{table}"
    run.write_exit("failed", step, reason)


def close_run(run: Run, loop: Loop, verdict: Verdict) -> bool:
    """Say how it ended, in exit.json and to the person. False when something could not be written.

    All ranks call this together; rank 0 speaks.
    """
    step = loop.state.step
    is_over = verdict in ("done", "stopped")
    exported = not is_over or loop.around.export(step)
    if not loop.ranks.is_first:
        return True
    if loop.last_save_failed or not exported:
        missing = "checkpoint" if loop.last_save_failed else "teacher"
        run.write_exit("failed", step, f"the {missing} of step {step} could not be written")
        print(
            f"run {run.name} reached step {step:,}, but its {missing} could not be written; mend that and start again"
        )
        return False
    if is_over:
        why = _why_it_stopped(loop) if verdict == "stopped" else ""
        run.write_exit("done", step, why, stopped_early=verdict == "stopped")
        print(f"run {run.name} is finished: {step:,} steps{f'; {why}' if why else ''}\n{where_everything_is(run)}")
    else:
        kept = loop.around.saver.store.newest_step() or 0  # an earlier one, when the time did not suffice
        run.write_exit(verdict, kept, loop.around.leave() or "another rank was told to leave")
        print(f"run {run.name} stopped after step {step:,}; the same command goes on from step {kept:,}")
    return True


def _why_it_stopped(loop: Loop) -> str:
    """By its last tuning."""
    state = loop.state.tuning
    if loop.forgot and loop.online.config.guard.action == "stop":
        return f"stopped by tune.guard: the teacher fell too far below {state.metric} {state.at_start:.4f}, of step 0"
    best = f"step {state.best_step:,} with {state.metric} {state.best:.4f}" if state.best is not None else "none so far"
    return f"stopped early, after {state.without_improvement} tunings without a better teacher; the best is {best}"


def where_everything_is(run: Run) -> str:
    """The last lines that a person reads."""
    exported = run.exported_teachers()
    best = run.exports / "teacher_best.safetensors"
    rows = {
        "run": run.directory,
        "metrics": run.metrics,
        "pictures": run.previews,
        "teacher": exported[-1] if exported else "not exported yet",
        **({"best": best} if best.exists() else {}),
    }
    return "\n".join(f"  {name:<9} {_short(place)}" for name, place in rows.items())


def _short(place: Path | str) -> str:
    return os.path.relpath(place) if isinstance(place, Path) else place
