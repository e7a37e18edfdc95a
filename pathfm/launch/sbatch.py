"""A Slurm job as submitit submits it: one supervisor in the batch step, which starts the payload on all tasks.

Several jobs that differ in nothing but run and payload are submitted as one array.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathfm.errors import UserError
from pathfm.launch.profile import Container, Profile
from pathfm.launch.scontrol import SlurmRefusal, show_job
from pathfm.launch.srun import srun_command

EXPORTED = (
    "OMP_NUM_THREADS",
    "PYTHONSAFEPATH",
    "PYTHONPATH",
    "PATHFM_IMAGE",
)  # by the script of a job, for supervisor and ranks
_SECONDS_TO_ANSWER = 20.0


@dataclass(frozen=True)
class SlurmJob:
    """What is asked of Slurm, and all that the supervisor needs to start the ranks of a run and to start them again."""

    name: str
    run_dir: Path
    nodes: int
    profile: Profile
    payload: tuple[str, ...]  # the command of one rank
    code: Path | None = None  # the folder that holds the package to run; None: the one that is installed
    options: Mapping[str, str | int | bool] = field(default_factory=dict)  # further ones of sbatch, by long names
    first_job: str | None = None  # of a chain in which each job follows another
    container_options: tuple[str, ...] = ()  # of srun, where Slurm itself starts the image
    clean_up: tuple[str, ...] = ()  # a command for each node, before and after the ranks

    @property
    def folder(self) -> Path:
        """For submitit's script, pickle and log."""
        return self.run_dir / "logs" / "submitit"

    def command(self, output: str) -> list[str]:
        """The srun line. `output`: the log of a rank, with %t in the place of its number."""
        profile = self.profile
        options = (*profile.srun, *self.container_options)
        return srun_command(
            self.nodes, profile.tasks_per_node, profile.cpus_per_task, self.payload, output=output, options=options
        )

    def clean_up_command(self) -> list[str]:
        """The srun line that runs `clean_up` once on each node; empty when there is nothing to clean."""
        if not self.clean_up:
            return []
        return srun_command(self.nodes, 1, 1, self.clean_up, output="/dev/null", options=("--overlap",))


@dataclass(frozen=True)
class SlurmArray:
    """Jobs that go to Slurm together. They are alike but for name, run and payload; a single one is an ordinary job."""

    name: str
    folder: Path  # for submitit's files, which an array has in one place
    jobs: tuple[SlurmJob, ...]
    at_once: int | None = None  # how many may run at the same time; None: as many as there is room for

    @property
    def is_one_job(self) -> bool:
        return len(self.jobs) == 1


def array_of(job: SlurmJob) -> SlurmArray:
    """The job alone."""
    return SlurmArray(job.name, job.folder, (job,))


def submit(job: SlurmJob, supervisor: Callable[[SlurmJob], int]) -> str:
    """Put the job in the queue; `supervisor` runs in its batch step. Returns its id.

    Raises `UserError` with sbatch's own words when it is refused.
    """
    return submit_array(array_of(job), supervisor)[0]


def submit_array(array: SlurmArray, supervisor: Callable[[SlurmJob], int]) -> list[str]:
    """Like `submit` for all jobs of the array. Returns their ids in the same order, ARRAY_INDEX if they are several."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        with _outside_of_any_job():
            return _submitted(array, array.folder, supervisor)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused the job: {' '.join(str(error).split())}") from error


@contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """A job submitted from within a job must not inherit that job's size; the cluster stays the same."""
    from submitit.helpers import clean_env, environment_variables

    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    cluster = {"SLURM_CONF": conf} if (conf := os.environ.get("SLURM_CONF")) else {}
    with clean_env(), environment_variables(**cluster):
        yield


def tell_apart(array: SlurmArray, job_ids: Sequence[str]) -> Iterator[str]:
    """Give every element of a submitted array the name of its run in the queue, and its run a link to its log.

    Yields a line for each that could not be named.
    """
    for job, job_id in zip(array.jobs, job_ids, strict=True):
        if not array.is_one_job and (refusal := _rename(job_id, job.name)):
            yield f"job {job_id} of run {job.name} bears the name of its array in the queue: {refusal}"
        if job.folder != array.folder:
            number = job_id if array.is_one_job else _own_number(job_id)
            _link_log(array.folder / f"{job_id}_0_log.out", job.folder / f"{number}_0_log.out")


def array_text(array: SlurmArray) -> str:
    """The very text that `submit_array` would hand to sbatch; needs no Slurm and leaves nothing behind.

    submitit itself writes it, below a temporary folder, for an `sbatch` of ours that only says yes.
    The folder is the array's own with a prefix, so that taking the prefix away gives the text of the real one.
    """
    with tempfile.TemporaryDirectory(prefix="pathfm-") as temporary, _slurm_that_says_yes(Path(temporary)):
        prefix = Path(temporary).resolve() / "root"
        folder = prefix / array.folder.relative_to(array.folder.anchor)
        job_id = _submitted(array, folder, _nothing)[0].partition("_")[0]
        text = (folder / f"{job_id}_submission.sh").read_text(encoding="utf-8")
    return text.replace(str(prefix), "")


