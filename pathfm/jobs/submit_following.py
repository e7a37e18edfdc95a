"""Put `pathfm evaluate --follow RUN` on a Slurm cluster, or on this machine, beside the job that trains. No torch."""

import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

from pathfm.config import build, overrides_layer, read_layer
from pathfm.errors import UserError
from pathfm.jobs.arguments import parse_with_overrides
from pathfm.jobs.before_queue import stop_at, tuning_folders, tuning_problems, unwritable
from pathfm.jobs.find_run import RUNS, find_run
from pathfm.jobs.slurm_options import SLURM_ALONE, add_options, demand_slurm, place_of
from pathfm.jobs.slurm_order import SlurmOrder, Work, hand_over
from pathfm.jobs.submit import checked_name, to_submit_again
from pathfm.launch.local import gpus_of_this_machine, run_local
from pathfm.launch.payload import one_process_per_gpu
from pathfm.lifecycle.run import Run
from pathfm.recipe import Recipe

_FOLDER = "following"  # in the run: logs and jobs of the evaluation


def main(argv: Sequence[str] | None = None) -> int:
    """`launchers/evaluate.py --follow`. Returns the exit status; raises `UserError` for what is wrong beforehand."""
    parser = _parser()
    command = to_submit_again(["python", *sys.argv] if argv is None else ["evaluate.py", *argv])
    arguments = parse_with_overrides(parser, argv)
    run = find_run(arguments.follow, arguments.runs_dir)
    recipe = _recipe(run, arguments.overrides)
    work = _work(run, recipe, arguments)
    if arguments.cluster == "local":
        given = [name for name in SLURM_ALONE if getattr(arguments, name) != parser.get_default(name)]
        return _on_this_machine(work, list(_problems(recipe, work)), given, dry_run=arguments.dry_run)
    if not arguments.dry_run:
        demand_slurm("evaluate on this machine with --cluster local")
    place = place_of(arguments, is_array=False, array_by="")
    problems = [*_problems(recipe, work), *tuning_problems(recipe, place.profile.container)]
    order = SlurmOrder(work.name, work.run_dir, (work,), place, command)
    return hand_over(order, problems, dry_run=arguments.dry_run)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "evaluate.py --follow RUN",
        description="Tune a run from outside, by the teachers that it exports: 'pathfm evaluate --follow RUN' in a job "
        "of its own, started again until the run is over. Settings as tune.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--follow", required=True, metavar="RUN", help="a run's directory, or its name in runs/")
    parser.add_argument("--runs-dir", type=Path, default=RUNS, help="where runs lie (default: runs)")
    parser.add_argument("--once", action="store_true", help="score what is exported now, and end")
    parser.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto", help="auto: Slurm")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")
    add_options(parser)
    return parser


def _recipe(run: Run, overrides: Sequence[str]) -> Recipe:
    if not run.recipe.is_file():
        raise UserError(f"run {run.name} has no {run.recipe.name} yet; start it first")
    return build(Recipe, [read_layer(run.recipe), overrides_layer(overrides)])


def _work(run: Run, recipe: Recipe, arguments: Namespace) -> Work:
    directory = run.directory.absolute()
    words = ["-u", "-m", "pathfm", "evaluate", "--follow", str(directory), *(["--once"] if arguments.once else [])]
    words += arguments.overrides
    reads = (directory, *tuning_folders(recipe)) if recipe.tune.is_on else (directory,)
    return Work(checked_name(f"{run.name}-{_FOLDER}"), directory / _FOLDER, tuple(words), reads)


def _problems(recipe: Recipe, work: Work) -> Iterator[str]:
    if not recipe.tune.is_on:
        yield (
            "there is nothing to tune on; add tune.query_dataset_path=KNN:root=FOLDER:split=query "
            "tune.test_dataset_path=KNN:root=FOLDER:split=test"
        )
    if place := unwritable(work.run_dir):
        yield f"{place} cannot be written, so nothing can be kept of what is found"


def _on_this_machine(work: Work, problems: Sequence[str], of_slurm: Sequence[str], *, dry_run: bool) -> int:
    """`of_slurm`: the options that were given and are for Slurm alone."""
    if of_slurm:
        option = f"--{of_slurm[0].replace('_', '-')}"
        raise UserError(f"{option} is for --cluster slurm; --cluster local evaluates on this machine alone")
    command = [sys.executable, *work.arguments]
    if gpus_of_this_machine() > 1:
        command = one_process_per_gpu(command)
    if dry_run:
        print(shlex.join(command))
        return 0
    stop_at(problems)
    return run_local(command, work.run_dir / "logs" / "submitit")
