"""Put a pretraining run on a Slurm cluster, on this machine, or into this process; check it first."""

import os
import re
import shlex
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pathfm.config import build, find_file, read_layer, to_yaml
from pathfm.errors import UserError, listed
from pathfm.jobs.arguments import CONFIGS, parse_with_overrides
from pathfm.jobs.before_queue import data_folders, problems_of_run, stop_at
from pathfm.jobs.earlier_jobs import being_submitted, standing, word_for
from pathfm.jobs.examination.finding import Finding, Verdict
from pathfm.jobs.examination.image import container_findings
from pathfm.jobs.sweep import points
from pathfm.launch.attempts import Submission, note_submission, now
from pathfm.launch.container import Needs, host_path, removal_command, srun_options, task_command
from pathfm.launch.local import gpus_of_this_machine, run_in_this_process, run_local
from pathfm.launch.payload import one_process_per_gpu, trainer_command
from pathfm.launch.profile import Profile, hours, read_profile
from pathfm.launch.sbatch import EXPORTED, SlurmArray, SlurmJob, array_of, array_text, submit_array, tell_apart
from pathfm.launch.snapshot import Snapshot, frozen_recipe, snapshot_of, write_recipe, write_snapshot
from pathfm.launch.supervisor import batch_step
from pathfm.lifecycle.run import Run
from pathfm.recipe import Recipe, changes_of_identity, find_config, read_recipe, written_out
from pathfm.tables import text_table

PROFILES = CONFIGS.parent / "launchers" / "profiles"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
# Options that mean something to Slurm alone: keys of the profile, further ones of sbatch, and how to submit.
_OF_PROFILE = ("gpus_per_node", "partition", "account", "qos", "constraint", "time")
_OF_SBATCH = ("exclude", "dependency", "reservation", "comment")
_SLURM_ALONE = ("nodes", "profile", *_OF_PROFILE, *_OF_SBATCH, "sweep", "parallel", "live", "resubmit")


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

    @property
    def code(self) -> Path:
        """What its jobs run: copies of the package and of its recipe."""
        return self.run_dir / "code"

    @property
    def frozen_recipe(self) -> str:
        return to_yaml(written_out(self.recipe))


@dataclass(frozen=True)
class SlurmOrder:
    """What goes to Slurm with one call of sbatch: a run, or the runs of a sweep."""

    name: str
    folder: Path  # of what its runs share, and of submitit's files
    runs: tuple[Pretraining, ...]
    profile: Profile
    nodes: int
    is_sweep: bool
    snapshot: Snapshot | None  # None: the checkout itself is run

    @property
    def code(self) -> Path:
        """The folder to import from: by the supervisor, and by the ranks unless the image has the code."""
        return self.folder / "code" / self.snapshot.name if self.snapshot else CONFIGS.parent


def main(argv: Sequence[str] | None = None) -> int:
    """`launchers/pretrain.py`. Returns the exit status; raises `UserError` for whatever can be known to be wrong."""
    parser = _parser()
    arguments = parse_with_overrides(parser, argv)
    arguments.command = _to_submit_again(["python", *sys.argv] if argv is None else ["pathfm", "submit", *argv])
    cluster = _cluster(arguments.cluster, arguments.dry_run)
    if cluster == "slurm":
        return _on_slurm(arguments)
    given = [name for name in _SLURM_ALONE if getattr(arguments, name) != parser.get_default(name)]
    return _on_this_machine(arguments, cluster, given)


def _to_submit_again(words: Sequence[str]) -> str:
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
    _add_options_of_slurm(parser)
    return parser


def _add_options_of_slurm(parser: ArgumentParser) -> None:
    where = parser.add_argument_group("on Slurm: where", "The first six overrule the profile; more is said there.")
    where.add_argument("--gpus-per-node", type=int, metavar="N", help="one task each; 0: no GPUs, one task per node")
    where.add_argument("--partition", metavar="NAME")
    where.add_argument("--account", metavar="NAME")
    where.add_argument("--qos", metavar="NAME")
    where.add_argument("--constraint", metavar="FEATURES", help="of the nodes, e.g. a100")
    where.add_argument("--time", metavar="HOURS", help="the limit of the job, or as D-HH:MM:SS")
    where.add_argument("--profile", metavar="NAME", help="in launchers/profiles/, or a path (default: slurm)")
    where.add_argument("--nodes", type=int, default=1, metavar="N", help="(default: 1)")
    where.add_argument("--exclude", metavar="NODES", help="nodes to do without")
    where.add_argument("--reservation", metavar="NAME")
    where.add_argument("--dependency", metavar="SPEC", help="what is waited for, e.g. afterok:1234")
    where.add_argument("--comment", metavar="TEXT")
    what = parser.add_argument_group("on Slurm: what")
    what.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="a run for each value, in one job array; given again: for each combination",
    )
    what.add_argument("--parallel", type=int, metavar="N", help="how many runs of the sweep may train at once")
    what.add_argument("--resubmit", action="store_true", help="go on with a run whose job was cancelled or has failed")
    what.add_argument("--live", action="store_true", help="run this checkout, not a copy: later changes are in the job")