def executor_parameters(job: SlurmJob) -> dict[str, Any]:
    """The job in submitit's words."""
    profile = job.profile
    gpus = ":".join(["gpu", *([profile.gpu_type] if profile.gpu_type else []), str(profile.gpus_per_node)])
    return {
        "name": job.name,
        "timeout_min": round(profile.time_limit_hours * 60),
        "cpus_per_task": profile.cpus_per_task,
        "stderr_to_stdout": True,
        "slurm_use_srun": False,
        "slurm_signal_delay_s": profile.signal_lead_s,
        "slurm_partition": profile.partition,
        "slurm_account": profile.account,
        "slurm_qos": profile.qos,
        "slurm_constraint": profile.constraint,
        "slurm_mem": profile.memory_per_node,
        "slurm_gres": gpus if profile.gpus_per_node else None,
        "slurm_setup": _setup_lines(job) or None,
        # Nodes and tasks go round submitit's own arguments, or it would wait for a result from every task.
        "slurm_additional_parameters": {
            "requeue": True,
            "nodes": job.nodes,
            "ntasks_per_node": profile.tasks_per_node,
            **{name: value for name, value in {**profile.sbatch, **job.options}.items() if value is not False},
        },
    }


def _setup_lines(job: SlurmJob) -> list[str]:
    """Shell lines of the batch step; what they export, the ranks have too."""
    profile = job.profile
    variables = {"OMP_NUM_THREADS": str(_threads(profile)), **_of_image(profile.container), **profile.environment}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    return [*profile.setup, *exports, *(_code_lines(job.code) if job.code else [])]


def _of_image(container: Container) -> dict[str, str]:
    """For the run's provenance."""
    return {} if container.runtime == "none" else {"PATHFM_IMAGE": container.image}


def _code_lines(code: Path) -> list[str]:
    """`code` is imported before all else, also by a job that was submitted from within a checkout."""
    return [
        "export PYTHONSAFEPATH=1",  # or `python -m` would take the package from the working directory
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
    ]


def _threads(profile: Profile) -> int:
    """Beside a GPU most cores of a task belong to its loader workers, which have one thread each."""
    return max(1, profile.cpus_per_task // 4) if profile.gpus_per_node else profile.cpus_per_task


def _nothing(job: SlurmJob) -> int:
    """In the supervisor's place where a job is only shown."""
    return 0


def _submitted(array: SlurmArray, folder: Path, supervisor: Callable[[SlurmJob], int]) -> list[str]:
    """Submit through submitit's public executor, with its files in `folder`."""
    from submitit import AutoExecutor

    executor = AutoExecutor(
        folder,
        cluster="slurm",
        slurm_max_num_timeout=10**6,  # submitit's own count of restarts is not ours
        slurm_python="exec " + shlex.quote(sys.executable),  # Python *is* the batch process: it gets its signals
    )
    executor.update_parameters(**executor_parameters(array.jobs[0]))
    if array.is_one_job:
        return [str(executor.submit(supervisor, array.jobs[0]).job_id)]
    executor.update_parameters(name=array.name, slurm_array_parallelism=array.at_once or len(array.jobs))
    with executor.batch():
        submitted = [executor.submit(supervisor, job) for job in array.jobs]
    return [str(job.job_id) for job in submitted]


def _link_log(log: Path, link: Path) -> None:
    """The log of an element, found where a run has its own."""
    link.parent.mkdir(parents=True, exist_ok=True)
    log.touch()  # Slurm appends to it
    link.unlink(missing_ok=True)  # of a job that had this number on an earlier cluster
    link.symlink_to(os.path.relpath(log, link.parent))


def _own_number(job_id: str) -> str:
    """What the job itself takes for its id, which names its attempts. An element has one as soon as it has a name."""
    try:
        record = show_job(job_id, tries=1, patience_s=_SECONDS_TO_ANSWER)
    except SlurmRefusal:
        return job_id
    return record.job if record else job_id


def _rename(job_id: str, name: str) -> str | None:
    """In the queue. Returns why that was refused."""
    words = ["scontrol", "update", f"JobId={job_id}", f"JobName={name}"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else " ".join(done.stderr.split()) or "scontrol refused"


@contextmanager
def _slurm_that_says_yes(folder: Path) -> Iterator[None]:
    """While open, `sbatch` and `srun` are found first in `folder`: they accept everything and do nothing."""
    from submitit.helpers import environment_variables

    programs = folder / "bin"
    programs.mkdir()
    for name in ("sbatch", "srun"):
        (programs / name).write_text("#!/bin/sh\necho Submitted batch job 1\n")
        (programs / name).chmod(0o755)
    if not os.access(programs / "sbatch", os.X_OK):
        raise UserError(f"programs cannot be run in {folder.parent}; set TMPDIR to a folder where they can")
    with environment_variables(PATH=f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"):
        yield
