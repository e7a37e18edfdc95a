"""Put a pretraining run on a Slurm cluster, on this machine, or into this process; check it first."""

import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathfm.config import build, read_layer, to_yaml
from pathfm.errors import UserError, listed
from pathfm.jobs.arguments import CONFIGS, parse_with_overrides
from pathfm.jobs.before_queue import data_folders, problems_of_run, stop_at
from pathfm.jobs.slurm_options import Place, add_options, demand_slurm, for_slurm_alone, place_of
from pathfm.jobs.slurm_order import SlurmOrder, Work, hand_over
from pathfm.jobs.sweep import points
from pathfm.launch.local import gpus_of_this_machine, run_in_this_process, run_local
from pathfm.launch.payload import one_process_per_gpu, trainer_command
from pathfm.launch.snapshot import frozen_recipe
from pathfm.lifecycle.run import Run
from pathfm.recipe import Recipe, changes_of_identity, find_config, read_recipe, written_out

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


@dataclass(frozen=True)
class Pretraining:
    """One run, as it is asked for on the command line, with absolute paths."""

    name: str
    run_dir: Path
    config: Path
    recipe: Recipe
    overrides: tuple[str, ...]

    @property
    def submitit_folder(self) -> Path:
        return self.run_dir / "logs" / "submitit"

    def work(self) -> Work:
        """The job that trains it, from a copy of its recipe."""
        text = to_yaml(written_out(self.recipe))
        _, *arguments = trainer_command("python", frozen_recipe(text, self.run_dir / "code"), self.run_dir, ())
        return Work(self.name, self.run_dir, tuple(arguments), tuple(data_folders(self.recipe)), text)


def main(argv: Sequence[str] | None = None) -> int:
    """`launchers/pretrain.py`. Returns the exit status; raises `UserError` for whatever can be known to be wrong."""
    parser = _parser()
    arguments = parse_with_overrides(parser, argv)
    arguments.command = to_submit_again(["python", *sys.argv] if argv is None else ["pathfm", "submit", *argv])
    if arguments.cluster in ("auto", "slurm"):
        if not arguments.dry_run:
            demand_slurm("train on this machine with --cluster local")
        return _on_slurm(arguments)
    return _on_this_machine(arguments, for_slurm_alone(arguments, parser, "sweep"))


def to_submit_again(words: Sequence[str]) -> str:
    """To be noted with a job; whoever wants to go on with its run adds --resubmit."""
    return shlex.join(word for word in words if word != "--resubmit")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pretrain.py",
        description="Start or continue a pretraining run. Starting a run's name again continues it.",
        epilog="Settings of the recipe are given as key=value, in any position. On Slurm, the code and the recipe are "
        "copied into the run, and the copies are what its job runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a recipe in configs/, or a path")
    parser.add_argument("--run", metavar="NAME", help="the run's name (default: the recipe's)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    parser.add_argument(
        "--cluster",
        choices=("auto", "slurm", "local", "debug"),
        default="auto",
        help="auto: Slurm; local: this machine; debug: this process, for a debugger",
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="begin anew; what the run has is kept aside (not on Slurm)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")
    add_options(parser)
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="on Slurm: a run for each value, in one job array; given again: for each combination",
    )
    return parser


def _run(arguments: Namespace, suffix: str = "", overrides: Sequence[str] = ()) -> Pretraining:
    """The run that is asked for; with a suffix to its name and more settings, one of a sweep."""
    config = find_config(arguments.config, CONFIGS)
    settings = (*arguments.overrides, *overrides)
    read = read_recipe(config, settings)
    for note in read.notes:
        print(f"note: {note}", file=sys.stderr)
    name = checked_name("-".join(filter(None, (arguments.run or config.stem, suffix))))
    return Pretraining(name, arguments.runs_dir.absolute() / name, config.absolute(), read.recipe, settings)


def checked_name(name: str) -> str:
    """A run's. Raises `UserError` for one that Slurm or a file system could take amiss."""
    if not _NAME.fullmatch(name):
        raise UserError(f"'{name}' cannot be a run's name: letters, digits and . _ + - only, at most 100 of them")
    return name


# ---- Slurm


def _on_slurm(arguments: Namespace) -> int:
    runs = [_run(arguments, point.suffix, point.overrides) for point in points(arguments.sweep)]  # one without a sweep
    place = place_of(arguments, is_array=bool(arguments.sweep), array_by="--sweep KEY=VALUE,VALUE")
    if arguments.no_resume:  # part of the command, so it would begin anew after every interruption
        raise UserError(
            "--no-resume is not for Slurm, which starts a job's command again; give another name with --run"
        )
    name = arguments.run or find_config(arguments.config, CONFIGS).stem
    folder = arguments.runs_dir.absolute() / f"{name}.sweep" if arguments.sweep else runs[0].run_dir
    works = tuple(run.work() for run in runs)
    order = SlurmOrder(name, folder, works, place, arguments.command, array_is="sweep" if arguments.sweep else "")
    return hand_over(order, list(_problems(runs, place)), dry_run=arguments.dry_run)


def _problems(runs: Sequence[Pretraining], place: Place) -> Iterator[str]:
    for run in runs:
        yield from problems_of_run(run.recipe, run.run_dir, place.ranks, place.profile.container)
        yield from _other_recipe(run)


def _other_recipe(run: Pretraining) -> Iterator[str]:
    """A run goes on with the recipe it was begun with; global batch and folder are settled at its first start."""
    begun_with = Run(run.run_dir).recipe
    if not begun_with.is_file():
        return
    begun = build(Recipe, [read_layer(begun_with)])
    settled = {"global_batch_size": run.recipe.train.global_batch_size or begun.train.global_batch_size}
    train = run.recipe.train.model_copy(update={**settled, "output_dir": begun.train.output_dir})
    if changes := changes_of_identity(begun, written_out(run.recipe).model_copy(update={"train": train})):
        yield f"run {run.name} was begun with another recipe ({listed(changes)}); take another run name"


# ---- this machine


def _on_this_machine(arguments: Namespace, of_slurm: Sequence[str]) -> int:
    """`of_slurm`: the options that were given and are for Slurm alone."""
    cluster = arguments.cluster
    if of_slurm:
        option = f"--{of_slurm[0].replace('_', '-')}"
        raise UserError(f"{option} is for --cluster slurm; --cluster {cluster} trains on this machine alone")
    run = _run(arguments)
    begin_anew = ["--no-resume"] if arguments.no_resume else []
    command = trainer_command(sys.executable, run.config, run.run_dir, [*begin_anew, *run.overrides])
    gpus = gpus_of_this_machine() if cluster == "local" and run.recipe.train.device != "cpu" else 0
    if gpus > 1:
        command = one_process_per_gpu(command)
    if arguments.dry_run:
        print(shlex.join(command))
        return 0
    stop_at(list(problems_of_run(run.recipe, run.run_dir, ranks=max(1, gpus))))
    if cluster == "debug":
        return run_in_this_process(command, run.submitit_folder)
    return run_local(command, run.submitit_folder)
