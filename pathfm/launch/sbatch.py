"""A Slurm job as submitit submits it: one supervisor in the batch step, which starts the payload on all tasks."""

import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathfm.errors import UserError
from pathfm.launch.profile import Profile
from pathfm.launch.srun import srun_command


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

    @property
    def folder(self) -> Path:
        """For submitit's script, pickle and log."""
        return self.run_dir / "logs" / "submitit"

    def command(self, output: str) -> list[str]:
        """The srun line. `output`: the log of a rank, with %t in the place of its number."""
        profile = self.profile
        return srun_command(
            self.nodes, profile.tasks_per_node, profile.cpus_per_task, self.payload, output=output, options=profile.srun
        )


def submit(job: SlurmJob, supervisor: Callable[[SlurmJob], int]) -> str:
    """Put the job in the queue; `supervisor` runs in its batch step. Returns its id.

    Raises `UserError` with sbatch's own words when it is refused.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env

    # A job submitted from within a job must not inherit that job's size.
    inside_a_job = "SLURM_JOB_ID" in os.environ
    try:
        with clean_env() if inside_a_job else nullcontext():
            return _submitted(job, job.folder, supervisor)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused the job: {' '.join(str(error).split())}") from error


def sbatch_text(job: SlurmJob) -> str:
    """The very text that `submit` would hand to sbatch; needs no Slurm and leaves nothing behind.

    submitit itself writes it, below a temporary folder, for an `sbatch` of ours that only says yes.
    The folder is the job's own with a prefix, so that taking the prefix away gives the text of the real one.
    """
    with tempfile.TemporaryDirectory(prefix="pathfm-") as temporary, _slurm_that_says_yes(Path(temporary)):
        prefix = Path(temporary).resolve() / "root"
        folder = prefix / job.folder.relative_to(job.folder.anchor)
        job_id = _submitted(job, folder, _nothing)
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
    variables = {"OMP_NUM_THREADS": str(_threads(profile)), **profile.environment}
    if job.code:
        variables["PYTHONPATH"] = str(job.code)
    return [*profile.setup, *(f"export {name}={shlex.quote(value)}" for name, value in variables.items())]


def _threads(profile: Profile) -> int:
    """Beside a GPU most cores of a task belong to its loader workers, which have one thread each."""
    return max(1, profile.cpus_per_task // 4) if profile.gpus_per_node else profile.cpus_per_task


def _nothing(job: SlurmJob) -> int:
    """In the supervisor's place where a job is only shown."""
    return 0


def _submitted(job: SlurmJob, folder: Path, supervisor: Callable[[SlurmJob], int]) -> str:
    """Submit through submitit's public executor, with its files in `folder`."""
    from submitit import AutoExecutor

    executor = AutoExecutor(
        folder,
        cluster="slurm",
        slurm_max_num_timeout=10**6,  # submitit's own count of restarts is not ours
        slurm_python="exec " + shlex.quote(sys.executable),  # Python *is* the batch process: it gets its signals
    )
    executor.update_parameters(**executor_parameters(job))
    return str(executor.submit(supervisor, job).job_id)


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
