"""Put a pretraining run on a Slurm cluster, on this machine, or into this process; check it first."""

import os
import re
import shlex
import shutil
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pathfm.config import find_file
from pathfm.errors import UserError
from pathfm.jobs.arguments import CONFIGS, parse_with_overrides
from pathfm.jobs.before_queue import data_folders, problems_of_container, problems_of_run, stop_at
from pathfm.launch.container import host_path, inside
from pathfm.launch.local import gpus_of_this_machine, run_in_this_process, run_local
from pathfm.launch.payload import one_process_per_gpu, trainer_command
from pathfm.launch.profile import Profile, read_profile
from pathfm.launch.sbatch import SlurmJob, sbatch_text, submit
from pathfm.launch.supervisor import batch_step
from pathfm.recipe import Recipe, find_config, read_recipe

PROFILES = CONFIGS.parent / "launchers" / "profiles"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


@dataclass(frozen=True)
class Pretraining:
    """One run, as it is asked for on the command line, with absolute paths."""

    name: str
    run_dir: Path
    config: Path
    recipe: Recipe
    trainer_arguments: tuple[str, ...]

    @property
    def submitit_folder(self) -> Path:
        return self.run_dir / "logs" / "submitit"

    def trainer(self, python: str) -> list[str]:
        return trainer_command(python, self.config, self.run_dir, self.trainer_arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """`launchers/pretrain.py`. Returns the exit status; raises `UserError` for whatever can be known to be wrong."""
    arguments = parse_with_overrides(_parser(), argv)
    cluster = _cluster(arguments.cluster, arguments.dry_run)
    run = _run(arguments)
    if cluster == "slurm":
        return _on_slurm(run, arguments)
    return _on_this_machine(run, arguments, cluster)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pretrain.py",
        description="Start or continue a pretraining run. Starting a run's name again continues it.",
        epilog="Settings of the recipe are given as key=value, in any position.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a recipe in configs/, or a path")
    parser.add_argument("--run", metavar="NAME", help="the run's name (default: the recipe's)")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the cluster (default: 1)")
    parser.add_argument(
        "--cluster",
        choices=("auto", "slurm", "local", "debug"),
        default="auto",
        help="auto: Slurm; local: this machine; debug: this process, for a debugger",
    )
    parser.add_argument(
        "--profile", metavar="NAME", help="a cluster in launchers/profiles/, or a path (default: slurm)"
    )
    parser.add_argument(
        "--no-resume", action="store_true", help="begin anew; what the run has is kept aside (not on Slurm)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be submitted, and stop")
    return parser


def _cluster(wanted: str, dry_run: bool) -> str:
    """`auto` resolved. A dry run needs no Slurm."""
    if wanted in ("auto", "slurm") and not dry_run and not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            "there is no Slurm here (sbatch and srun are not on PATH); train on this machine with --cluster local, "
            "or see what would be submitted with --dry-run"
        )
    return "slurm" if wanted == "auto" else wanted


def _run(arguments: Namespace) -> Pretraining:
    config = find_config(arguments.config, CONFIGS)
    read = read_recipe(config, arguments.overrides)
    for note in read.notes:
        print(f"note: {note}", file=sys.stderr)
    name = arguments.run or config.stem
    if not _NAME.fullmatch(name):
        raise UserError(f"'{name}' cannot be a run's name: letters, digits and . _ + - only, at most 100 of them")
    begin_anew = ["--no-resume"] if arguments.no_resume else []
    run_dir = arguments.runs_dir.absolute() / name
    return Pretraining(name, run_dir, config.absolute(), read.recipe, (*begin_anew, *arguments.overrides))


# ---- Slurm


def _on_slurm(run: Pretraining, arguments: Namespace) -> int:
    profile = read_profile(find_file(arguments.profile or "slurm", PROFILES, "profile"))
    if arguments.nodes < 1:
        raise UserError(f"--nodes is {arguments.nodes}; a job has at least 1")
    if arguments.no_resume:  # part of the command, so it would begin anew after every interruption
        raise UserError(
            "--no-resume is not for Slurm, which starts a job's command again; give another name with --run"
        )
    if "%" in str(run.run_dir):
        raise UserError(f"{run.run_dir} holds a '%', which Slurm would read as a job number; choose another folder")
    job = _slurm_job(run, profile, arguments.nodes)
    ranks = arguments.nodes * profile.tasks_per_node
    problems = [
        *problems_of_run(run.recipe, run.run_dir, ranks, profile.container),
        *problems_of_container(profile.container),
    ]
    if arguments.dry_run:
        print(_shown(job), end="")
        for problem in problems:
            print(f"note: a submission from this machine would stop: {problem}", file=sys.stderr)
        return 0
    stop_at(problems)
    job_id = submit(job, batch_step)
    print(f"submitted job {job_id}: run {run.name}, {job.nodes} x {profile.tasks_per_node} tasks")
    print(f"log: tail -F {shlex.quote(str(job.folder / f'{job_id}_0_log.out'))}")
    return 0


def _slurm_job(run: Pretraining, profile: Profile, nodes: int) -> SlurmJob:
    container = profile.container
    unbound = [folder for folder in data_folders(run.recipe) if host_path(container, folder) is None]
    payload = inside(
        container,
        run.trainer(sys.executable if container.runtime == "none" else container.python),
        working_directory=Path.cwd(),
        needs=(run.run_dir.parent, run.config.parent, *unbound),
        with_gpus=profile.gpus_per_node > 0,
        environment=profile.environment,
        user=f"{os.getuid()}:{os.getgid()}",
    )
    return SlurmJob(run.name, run.run_dir, nodes, profile, tuple(payload))


def _shown(job: SlurmJob) -> str:
    """The script, followed by the command it leads to as a comment, so that the whole is still a script."""
    shown_log = str(job.run_dir / "logs" / "JOB.RESTART" / "rank_%t.log")
    leads_to = f"# The job's supervisor starts this, and waits for it:\n# {shlex.join(job.command(shown_log))}"
    return f"{sbatch_text(job).rstrip()}\n\n{leads_to}\n"


# ---- this machine


def _on_this_machine(run: Pretraining, arguments: Namespace, cluster: str) -> int:
    if arguments.nodes != 1 or arguments.profile:
        option = "--profile" if arguments.profile else "--nodes"
        raise UserError(f"{option} is for --cluster slurm; --cluster {cluster} trains on this machine alone")
    command = run.trainer(sys.executable)
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