def _cluster(wanted: str, dry_run: bool) -> str:
    """`auto` resolved. A dry run needs no Slurm."""
    if wanted in ("auto", "slurm") and not dry_run and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            "there is no Slurm here (sbatch and srun are not on PATH); train on this machine with --cluster local, "
            "or see what would be submitted with --dry-run"
        )
    return "slurm" if wanted == "auto" else wanted


def _run(arguments: Namespace, suffix: str = "", overrides: Sequence[str] = ()) -> Pretraining:
    """The run that is asked for; with a suffix to its name and more settings, one of a sweep."""
    config = find_config(arguments.config, CONFIGS)
    settings = (*arguments.overrides, *overrides)
    read = read_recipe(config, settings)
    for note in read.notes:
        print(f"note: {note}", file=sys.stderr)
    name = "-".join(filter(None, (arguments.run or config.stem, suffix)))
    if not _NAME.fullmatch(name):
        raise UserError(f"'{name}' cannot be a run's name: letters, digits and . _ + - only, at most 100 of them")
    return Pretraining(name, arguments.runs_dir.absolute() / name, config.absolute(), read.recipe, settings)


# ---- Slurm


def _on_slurm(arguments: Namespace) -> int:
    order = _order(arguments)
    of_image = list(container_findings(order.profile))
    problems = list(dict.fromkeys([*_problems(order), *_in_words(of_image, "fail")]))
    for note in _in_words(of_image, "warn"):
        print(f"note: {note}", file=sys.stderr)
    if arguments.dry_run:
        print(_shown(_array(order, arguments)), end="")
        for problem in problems:
            print(f"note: a submission from this machine would stop: {problem}", file=sys.stderr)
        return 0
    stop_at(problems)
    with ExitStack() as stack:
        for run in order.runs:
            stack.enter_context(being_submitted(Run(run.run_dir)))
        runs = _free_to_go(order.runs, resubmit=arguments.resubmit)
        if runs:
            _submit(replace(order, runs=tuple(runs)), arguments)
    return 0


def _order(arguments: Namespace) -> SlurmOrder:
    """Raises `UserError` for whatever is wrong with it by itself."""
    is_sweep = bool(arguments.sweep)
    if is_sweep:
        runs = [_run(arguments, point.suffix, point.overrides) for point in points(arguments.sweep)]
    else:
        runs = [_run(arguments)]
    name = arguments.run or find_config(arguments.config, CONFIGS).stem
    folder = arguments.runs_dir.absolute() / f"{name}.sweep" if is_sweep else runs[0].run_dir
    profile = read_profile(find_file(arguments.profile or "slurm", PROFILES, "profile"), _changes(arguments))
    if arguments.nodes < 1:
        raise UserError(f"--nodes is {arguments.nodes}; a job has at least 1")
    if arguments.parallel is not None and (arguments.parallel < 1 or not is_sweep):
        raise UserError("--parallel N is for a sweep, of which at least one run trains: add --sweep KEY=VALUE,VALUE")
    if arguments.no_resume:  # part of the command, so it would begin anew after every interruption
        raise UserError(
            "--no-resume is not for Slurm, which starts a job's command again; give another name with --run"
        )
    if "%" in str(folder):
        raise UserError(f"{folder} holds a '%', which Slurm would read as a job number; choose another folder")
    snapshot = None if arguments.live else snapshot_of(CONFIGS.parent)
    return SlurmOrder(name, folder, tuple(runs), profile, arguments.nodes, is_sweep, snapshot)


def _changes(arguments: Namespace) -> dict[str, str | int | float]:
    """Of the profile, by the command line."""
    given = {name: value for name in _OF_PROFILE if (value := getattr(arguments, name)) is not None}
    if "time" in given:
        given["time_limit_hours"] = hours(given.pop("time"))
    return given


def _problems(order: SlurmOrder) -> Iterator[str]:
    ranks = order.nodes * order.profile.tasks_per_node
    for run in order.runs:
        yield from problems_of_run(run.recipe, run.run_dir, ranks, order.profile.container)
        yield from _other_recipe(run)


