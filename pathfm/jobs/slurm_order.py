"""What goes to Slurm with one call of sbatch: one piece of work, or several alike as an array. Shared by the launchers.

Each piece has a directory that it is known by, and a supervisor that brings it back until it is done.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from pathfm.errors import UserError, listed
from pathfm.jobs.arguments import CONFIGS
from pathfm.jobs.before_queue import stop_at
from pathfm.jobs.earlier_jobs import being_submitted, standing, word_for
from pathfm.jobs.examination.finding import Finding, Verdict
from pathfm.jobs.examination.image import container_findings
from pathfm.jobs.slurm_options import Place
from pathfm.launch.attempts import Submission, note_submission, now
from pathfm.launch.container import Needs, host_path, removal_command, srun_options, task_command
from pathfm.launch.sbatch import EXPORTED, SlurmArray, SlurmJob, array_of, array_text, submit_array, tell_apart
from pathfm.launch.snapshot import Snapshot, snapshot_of, write_recipe, write_snapshot
from pathfm.launch.supervisor import batch_step
from pathfm.lifecycle.run import Run
from pathfm.tables import text_table


@dataclass(frozen=True)
class Work:
    """One job. All paths are absolute."""

    name: str
    run_dir: Path
    arguments: tuple[str, ...]  # of Python, in every task
    reads: tuple[Path, ...] = ()  # folders that a task must see, unless the profile binds them
    recipe: str = ""  # a text to be kept in the run, where `arguments` may name it

    @property
    def code(self) -> Path:
        """Copies of what its jobs run: the package and the recipe."""
        return self.run_dir / "code"


@dataclass(frozen=True)
class SlurmOrder:
    """Work that is submitted together."""

    name: str
    folder: Path  # of what it shares, and of submitit's files
    works: tuple[Work, ...]
    place: Place
    command: str  # that submits it
    array_is: str = ""  # what to call several of them: a sweep

    def with_snapshot(self) -> "PreparedOrder":
        """Read the code that is to run, at once."""
        if "%" in str(self.folder):
            raise UserError(f"{self.folder} holds a '%', which Slurm would read as a job number; choose another folder")
        return PreparedOrder(self, None if self.place.is_live else snapshot_of(CONFIGS.parent))


@dataclass(frozen=True)
class PreparedOrder:
    """An order and the code that it runs. `snapshot` None: the checkout itself."""

    order: SlurmOrder
    snapshot: Snapshot | None

    @property
    def code(self) -> Path:
        """The folder to import from: by the supervisor, and by the ranks unless the image has the code."""
        return self.order.folder / "code" / self.snapshot.name if self.snapshot else CONFIGS.parent

    def array(self) -> SlurmArray:
        order = self.order
        jobs = tuple(self._job(work) for work in order.works)
        if not order.array_is:
            return array_of(jobs[0])
        return SlurmArray(order.name, order.folder / "submitit", jobs, order.place.parallel)

    def _job(self, work: Work) -> SlurmJob:
        place, needs = self.order.place, self._needs(work)
        container = place.profile.container
        python = sys.executable if container.runtime == "none" else container.python
        return SlurmJob(
            work.name,
            work.run_dir,
            place.nodes,
            place.profile,
            tuple(task_command(container, [python, *work.arguments], needs)),
            self.code,
            place.options,
            container_options=tuple(srun_options(container, needs)),
            clean_up=tuple(removal_command(container, work.run_dir)),
        )

    def _needs(self, work: Work) -> Needs:
        profile = self.order.place.profile
        container = profile.container
        return Needs(
            working_directory=Path.cwd(),
            run_dir=work.run_dir,
            folders=tuple(folder for folder in work.reads if host_path(container, folder) is None),
            read_only=() if container.has_the_code else (self.code,),
            gpus=profile.gpus_per_node > 0,
            environment=(*EXPORTED, *profile.environment),
            user=f"{os.getuid()}:{os.getgid()}",
        )


def hand_over(order: SlurmOrder, problems: Sequence[str], *, dry_run: bool) -> int:
    """Submit the order, or show it. Raises `UserError` for `problems`, and for what is wrong with the image.

    Work that is queued, running or done already is not submitted again.
    """
    of_image = list(container_findings(order.place.profile))
    problems = list(dict.fromkeys([*problems, *_in_words(of_image, "fail")]))
    for note in _in_words(of_image, "warn"):
        print(f"note: {note}", file=sys.stderr)
    if dry_run:
        print(_shown(order.with_snapshot().array()), end="")
        for problem in problems:
            print(f"note: a submission from this machine would stop: {problem}", file=sys.stderr)
        return 0
    stop_at(problems)
    with ExitStack() as stack:
        for work in order.works:
            stack.enter_context(being_submitted(Run(work.run_dir)))
        if works := _free_to_go(order.works, resubmit=order.place.resubmit):
            _submit(replace(order, works=tuple(works)).with_snapshot())
    return 0


def _in_words(findings: Sequence[Finding], verdict: Verdict) -> list[str]:
    return [f"{finding.found}; {finding.advice}" for finding in findings if finding.verdict == verdict]


def _free_to_go(works: Sequence[Work], *, resubmit: bool) -> list[Work]:
    """Those that are to be submitted. Those of an array that are queued, running or finished are left alone.

    Raises `UserError` when one has ended and nobody said that it is to go on, or when none is left.
    """
    standings = [(work, standing(Run(work.run_dir))) for work in works]
    if ended := [stands.line for _, stands in standings if stands.what == "ended" and not resubmit]:
        raise UserError(listed(ended, at_most=1))
    free = [work for work, stands in standings if stands.what in ("new", "ended")]
    if not free and (busy := [stands.line for _, stands in standings if stands.what == "busy"]):
        raise UserError(listed(busy, at_most=1))
    for _, stands in standings:
        if stands.what in ("busy", "done"):
            print(stands.line)
    return free


def _submit(prepared: PreparedOrder) -> None:
    """Copy what is to run, put it in the queue, note the jobs and say what they are."""
    order, array = prepared.order, prepared.array()
    if prepared.snapshot:
        write_snapshot(prepared.snapshot, order.folder / "code")
    for work in order.works:
        if work.recipe:
            write_recipe(work.recipe, work.code)
    job_ids = submit_array(array, batch_step)
    place = order.place
    for work, job_id in zip(order.works, job_ids, strict=True):
        size = (place.nodes, place.profile.tasks_per_node)
        note_submission(work.run_dir, Submission(job_id, now(), *size, order.command))
    for problem in tell_apart(array, job_ids):
        print(f"note: {problem}", file=sys.stderr)
    _say(order, job_ids)


def _say(order: SlurmOrder, job_ids: Sequence[str]) -> None:
    place = order.place
    if not order.array_is:
        print(f"submitted job {job_ids[0]}: run {order.name}, {place.size_in_words}")
        print(f"follow it: pathfm logs {word_for(Run(order.works[0].run_dir))} -f")
        return
    at_once = f", {place.parallel} at once" if place.parallel else ""
    number = job_ids[0].partition("_")[0]
    what = f"{order.array_is} {order.name}, {len(job_ids)} runs, {place.size_in_words} each{at_once}"
    print(f"submitted job {number}: {what}")
    print(text_table(["job", "run"], [[job, work.name] for job, work in zip(job_ids, order.works, strict=True)]))


def _shown(array: SlurmArray) -> str:
    """The script, followed by the commands it leads to as comments, so that the whole is still a script."""
    text = array_text(array).rstrip()
    for job in array.jobs:
        command = shlex.join(job.command(str(job.run_dir / "logs" / "JOB.RESTART" / "rank_%t.log")))
        lines = [f"The supervisor of run {job.name} starts this, and waits for it:", *command.splitlines()]
        text += "\n\n" + "\n".join(f"# {line}" for line in lines)
    return f"{text}\n"
