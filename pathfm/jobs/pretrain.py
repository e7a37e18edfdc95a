"""`pathfm train`: one process of a pretraining run, from a recipe to the teacher's weights. The house in one page."""

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from pathfm.augment.assemble import Assemble
from pathfm.augment.masks import MaskPlan
from pathfm.augment.preview import crops_picture
from pathfm.batch import Batch
from pathfm.checkpoint.store import Store
from pathfm.data.loader import load_batches
from pathfm.data.order import BatchPlan, SampleOrder
from pathfm.data.pathology import Pathology, open_dataset
from pathfm.dist.collect import agree_any, gather_rows, sum_over_ranks
from pathfm.dist.env import Ranks, ranks_from_environment
from pathfm.dist.groups import demand_same_numbers, device_of, process_group
from pathfm.errors import UserError
from pathfm.files import written_aside
from pathfm.jobs.arguments import CONFIGS, parse_with_overrides
from pathfm.jobs.run_reports import accidents_of, draw, exporter, open_report, quarantine_of, where_everything_is
from pathfm.jobs.run_start import check_data, claim_run, resume, settle_recipe
from pathfm.jobs.schedule import draw_plan
from pathfm.lifecycle.run import EXIT_INTERRUPTED, Run
from pathfm.lifecycle.signals import noted
from pathfm.log import get_logger, start_logging
from pathfm.models.attention import choose_backend
from pathfm.models.build import build_backbone
from pathfm.random_streams import derived_seed
from pathfm.recipe import Recipe, find_config, read_recipe
from pathfm.ssl.dinov2 import DINOv2
from pathfm.track.console import Console
from pathfm.training.loop import Loop, Surroundings, Verdict
from pathfm.training.plan import TrainingPlan, plan_training
from pathfm.training.state import TrainingState
from pathfm.training.step import build_optimizer, build_scaler, compute_dtype

_log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(
        "pathfm train", description="Pretrain on this machine; settings are given as key=value.", allow_abbrev=False
    )
    parser.add_argument("--config-file", required=True, help="a recipe's path, or its name in configs/")
    parser.add_argument("--output-dir", type=Path, help="the run's directory (default: train.output_dir, runs/RECIPE)")
    parser.add_argument("--no-resume", action="store_true", help="begin anew; what is in the directory is kept aside")
    arguments = parse_with_overrides(parser, argv)
    ranks = ranks_from_environment()
    config_file = find_config(arguments.config_file, CONFIGS)
    read = read_recipe(config_file, arguments.overrides)
    directory = arguments.output_dir or Path(read.recipe.train.output_dir or Path("runs", config_file.stem))
    start_logging(speak=ranks.is_first)
    for note in read.notes:
        _log.info("%s", note)
    device = device_of(ranks, read.recipe.train.device)
    demand_same_numbers(device, read.recipe.train.deterministic)
    with process_group(ranks, device), ExitStack() as stack:
        run = claim_run(stack, directory, begin_anew=arguments.no_resume)
        return pretrain(read.recipe, run, ranks, device)


def pretrain(recipe: Recipe, run: Run, ranks: Ranks, device: torch.device) -> int:
    """Train the run to its end, or until it is told to leave. Returns the exit status, the same on every rank."""
    if not recipe.train.dataset_path:
        raise UserError("no data set is given; add train.dataset_path=Pathology:root=FOLDER")
    dataset = open_dataset(recipe.train.dataset_path)
    recipe = settle_recipe(recipe, run, ranks)
    check_data(dataset, run)
    plan = plan_training(recipe.train, recipe.optim, recipe.teacher, recipe.dino, ranks.world_size, len(dataset))
    if run.is_done(plan.total_steps):
        if ranks.is_first:
            print(f"run {run.name} is finished ({plan.total_steps:,} steps); nothing to do\n{where_everything_is(run)}")
        return 0
    data = _Data(recipe, plan, dataset, device)
    state = _fresh_state(recipe, plan, device)
    store = Store(run.checkpoints, recipe.checkpoint)
    resume(state, store, run, ranks)
    if ranks.is_first:
        _begin_segment(run, recipe, plan, data, state.step, ranks)
    with Console(plan.total_steps, state.step, speak=ranks.is_first) as console:
        report = open_report(recipe, run, console, state.step, first=ranks.is_first)
        around = Surroundings(
            store=store,
            report=report,
            leave=noted,
            quarantine=quarantine_of(run, state.step) if ranks.is_first else _nothing,
            accident=accidents_of(run, data.files_of),
            export=exporter(run, state.method.teacher),
        )
        loop = Loop(state, plan, recipe.train, recipe.optim, recipe.checkpoint, ranks, device, around)
        try:
            verdict = loop.run(data.batches(ranks, from_step=state.step))
        except Exception as error:
            if ranks.is_first:
                run.write_exit("failed", state.step, f"{type(error).__name__}: {error}")
            report.finish()
            raise
    complete = not ranks.is_first or _close(run, loop, verdict)
    report.finish()
    # The others wait here for rank 0 to have saved: whoever started them ends all as soon as one has left.
    if agree_any(not complete):
        return 1
    return 0 if verdict == "done" else EXIT_INTERRUPTED