def _in_words(findings: Sequence[Finding], verdict: Verdict) -> list[str]:
    return [f"{finding.found}; {finding.advice}" for finding in findings if finding.verdict == verdict]


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


def _free_to_go(runs: Sequence[Pretraining], *, resubmit: bool) -> list[Pretraining]:
    """Those that are to be submitted. Those of a sweep that are queued, running or finished are left alone.

    Raises `UserError` when a run has ended and nobody said that it is to go on, or when no run is left.
    """
    standings = [(run, standing(Run(run.run_dir))) for run in runs]
    if ended := [stands.line for _, stands in standings if stands.what == "ended" and not resubmit]:
        raise UserError(listed(ended, at_most=1))
    free = [run for run, stands in standings if stands.what in ("new", "ended")]
    if not free and (busy := [stands.line for _, stands in standings if stands.what == "busy"]):
        raise UserError(listed(busy, at_most=1))
    for _, stands in standings:
        if stands.what in ("busy", "done"):
            print(stands.line)
    return free


def _submit(order: SlurmOrder, arguments: Namespace) -> None:
    """Copy what is to run, put it in the queue, note the jobs and say what they are."""
    array = _array(order, arguments)
    if order.snapshot:
        write_snapshot(order.snapshot, order.folder / "code")
    for run in order.runs:
        write_recipe(run.frozen_recipe, run.code)
    job_ids = submit_array(array, batch_step)
    tasks = order.profile.tasks_per_node
    for run, job_id in zip(order.runs, job_ids, strict=True):
        note_submission(run.run_dir, Submission(job_id, now(), order.nodes, tasks, arguments.command))
    for problem in tell_apart(array, job_ids):
        print(f"note: {problem}", file=sys.stderr)
    size = f"{order.nodes} x {tasks} tasks"
    if not order.is_sweep:
        print(f"submitted job {job_ids[0]}: run {order.name}, {size}")
        print(f"follow it: pathfm logs {word_for(Run(order.runs[0].run_dir))} -f")
        return
    at_once = f", {arguments.parallel} at once" if arguments.parallel else ""
    print(
        f"submitted job {job_ids[0].partition('_')[0]}: sweep {order.name}, {len(job_ids)} runs, {size} each{at_once}"
    )
    print(text_table(["job", "run"], [[job_id, run.name] for run, job_id in zip(order.runs, job_ids, strict=True)]))


def _array(order: SlurmOrder, arguments: Namespace) -> SlurmArray:
    options = {name: value for name in _OF_SBATCH if (value := getattr(arguments, name)) is not None}
    jobs = tuple(_job(run, order, options) for run in order.runs)
    if not order.is_sweep:
        return array_of(jobs[0])
    return SlurmArray(order.name, order.folder / "submitit", jobs, arguments.parallel)


def _job(run: Pretraining, order: SlurmOrder, options: Mapping[str, str | int | bool]) -> SlurmJob:
    profile, container, needs = order.profile, order.profile.container, _needs(run, order)
    python = sys.executable if container.runtime == "none" else container.python
    trainer = trainer_command(python, frozen_recipe(run.frozen_recipe, run.code), run.run_dir, ())
    return SlurmJob(
        run.name,
        run.run_dir,
        order.nodes,
        profile,
        tuple(task_command(container, trainer, needs)),
        order.code,
        options,
        container_options=tuple(srun_options(container, needs)),
        clean_up=tuple(removal_command(container, run.run_dir)),
    )


def _needs(run: Pretraining, order: SlurmOrder) -> Needs:
    container = order.profile.container
    return Needs(
        working_directory=Path.cwd(),
        run_dir=run.run_dir,
        folders=tuple(folder for folder in data_folders(run.recipe) if host_path(container, folder) is None),
        read_only=() if container.has_the_code else (order.code,),
        gpus=order.profile.gpus_per_node > 0,
        environment=(*EXPORTED, *order.profile.environment),
        user=f"{os.getuid()}:{os.getgid()}",
    )


def _shown(array: SlurmArray) -> str:
    """The script, followed by the commands it leads to as comments, so that the whole is still a script."""
    text = array_text(array).rstrip()
    for job in array.jobs:
        command = shlex.join(job.command(str(job.run_dir / "logs" / "JOB.RESTART" / "rank_%t.log")))
        lines = [f"The supervisor of run {job.name} starts this, and waits for it:", *command.splitlines()]
        text += "\n\n" + "\n".join(f"# {line}" for line in lines)
    return f"{text}\n"


# ---- this machine


def _on_this_machine(arguments: Namespace, cluster: str, of_slurm: Sequence[str]) -> int:
    """`of_slurm`: the options that were given and are for Slurm alone."""
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
