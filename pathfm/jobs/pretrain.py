"""`pathfm train`: one process of a pretraining run, from a recipe to the teacher's weights. The house in one page."""

from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from pathfm.checkpoint.store import Store
from pathfm.data.config import CorruptPolicy
from pathfm.dist.collect import agree_any, gather_rows, sum_over_ranks
from pathfm.dist.env import Ranks, ranks_from_environment
from pathfm.dist.groups import demand_same_numbers, device_of, start_process_group
from pathfm.errors import UserError
from pathfm.jobs.arguments import CONFIGS, parse_with_overrides
from pathfm.jobs.run_reports import (
    accidents_of,
    close_run,
    end_in_failure,
    exporter,
    open_report,
    quarantine_of,
    where_everything_is,
)
from pathfm.jobs.run_start import begin_segment, check_data, claim_run, resume, settle_recipe
from pathfm.jobs.training_data import TrainingData
from pathfm.jobs.training_set import open_training_set, order_of
from pathfm.lifecycle.run import EXIT_INTERRUPTED, Run
from pathfm.lifecycle.signals import noted
from pathfm.log import get_logger, start_logging
from pathfm.models.build import build_backbone
from pathfm.random_streams import derived_seed
from pathfm.recipe import Recipe, find_config, read_recipe
from pathfm.ssl.dinov2 import DINOv2
from pathfm.track.console import Console
from pathfm.training.loop import Loop, Surroundings
from pathfm.training.plan import TrainingPlan, plan_training
from pathfm.training.state import TrainingState
from pathfm.training.step import build_optimizer, build_scaler

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
    start_process_group(ranks, device)
    with ExitStack() as stack:
        run = claim_run(stack, directory, begin_anew=arguments.no_resume)
        return pretrain(read.recipe, run, ranks, device)


def pretrain(recipe: Recipe, run: Run, ranks: Ranks, device: torch.device) -> int:
    """Train the run to its end, or until it is told to leave. Returns the exit status, the same on every rank."""
    if not recipe.train.dataset_path:
        raise UserError("no data set is given; add train.dataset_path=Pathology:root=FOLDER")
    dataset = open_training_set(recipe.train.dataset_path, recipe.method)
    recipe = settle_recipe(recipe, run, ranks)
    check_data(dataset, run)
    epoch_size = order_of(recipe.train, dataset).epoch_size
    plan = plan_training(recipe.train, recipe.optim, recipe.teacher, recipe.dino, ranks.world_size, epoch_size)
    if run.is_done(plan.total_steps):
        if ranks.is_first:
            print(f"run {run.name} is finished ({plan.total_steps:,} steps); nothing to do\n{where_everything_is(run)}")
        return 0
    data = TrainingData(recipe, plan, dataset, device)
    state = _fresh_state(recipe, plan, device)
    store = Store(run.checkpoints, recipe.checkpoint)
    resume(state, store, run, ranks)
    if ranks.is_first:
        begin_segment(run, recipe, plan, data, state.step, ranks)
    with Console(plan.total_steps, state.step, speak=ranks.is_first) as console:
        report = open_report(recipe, run, console, state.step, first=ranks.is_first)
        around = Surroundings(
            store=store,
            report=report,
            leave=noted,
            quarantine=quarantine_of(run, state.step) if ranks.is_first else lambda step, skipped: None,
            accident=accidents_of(run, data.files_of),
            export=exporter(run, state.method.teacher),
        )
        policy = CorruptPolicy.parse(recipe.data.corrupt_samples)
        loop = Loop(state, plan, recipe.train, recipe.optim, recipe.checkpoint, policy, ranks, device, around)
        try:
            verdict = loop.run(data.batches(ranks, from_step=state.step))
        except Exception as error:
            if ranks.is_first:
                end_in_failure(run, state.step, error)
            report.finish()
            raise
    complete = not ranks.is_first or close_run(run, loop, verdict)
    report.finish()
    # The others wait here for rank 0 to have saved: whoever started them ends all as soon as one has left.
    if agree_any(not complete):
        return 1
    return 0 if verdict == "done" else EXIT_INTERRUPTED


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