class _Data:
    """Samples in their order, in batches, as crops and masks."""

    def __init__(self, recipe: Recipe, plan: TrainingPlan, dataset: Pathology, device: torch.device) -> None:
        self.recipe, self.plan, self.dataset, self.device = recipe, plan, dataset, device
        self.order = SampleOrder(len(dataset), recipe.train.seed)
        grid = recipe.crops.global_crops_size // recipe.student.patch_size
        masks = MaskPlan(grid, grid, recipe.ibot.mask_sample_probability, *recipe.ibot.mask_ratio_min_max)
        patch, seed, batch = recipe.student.patch_size, recipe.train.seed, plan.global_batch_size
        self.assemble = Assemble(recipe.crops, recipe.augment, masks, patch, seed, batch)

    def batches(self, ranks: Ranks, from_step: int) -> Iterator[Batch]:
        """This rank's share of every batch from a step to the run's end."""
        share = BatchPlan(self.plan.global_batch_size, ranks.rank, ranks.world_size)
        return self._load(share, from_step, self.plan.total_steps, self.recipe.train.num_workers)

    def first_samples(self, number: int) -> Batch:
        """The run's first samples as the trainer gets them."""
        return next(self._load(BatchPlan(min(number, self.plan.global_batch_size)), 0, 1, num_workers=0))

    def files_of(self, step: int) -> list[str]:
        """The names of the samples in a step's global batch."""
        positions = BatchPlan(self.plan.global_batch_size).positions(step)
        return [self.dataset.name_of(int(sample)) for sample in self.order.samples(positions)]

    def _load(self, share: BatchPlan, start_step: int, stop_step: int, num_workers: int) -> Iterator[Batch]:
        return load_batches(
            self.dataset,
            self.order,
            share,
            self.assemble,
            start_step=start_step,
            stop_step=stop_step,
            num_workers=num_workers,
            on_corrupt=self.recipe.data.corrupt_samples,
            max_neighbours=self.recipe.data.max_neighbours,
            max_pixels=self.recipe.data.max_pixels,
            prefetch_batches=self.recipe.data.prefetch_batches,
            pin_memory=self.device.type == "cuda",
        )


def _fresh_state(recipe: Recipe, plan: TrainingPlan, device: torch.device) -> TrainingState:
    torch.manual_seed(derived_seed(recipe.train.seed, 0, "initial weights"))
    size = recipe.crops.global_crops_size
    method = DINOv2(
        build_backbone(recipe.student, size, drop_path=True),
        build_backbone(recipe.student, size, drop_path=False),
        recipe.dino,
        recipe.ibot,
        centering=recipe.train.centering,
        koleo_group_size=plan.koleo_group_size,
        total=sum_over_ranks,
        gather=gather_rows,
    ).to(device)
    return TrainingState(method, build_optimizer(method, recipe.optim, device), build_scaler(device))


def _begin_segment(run: Run, recipe: Recipe, plan: TrainingPlan, data: _Data, step: int, ranks: Ranks) -> None:
    """What a run's directory says before the first step of this process."""
    run.write_exit("running", step)
    run.add_provenance({"ranks": ranks.world_size, "device": str(data.device), "from_step": step})
    if not (crops := run.previews / "crops.png").exists():
        draw(crops, lambda picture: _draw_crops(picture, data.first_samples(8), recipe.student.patch_size))
    if not (schedules := run.previews / "schedules.png").exists():
        draw(schedules, lambda picture: draw_plan(plan, picture, f"{run.name}: schedules"))
    if data.device.type == "cuda":
        backend = choose_backend(recipe.student.attention, data.device, compute_dtype(recipe.train))
        _log.info("attention by %s on %s", backend, torch.cuda.get_device_name(data.device))


def _draw_crops(picture: Path, batch: Batch, patch_size: int) -> None:
    with written_aside(picture) as aside:
        crops_picture(batch, patch_size).save(aside, format="PNG")


def _close(run: Run, loop: Loop, verdict: Verdict) -> bool:
    """Say how it ended, in exit.json and to the person. False when something that should be on the disk is not."""
    step = loop.state.step
    exported = verdict != "done" or loop.around.export(step)
    if loop.last_save_failed or not exported:
        missing = "checkpoint" if loop.last_save_failed else "teacher"
        run.write_exit("failed", step, f"the {missing} of step {step} could not be written")
        print(
            f"run {run.name} reached step {step:,}, but its {missing} could not be written; mend that and start again"
        )
        return False
    run.write_exit(verdict, step)
    if verdict == "done":
        print(f"run {run.name} is finished: {step:,} steps\n{where_everything_is(run)}")
    else:
        print(f"run {run.name} stopped after step {step:,}; the same command goes on from there")
    return True


def _nothing(*_: object) -> None:
    pass
