"""Whether a run may be submitted, after what its earlier jobs did. For login nodes: no torch."""

import fcntl
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pathfm.errors import UserError
from pathfm.jobs.find_run import RUNS
from pathfm.jobs.slurm_jobs import how_it_ended, in_words, live_jobs
from pathfm.launch.attempts import newest_checkpoint, outcomes, submissions
from pathfm.launch.scontrol import SlurmRefusal
from pathfm.lifecycle.run import Run


@dataclass(frozen=True)
class Standing:
    """What a run is doing, and a line about it for people; none for a run that no job had so far."""

    what: Literal["new", "busy", "done", "ended"]
    line: str = ""


@contextmanager
def being_submitted(run: Run) -> Iterator[None]:
    """No other process looks at the run's jobs and submits one meanwhile. Raises `UserError` when one does already."""
    run.directory.mkdir(parents=True, exist_ok=True)
    with (run.directory / ".submission.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"run {run.name} is just being submitted by another process; look at it with 'pathfm status'"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def standing(run: Run) -> Standing:
    """Raises `UserError` when Slurm does not answer, which alone knows whether a job is still there."""
    if how_it_ended(run).get("verdict") == "done":
        return Standing("done", f"run {run.name} is finished; nothing is submitted")
    try:
        job = next(live_jobs(run), None)
    except SlurmRefusal as refusal:
        raise UserError(
            f"Slurm does not answer ({refusal}), so nobody knows whether run {run.name} has a job; try again later"
        ) from refusal
    if job is not None:
        what_to_do = f"follow it with 'pathfm logs {word_for(run)} -f' or end it with 'pathfm cancel {word_for(run)}'"
        return Standing("busy", f"run {run.name} has job {job.job} already ({in_words(job)}); {what_to_do}")
    if submissions(run.directory):
        return Standing("ended", f"run {run.name} has ended: {_why_it_ended(run)}; add --resubmit to go on with it")
    return Standing("new")


def word_for(run: Run) -> str:
    """What `pathfm logs` and its like find the run by, in this folder."""
    directory = run.directory.absolute()
    return shlex.quote(run.name if directory.parent == RUNS.absolute() else str(directory))


def _why_it_ended(run: Run) -> str:
    """`job 12, step 4,000: somebody cancelled the job; its checkpoint stays`."""
    last = submissions(run.directory)[-1]
    attempts = [outcome for outcome in outcomes(run.directory) if outcome.ended >= last.submitted]
    where = f"job {last.job}, newest checkpoint of step {newest_checkpoint(run.directory):,}"
    if attempts and (attempts[-1].decision == "requeue" or "requeueing" in attempts[-1].reason):
        return f"{where}: it was to start again, but is no longer in the queue"
    if attempts:
        return f"{where}: {attempts[-1].reason}"
    if _written(run.directory / "exit.json") >= last.submitted:
        return f"{where}: {_told(how_it_ended(run))}"
    return f"{where}: it never began"


def _written(path: Path) -> str:
    """When, in the form of `attempts.now`; empty for no file."""
    if not path.exists():
        return ""
    return datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds")


def _told(ended: dict[str, object]) -> str:
    verdict, reason = str(ended.get("verdict")), str(ended.get("reason") or "").partition("\n")[0]
    return "killed" if verdict == "running" else f"{verdict}{f', {reason}' if reason else ''}"
