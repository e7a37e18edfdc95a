"""What becomes of a job whose step has ended: done, left alone, requeued, or failed. Pure.

The facts behind every line were measured on Slurm 22.05 and 26.05. Exit codes through srun lie both ways, so
`exit.json` of this very attempt counts first, then the state of the job, then the code.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from pathfm.errors import EXIT_INTERRUPTED
from pathfm.launch.scontrol import JobRecord

CRASHES_IN_A_ROW = 2  # without a newer checkpoint in between: a third one is not tried again
_TO_MEND = 2
_SAME_MOMENT_S = 1.0


@dataclass(frozen=True)
class Ended:
    """How an attempt ended, as far as the host can see."""

    status: int  # of srun, as a shell has it
    verdict: str | None  # of exit.json, if this attempt wrote it
    restart: int
    crashes_before: int = 0  # in a row, since the newest checkpoint appeared
    cancelled: bool = False  # by `pathfm cancel`


@dataclass(frozen=True)
class Decision:
    what: Literal["done", "leave", "requeue", "fail"]
    reason: str
    is_crash: bool = False


def decide(ended: Ended, job: JobRecord | None) -> Decision:
    """`job`: what Slurm says now; None when nobody answers."""
    if ended.verdict == "done" or (ended.status == 0 and ended.verdict != "interrupted"):
        return Decision("done", "the run is finished")
    if ended.cancelled:
        return Decision("leave", "cancelled with 'pathfm cancel'; its checkpoint stays")
    if job is not None and (job.restarts > ended.restart or job.is_waiting):
        return Decision("leave", "Slurm is requeueing the job by itself")
    if job is not None and (job.is_completing or job.has_ended):
        return _of_a_job_that_ends(job)
    if ended.verdict == "interrupted" or ended.status == EXIT_INTERRUPTED:
        preempted = job is not None and job.preempt_time
        return Decision(
            "requeue", "preempted, with a checkpoint" if preempted else "left with a checkpoint, as it was told"
        )
    if job is not None and job.preempt_time:
        return Decision("requeue", "preempted before it could save")
    return _of_a_crash(ended)


def goes_on(job: JobRecord) -> bool:
    """Whether a job that Slurm is ending is to start again, whatever its ranks have still to say."""
    return job.is_completing and _of_a_job_that_ends(job).what == "requeue"


def _of_a_job_that_ends(job: JobRecord) -> Decision:
    if job.reason == "TimeLimit" or job.state == "TIMEOUT":
        return Decision("requeue", "the time limit came")
    if job.state == "PREEMPTED" or _at_once(job.preempt_time, job.end_time):
        return Decision("requeue", "preempted, where preemption cancels")
    if job.state in ("NODE_FAIL", "BOOT_FAIL"):
        return Decision("requeue", "a node was lost")
    return Decision("leave", "somebody cancelled the job; its checkpoint stays")


def _of_a_crash(ended: Ended) -> Decision:
    if ended.status == _TO_MEND:
        return Decision("fail", "something is to be mended before it can start")
    if ended.crashes_before >= CRASHES_IN_A_ROW:
        number = ended.crashes_before + 1
        return Decision("fail", f"{number} crashes in a row without a new checkpoint in between", is_crash=True)
    return Decision("requeue", f"a crash (status {ended.status})", is_crash=True)


def _at_once(one: str, other: str) -> bool:
    if not one or not other:
        return False
    apart = datetime.fromisoformat(one) - datetime.fromisoformat(other)
    return abs(apart.total_seconds()) <= _SAME_MOMENT_S
