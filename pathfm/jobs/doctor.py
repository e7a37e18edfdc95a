"""`pathfm doctor`: whether this machine, these folders and this cluster are fit for a run. Changes nothing."""

import json
import math
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pathfm.config import find_file
from pathfm.errors import UserError, listed
from pathfm.jobs.arguments import CONFIGS, parse_with_overrides
from pathfm.jobs.before_queue import data_folders, problems_of_run
from pathfm.jobs.examination import cluster, machine, places
from pathfm.jobs.examination.finding import Finding, Verdict, examined, findings_table, of_problem, worst
from pathfm.jobs.examination.image import container_findings
from pathfm.jobs.examination.places import SILENT_MOUNT
from pathfm.jobs.slurm_options import PROFILES
from pathfm.jobs.training_set import open_training_set
from pathfm.launch.container import host_path
from pathfm.launch.profile import Container, Profile, read_profile
from pathfm.lifecycle.run import Run
from pathfm.log import warnings_kept
from pathfm.recipe import Recipe, find_config, read_recipe

_SECONDS_FOR_TORCH = 300
_SECONDS_TO_WRITE = 60


@dataclass(frozen=True)
class Subject:
    """What is examined: a recipe, the run's directory, a cluster; None where nobody named one."""

    recipe: Recipe | None = None
    recipe_file: Path | None = None
    overrides: tuple[str, ...] = ()
    run_dir: Path | None = None
    profile: Profile | None = None
    in_job: bool = False

    @property
    def container(self) -> Container:
        return self.profile.container if self.profile else Container()

    @property
    def ranks_on_node(self) -> int:
        return self.profile.tasks_per_node if self.profile else 1

    @property
    def wants_no_gpu(self) -> bool:
        by_recipe = self.recipe is not None and self.recipe.train.device == "cpu"
        return by_recipe or (self.profile is not None and self.profile.gpus_per_node == 0)

    @property
    def verdict_without_gpu(self) -> Verdict:
        return "ok" if self.wants_no_gpu else "fail" if self.in_job else "warn"

    @property
    def several_nodes(self) -> bool:
        """As far as can be told before anybody asks for nodes: a cluster has several."""
        return self.profile is not None or int(os.environ.get("SLURM_JOB_NUM_NODES") or "1") > 1


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when something fails, else 0."""
    arguments = parse_with_overrides(_parser(), argv)
    findings = list(_findings(arguments))
    verdict = worst(findings)
    if arguments.json:
        print(json.dumps({"verdict": verdict, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        print(findings_table(findings))
        print(_summary(findings))
    return 1 if verdict == "fail" else 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        "pathfm doctor",
        description="Examine this machine, and what a run would need of it. Settings are given as key=value.",
        allow_abbrev=False,
    )
    parser.add_argument("--profile", metavar="NAME", help="a cluster in launchers/profiles/, or a path")
    parser.add_argument("--config", metavar="NAME", help="a recipe in configs/, or a path (default: that of --run)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="the run's directory (default: runs/RECIPE)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    return parser


def _summary(findings: Sequence[Finding]) -> str:
    numbers = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in ("fail", "warn")}
    if not any(numbers.values()):
        return f"all {len(findings)} checks are well"
    return f"of {len(findings)} checks {numbers['fail']} fail, {numbers['warn']} warn"


def _findings(arguments: Namespace) -> Iterator[Finding]:
    """A profile or a recipe that cannot be read is a finding; what does not depend on it is examined all the same."""
    subject = Subject(run_dir=arguments.run, in_job="SLURM_STEP_ID" in os.environ)
    try:
        if arguments.profile:
            subject = replace(subject, profile=read_profile(find_file(arguments.profile, PROFILES, "profile")))
            yield Finding("profile", "ok", _of_profile(arguments.profile, subject.ranks_on_node, subject.wants_no_gpu))
    except UserError as error:
        yield of_problem("profile", str(error))
    try:
        subject = _with_recipe(subject, arguments)
    except UserError as error:
        yield of_problem("recipe", str(error))
    yield from of_machine(subject)


def _of_profile(name: str, ranks_on_node: int, is_without_gpus: bool) -> str:
    return f"{name}: {'no GPUs' if is_without_gpus else f'{ranks_on_node} GPUs'} on a node"


def _with_recipe(subject: Subject, arguments: Namespace) -> Subject:
    file = find_config(arguments.config, CONFIGS) if arguments.config else None
    if file is None and subject.run_dir and Run(subject.run_dir).recipe.is_file():
        file = Run(subject.run_dir).recipe
    if file is None:
        if arguments.overrides:
            raise UserError(f"{arguments.overrides[0]} belongs to a recipe; name one with --config")
        return subject
    recipe = read_recipe(file, arguments.overrides).recipe
    run_dir = subject.run_dir or Path(recipe.train.output_dir or Path("runs", file.stem))
    return replace(subject, recipe=recipe, recipe_file=file, overrides=tuple(arguments.overrides), run_dir=run_dir)


def of_machine(subject: Subject) -> Iterator[Finding]:
    """All checks that have something to look at, in an order in which the first that fails explains the others."""
    in_image = subject.container.runtime != "none"
    installed = machine.installed_versions()
    yield examined("versions", lambda: machine.versions(installed, trains_in_an_image=in_image))
    needs_gpus = subject.in_job and not subject.wants_no_gpu
    yield examined(
        "driver", lambda: machine.driver(gpus_are_needed=needs_gpus), 90, "the driver hangs; take another node"
    )
    checkpoint_bytes = None
    if "torch" in installed:
        findings, checkpoint_bytes = _with_torch(subject)
        yield from findings
    if subject.recipe:
        yield from _of_recipe(subject, subject.recipe)
    if subject.run_dir:
        yield from _of_run_directory(subject, subject.run_dir, checkpoint_bytes)
    if not subject.in_job:
        yield examined(
            "Slurm", lambda: cluster.slurm(is_needed=subject.profile is not None), 30, "ask the administrator"
        )
    if profile := subject.profile:
        yield from _of_container(profile)


def _of_container(profile: Profile) -> list[Finding]:
    """In a thread of its own as every check, for an image lies on a mount too."""
    found: list[Finding] = []

    def look() -> Finding:
        found.extend(list(container_findings(profile)))  # all or, where one raises, none
        return found[0]

    first = examined("container", look, 60, SILENT_MOUNT)
    return found or [first]


def _with_torch(subject: Subject) -> tuple[list[Finding], int | None]:
    """The findings of the process that has torch, and the bytes of a checkpoint."""
    command = [sys.executable, "-m", "pathfm.jobs.examination.with_torch"]
    command += ["--no-gpu-verdict", subject.verdict_without_gpu]
    if subject.recipe_file:
        command += ["--config", str(subject.recipe_file), *subject.overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=_SECONDS_FOR_TORCH)
        told = json.loads(output.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        process.kill()  # and not waited for: what hangs in a driver does not end
        return [Finding("torch", "fail", f"did not answer in {_SECONDS_FOR_TORCH} s: a GPU or a mount hangs")], None
    except (IndexError, json.JSONDecodeError):
        said = errors.strip().splitlines() or [f"it ended with {process.returncode}"]
        return [Finding("torch", "fail", f"the checks that need torch broke off: {said[-1]}")], None
    return [Finding(**finding) for finding in told["findings"]], told["checkpoint_bytes"]


def _of_recipe(subject: Subject, recipe: Recipe) -> Iterator[Finding]:
    batch_each = machine.loader_bytes(recipe, subject.ranks_on_node)
    is_here = subject.in_job or subject.profile is None
    yield examined(
        "shared memory", lambda: machine.shared_memory(batch_each, recipe.data.prefetch_batches, is_here=is_here)
    )
    yield examined("data", lambda: data(subject, recipe), 60, SILENT_MOUNT)
    environment = {**os.environ, **(subject.profile.environment if subject.profile else {})}
    yield examined("W&B", lambda: cluster.weights_and_biases(recipe.wandb, environment), 15)


def data(subject: Subject, recipe: Recipe) -> Finding:
    """The data set opens, its index fits its tars, and the batch fits the data set."""
    run_dir = subject.run_dir or Path("runs")
    with warnings_kept() as warnings:
        if problems := list(problems_of_run(recipe, run_dir, subject.ranks_on_node, subject.container)):
            return of_problem("data", problems[0])
    found = "the data set opens, its index fits"
    if subject.container.runtime == "none":
        dataset = open_training_set(recipe.train.dataset_path, recipe.student)
        found = f"{len(dataset):,} samples in {listed(dataset.cohorts, at_most=3)}; the index fits"
    if warnings:
        return Finding("data", "warn", f"{found}; {warnings[0]}", "pathfm verify looks at all of it")
    return Finding("data", "ok", found)


def _of_run_directory(subject: Subject, run_dir: Path, checkpoint_bytes: int | None) -> Iterator[Finding]:
    def mounts() -> Finding:
        return places.mounts(_folders(subject), run_dir, several_nodes=subject.several_nodes)

    def room() -> Finding:
        return places.room(run_dir, checkpoint_bytes, _checkpoints_to_come(subject, run_dir))

    def write_speed() -> Finding:
        return places.write_speed(run_dir, checkpoint_bytes, _save_within_s(subject))

    yield examined("mounts", mounts, if_silent=SILENT_MOUNT)
    yield examined("room", room, if_silent=SILENT_MOUNT)
    yield examined("write speed", write_speed, _SECONDS_TO_WRITE, SILENT_MOUNT)
    yield examined("clock", lambda: places.clock_of_files(run_dir), if_silent=SILENT_MOUNT)


def _folders(subject: Subject) -> dict[str, Path]:
    """Where this machine has the data."""
    found = (
        [host_path(subject.container, path) or path for path in data_folders(subject.recipe)] if subject.recipe else []
    )
    return {"data" if number == 0 else f"data ({number + 1})": path for number, path in enumerate(found)}


def _checkpoints_to_come(subject: Subject, run_dir: Path) -> int:
    """How many more will lie in the run at once than lie there now: one is written before another is removed."""
    if subject.recipe is None:
        return 0
    there = len(list(Run(run_dir).checkpoints.glob("step_????????")))
    return max(1, subject.recipe.checkpoint.keep_last + 1 - there)


def _save_within_s(subject: Subject) -> float:
    """The time for a last checkpoint after the signal."""
    limits = [subject.recipe.checkpoint.leave_within_s] if subject.recipe else []
    return min([*limits, *([subject.profile.signal_lead_s] if subject.profile else [])], default=math.inf)
