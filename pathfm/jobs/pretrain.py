"""`pathfm train`: one process of a pretraining run, from a recipe to the teacher's weights. The house in one page."""

import math
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from pathfm.checkpoint.saver import Saver
from pathfm.checkpoint.store import Store
from pathfm.data.config import CorruptPolicy
from pathfm.dist.agreement import Agreement
from pathfm.dist.collect import agree_any
from pathfm.dist.env import ranks_from_environment
from pathfm.dist.groups import Team, demand_same_numbers, device_of, joined
from pathfm.errors import EXIT_INTERRUPTED, UserError
from pathfm.jobs.arguments import CONFIGS, parse_with_overrides
from pathfm.jobs.attention_choice import with_attention
from pathfm.jobs.examination.ranks import examine
from pathfm.jobs.networks import fresh_state, method_of
from pathfm.jobs.run_reports import (
    Quarantine,
    accidents_of,
    close_run,
    end_in_failure,
    exporter,
    keeper_of_best,
    open_report,
    where_everything_is,
)
from pathfm.jobs.run_start import begin_segment, check_data, claim_run, go_back, resume, settle_recipe
from pathfm.jobs.token_pictures import token_painter
from pathfm.jobs.training_data import TrainingData, usage_of
from pathfm.jobs.training_set import open_training_set, order_of
from pathfm.jobs.tuning import tuner_of
from pathfm.jobs.warm_start import start_from_weights
from pathfm.lifecycle.host_memory import keep_freed_memory
from pathfm.lifecycle.run import Run
from pathfm.lifecycle.signals import noted, seconds_since_noted
from pathfm.log import get_logger, start_logging
from pathfm.recipe import Recipe, find_config, read_recipe
from pathfm.track.console import Console
from pathfm.training.loop import Loop, Surroundings
from pathfm.training.online import Online
from pathfm.training.plan import plan_training

_log = get_logger(__name__)
_GRACE_FOR_REPORTS_S = 5.0  # of a process that was told to leave; the next one tells W&B the rest


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
    train = read.recipe.train
    directory = arguments.output_dir or Path(train.output_dir or Path("runs", config_file.stem))
    start_logging(speak=ranks.is_first)
    for note in read.notes:
        _log.info("%s", note)
    device = device_of(ranks, train.device)
    demand_same_numbers(device, train.deterministic)
    if device.type == "cpu":
        keep_freed_memory()
    with ExitStack() as stack:
        team = stack.enter_context(joined(ranks, device, train.stall_after_s, train.lost_after_s))
        run = claim_run(stack, directory, begin_anew=arguments.no_resume)
        return pretrain(read.recipe, run, team)


def pretrain(recipe: Recipe, run: Run, team: Team) -> int:
    """Train the run to its end, or until it is told to leave. Returns the exit status, the same on every rank."""
    ranks, device = team.ranks, team.device
    examine(recipe, run, team)
    if not recipe.train.dataset_path:
        raise UserError("no data set is given; add train.dataset_path=Pathology:root=FOLDER")
    dataset = open_training_set(recipe.train.dataset_path, recipe.student)
    recipe = settle_recipe(recipe, run, ranks)
    check_data(dataset, run)
    epoch_size = order_of(recipe.train, dataset).epoch_size
    plan = plan_training(recipe.train, recipe.optim, recipe.teacher, recipe.dino, ranks.world_size, epoch_size)
    if run.is_done(plan.total_steps, may_stop_early=recipe.tune.may_end_a_run):
        if ranks.is_first:
            print(f"run {run.name} is finished ({plan.total_steps:,} steps); nothing to do\n{where_everything_is(run)}")
        return 0
    team.watch.keep_stacks_in(run.stacks)
    recipe = with_attention(recipe, plan, run, ranks, device)
    data = TrainingData(recipe, plan, dataset, device)
    tuner = tuner_of(recipe, ranks, device)
    store = Store(run.checkpoints, recipe.checkpoint)
    method = method_of(recipe, plan.koleo_group_size)
    if recipe.student.pretrained_weights and not store.paths():  # a checkpoint would replace them
        start_from_weights(method, recipe, run, first=ranks.is_first)
    state = fresh_state(method, recipe, ranks, device)
    networks = {"teacher": state.method.teacher, "student": state.method.student}
    resume(state, store, run, ranks)
    if ranks.is_first:
        begin_segment(run, recipe, plan, data, state.step, ranks)
    with Console(plan.total_steps, state.step, speak=ranks.is_first) as console:
        report = open_report(recipe, run, console, state, plan, first=ranks.is_first)
        quarantine = Quarantine(run, state.step, first=ranks.is_first)
        around = Surroundings(
            saver=Saver(store, ranks, team.checkpoint_group),
            report=report,
            agreement=Agreement(team.agreement_group),
            leave=noted,
            seconds_since_told=seconds_since_noted,
            quarantine=quarantine.add,
            accident=accidents_of(run, data.files_of),
            export=exporter(run, state.method.teacher, first=ranks.is_first),
            crop=data.cropped,
            doing=team.watch.at,
            usage=usage_of(recipe, state.method, ranks, device).lap,
            paint=token_painter(run, data, state.method.teacher, first=ranks.is_first),
            keep_best=keeper_of_best(run, store, state.method.teacher, first=ranks.is_first),
        )
        policy = CorruptPolicy.parse(recipe.data.corrupt_samples)
        online = Online(recipe.tune, plan, partial(tuner.run, networks) if tuner else None)
        loop = Loop(state, plan, recipe.train, recipe.optim, recipe.checkpoint, policy, ranks, device, around, online)
        try:
            while (verdict := loop.run(data.batches(ranks, state.step, state.passed_over))) == "accident":
                go_back(loop, run, data.files_of)
                report.go_back(state.step)
                quarantine.go_back(state.step)
        except Exception as error:
            if ranks.is_first:
                end_in_failure(run, state.step, error)
            report.finish()
            raise
    complete = close_run(run, loop, verdict)
    report.finish(_GRACE_FOR_REPORTS_S if verdict == "interrupted" else math.inf)
    # The others wait here for rank 0 to have written all: whoever started them ends all as soon as one has left.
    if agree_any(not complete):
        return 1
    return EXIT_INTERRUPTED if verdict == "interrupted" else 0
