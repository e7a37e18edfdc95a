"""How a run begins or goes on: its directory is claimed, its recipe settled, its newest checkpoint taken up."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pathfm.augment.preview import crops_picture
from pathfm.batch import Batch
from pathfm.checkpoint.manifest import DamagedCheckpoint
from pathfm.checkpoint.reading import load_into
from pathfm.checkpoint.store import Store, is_good, step_of
from pathfm.config import build, read_layer, to_yaml
from pathfm.data.datasets import Dataset
from pathfm.data.order import batch_of_step, merged
from pathfm.dist.collect import decided_by_first
from pathfm.dist.env import Ranks
from pathfm.errors import UserError, listed
from pathfm.files import write_json, write_text, written_aside
from pathfm.jobs.run_reports import draw, write_evidence
from pathfm.jobs.schedule import draw_plan
from pathfm.jobs.training_data import TrainingData
from pathfm.lifecycle.run import Run
from pathfm.log import get_logger
from pathfm.recipe import Recipe, changes_of_identity, written_out
from pathfm.training.loop import Loop
from pathfm.training.plan import TrainingPlan, global_batch_size
from pathfm.training.state import TrainingState

_log = get_logger(__name__)


class NotFinite(UserError):
    """Too many steps in a row without a finite loss and gradient, and going back did not help."""


def claim_run(stack: ExitStack, directory: Path, *, begin_anew: bool) -> Run:
    """Rank 0 locks the directory for as long as `stack` is open. All ranks call this together."""

    def claim() -> None:
        stack.enter_context(Run(directory).claimed())
        if begin_anew and (kept := Run(directory).keep_aside()):
            _log.info("beginning anew; what was in %s is kept in %s", directory, kept)
        Run(directory).remove_leftovers()

    decided_by_first(claim)
    return Run(directory)


def settle_recipe(recipe: Recipe, run: Run, ranks: Ranks) -> Recipe:
    """Fix the global batch at the first start and keep it ever after. All ranks call this together.

    Raises `UserError` when the run was begun with another recipe (speed and reporting may differ).
    """

    def settle() -> Recipe:
        return _as_begun(recipe, run) if run.recipe.is_file() else _begin(recipe, ranks, run)

    return decided_by_first(settle)


def _begin(recipe: Recipe, ranks: Ranks, run: Run) -> Recipe:
    if run.checkpoints.is_dir():
        raise UserError(
            f"{run.checkpoints} is there, but no {run.recipe.name} beside it says what was trained; "
            "put it back, take another run name, or begin anew with --no-resume (what is there is kept)"
        )
    settled = _settled(recipe, global_batch_size(recipe.train, ranks.world_size))
    write_text(run.recipe, to_yaml(settled))
    return settled


def _as_begun(recipe: Recipe, run: Run) -> Recipe:
    begun = build(Recipe, [read_layer(run.recipe)])
    recipe = _settled(recipe, recipe.train.global_batch_size or begun.train.global_batch_size)
    if changes := changes_of_identity(begun, recipe):
        raise UserError(
            f"run {run.name} was begun with another recipe ({listed(changes)}); "
            "take another run name, or --no-resume to begin anew (what is there is kept)"
        )
    return recipe


def _settled(recipe: Recipe, global_batch: int | None) -> Recipe:
    train = recipe.train.model_copy(update={"global_batch_size": global_batch, "output_dir": ""})
    return written_out(recipe).model_copy(update={"train": train})


def check_data(dataset: Dataset, run: Run) -> None:
    """Remember at the first start which data a run is trained on; raise `UserError` when they have changed since.

    All ranks call this together.
    """

    def check() -> None:
        now = {"samples": len(dataset), "fingerprint": dataset.fingerprint()}
        if not run.data.is_file():
            write_json(run.data, now)
        elif (begun := json.loads(run.data.read_text(encoding="utf-8"))) != now:
            raise UserError(
                f"the data of run {run.name} have changed: {begun['samples']:,} samples when it was begun, "
                f"{now['samples']:,} now{' (another index)' if begun['samples'] == now['samples'] else ''}; "
                "name the data it was begun with, or take another run name"
            )

    decided_by_first(check)


def resume(state: TrainingState, store: Store, run: Run, ranks: Ranks) -> None:
    """Take up the newest checkpoint that is whole and fits; none yet means a fresh start. All ranks call this together.

    Raises `UserError` when there are checkpoints but none can be used: a run never starts over by itself.
    """
    paths = decided_by_first(store.paths)
    if _take_up_newest(state, store, ranks, paths) is not None:
        _log.info("run %s goes on from step %d", run.name, state.step)
    elif paths:
        raise UserError(
            f"none of the {len(paths)} checkpoints of run {run.name} can be used (reasons above); "
            "restore one from a backup, or begin anew with --no-resume (what is there is kept)"
        )


def _take_up_newest(state: TrainingState, store: Store, ranks: Ranks, paths: Sequence[Path]) -> int | None:
    """The step of the newest of these that is whole. Every one that is passed over is named with the reason."""
    tensors = state.tensors()
    for path in reversed(paths):
        try:
            manifest = load_into(tensors, path, ranks)
        except DamagedCheckpoint as damage:
            _log.warning("checkpoint %s is passed over: %s", path.name, damage)
            continue
        state.take_up(manifest.step, manifest.values)
        decided_by_first(partial(_go_back_to, state, store))
        return manifest.step
    return None


def _go_back_to(state: TrainingState, store: Store) -> None:
    """Newer checkpoints are about to be written again; one of them may have been the best."""
    store.set_aside_after(state.step)
    if (store.best_step() or 0) > state.step:
        store.mark_best(state.tuning.best_step, {"metric": state.tuning.metric, "value": state.tuning.best})


def go_back(loop: Loop, run: Run, files_of: Callable[[int], list[str]]) -> None:
    """After an accident: to the last checkpoint before it, and from there on without the batches that it came with.

    All ranks call this together. Where that was done before and did not help, all batches since that checkpoint are
    left out. Raises `NotFinite` when that did not help either, or there is no such checkpoint.
    """
    state, saver = loop.state, loop.around.saver
    bad, left_out, times_gone_back = loop.bad_steps, state.passed_over, state.times_gone_back
    first_bad, behind = loop.batches_of(bad)
    saver.wait()
    target = decided_by_first(lambda: _last_good(saver.store, bad.start))
    if target is None or _take_up_newest(state, saver.store, loop.ranks, [target]) is None:
        raise NotFinite(_not_finite(run, bad, "there is no good checkpoint before them"))
    times_before = times_gone_back - state.times_gone_back  # to this checkpoint
    if times_before >= loop.optim.max_roll_backs:
        again = f"so they were after the run had gone back to step {state.step} {times_before} times"
        raise NotFinite(_not_finite(run, bad, again))
    start = first_bad if times_before == 0 else batch_of_step(state.step, left_out)
    state.passed_over = merged([*left_out, (start, behind)])
    state.times_gone_back = times_gone_back + 1
    _log.warning(
        "steps %d to %d had no finite loss or gradient: the run goes back to step %d and leaves out the %d batches of "
        "samples that it met there; see %s",
        bad.start, bad.stop - 1, state.step, behind - start, run.accidents,
    )  # fmt: skip
    if loop.ranks.is_first:
        batches = {str(batch): files_of(batch) for batch in range(start, behind)}
        facts = {"failed_steps": list(bad), "back_to_step": state.step, "batches_left_out": batches}
        write_evidence(run.accidents / f"went_back_from_step_{bad.stop:08d}.json", facts)


def _last_good(store: Store, at_most: int) -> Path | None:
    """The newest checkpoint of a step up to `at_most` that was not written amid an accident."""
    return next((path for path in reversed(store.paths()) if step_of(path) <= at_most and is_good(path)), None)


def _not_finite(run: Run, bad: range, why: str) -> str:
    return (
        f"the loss or gradient was not finite for {len(bad)} steps in a row, from step {bad.start} on, and {why}; "
        f"the samples and losses are in {run.accidents}, the checkpoints are as they were. "
        "Begin another run with a lower optim.base_lr or train.precision=fp32"
    )


def begin_segment(run: Run, recipe: Recipe, plan: TrainingPlan, data: TrainingData, step: int, ranks: Ranks) -> None:
    """Rank 0's: what the run's directory says before the first step of this process."""
    run.write_exit("running", step)
    facts = {"ranks": ranks.world_size, "device": str(data.device), "attention": recipe.student.attention}
    run.add_provenance({**facts, "from_step": step})
    if not (crops := run.previews / "crops.png").exists():
        draw(crops, lambda picture: _draw_crops(picture, data.first_samples(8), recipe.student.patch_size))
    if not (schedules := run.previews / "schedules.png").exists():
        draw(schedules, lambda picture: draw_plan(plan, picture, f"{run.name}: schedules"))


def _draw_crops(picture: Path, batch: Batch, patch_size: int) -> None:
    with written_aside(picture) as aside:
        crops_picture(batch, patch_size).save(aside, format="PNG")
