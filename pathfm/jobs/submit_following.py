"""Put `pathfm evaluate --follow RUN` on a Slurm cluster, or on this machine, beside the job that trains. No torch."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence

from pathfm.jobs.arguments import add_options_to_follow, parse_with_overrides
from pathfm.jobs.before_queue import tuning_folders, tuning_problems, unwritable
from pathfm.jobs.find_run import find_run
from pathfm.jobs.slurm_options import add_options, demand_slurm, for_slurm_alone, place_of
from pathfm.jobs.slurm_order import SlurmOrder, Work, hand_over
from pathfm.jobs.submit import checked_name, to_submit_again
from pathfm.jobs.tuning_sets import recipe_to_follow
from pathfm.jobs.works_here import run_here
from pathfm.lifecycle.run import Run
from pathfm.recipe import Recipe

_FOLDER = "following"  # in the run: logs and jobs of the evaluation


def main(argv: Sequence[str] | None = None) -> int:
    """`launchers/evaluate.py --follow`. Returns the exit status; raises `UserError` for what is wrong beforehand."""
    parser = _parser()
    command = to_submit_again(["python", *sys.argv] if argv is None else ["evaluate.py", *argv])
    arguments = parse_with_overrides(parser, argv)
    run = find_run(arguments.follow, arguments.runs_dir)
    recipe = recipe_to_follow(run, arguments.overrides)
    work = _work(run, recipe, arguments)
    if arguments.cluster == "local":
        given = for_slurm_alone(arguments, parser)
        return run_here([work], list(_problems(work)), given, does="evaluates", dry_run=arguments.dry_run)
    if not arguments.dry_run:
        demand_slurm("evaluate on this machine with --cluster local")
    place = place_of(arguments, is_array=False, array_by="")
    problems = [*_problems(work), *tuning_problems(recipe, place.profile.container)]
    order = SlurmOrder(work.name, work.run_dir, (work,), place, command)
    return hand_over(order, problems, dry_run=arguments.dry_run)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "evaluate.py --follow RUN",
        description="Tune a run from outside, by the teachers that it exports: 'pathfm evaluate --follow RUN' in a job "
        "of its own, started again until the run is over. Settings as tune.KEY=VALUE.",
        allow_abbrev=False,
    )
    add_options_to_follow(parser)
    parser.add_argument("--cluster", choices=("auto", "slurm", "local"), default="auto", help="auto: Slurm")
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")
    add_options(parser)
    return parser


def _work(run: Run, recipe: Recipe, arguments: Namespace) -> Work:
    directory = run.directory.absolute()
    words = ["-u", "-m", "pathfm", "evaluate", "--follow", str(directory), *(["--once"] if arguments.once else [])]
    words += arguments.overrides
    reads = (directory, *tuning_folders(recipe))
    return Work(checked_name(f"{run.name}-{_FOLDER}"), directory / _FOLDER, tuple(words), reads)


def _problems(work: Work) -> Iterator[str]:
    if place := unwritable(work.run_dir):
        yield f"{place} cannot be written, so nothing can be kept of what is found"
