"""The Slurm jobs of a run and what became of them, as files of the run: `jobs.jsonl`, `attempts.jsonl`, logs.

A job is submitted once and may start many times; each start is an attempt, `logs/JOB.RESTART/rank_N.log`.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

_SUBMISSIONS, _ATTEMPTS, _CANCELLED = "jobs.jsonl", "attempts.jsonl", "cancelled.jsonl"
Line = TypeVar("Line")


@dataclass(frozen=True)
class Attempt:
    """One start of one job."""

    run_dir: Path
    job: str
    restart: int
    array_element: str = ""  # JOB_INDEX: the first element's own number means the whole array to scontrol

    @property
    def folder(self) -> Path:
        return self.run_dir / "logs" / f"{self.job}.{self.restart}"

    @property
    def log_pattern(self) -> str:
        """For srun, which puts the rank in the place of %t."""
        return str(self.folder / "rank_%t.log")

    def rank_logs(self) -> list[Path]:
        """In the order of ranks."""
        ranks = {path.stem.removeprefix("rank_"): path for path in self.folder.glob("rank_*.log")}
        return [ranks[rank] for rank in sorted((rank for rank in ranks if rank.isdigit()), key=int)]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def address(self) -> str:
        """What scontrol calls the job."""
        return self.array_element or self.job


@dataclass(frozen=True)
class Submission:
    """A job that was handed to Slurm for this run."""

    job: str
    submitted: str  # UTC, ISO 8601
    nodes: int
    tasks_per_node: int
    command: str = ""  # that submitted it
    follows: str | None = None  # the job that this one continues, where Slurm may not requeue


@dataclass(frozen=True)
class Cancellation:
    """What `pathfm cancel` leaves for the supervisor of a job."""

    job: str  # its own number, also as an element of an array
    asked: str = ""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended and what the supervisor made of it."""

    job: str
    restart: int
    lineage: str  # the first job of a chain of follow-ups
    status: int
    checkpoint: int  # the newest step on disk
    decision: str  # done, leave, requeue, fail
    was_crash: bool
    reason: str
    ended: str = ""


def attempt_of(run_dir: Path, environment: Mapping[str, str] = os.environ) -> Attempt:
    """The attempt that this process of a Slurm job belongs to."""
    array, index = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    element = f"{array}_{index}" if array and index else ""
    return Attempt(run_dir, environment["SLURM_JOB_ID"], int(environment.get("SLURM_RESTART_COUNT") or "0"), element)


def attempts(run_dir: Path) -> list[Attempt]:
    """All starts of all jobs of the run, the oldest first."""
    found = []
    for folder in (run_dir / "logs").glob("*.*"):
        job, _, restart = folder.name.rpartition(".")
        if folder.is_dir() and restart.isdigit():
            found.append(Attempt(run_dir, job, int(restart)))
    return sorted(found, key=lambda attempt: (attempt.folder.stat().st_mtime_ns, attempt.restart))


def submissions(run_dir: Path) -> list[Submission]:
    """The oldest first."""
    return _lines(run_dir / _SUBMISSIONS, Submission)


def note_submission(run_dir: Path, submission: Submission) -> None:
    _append(run_dir / _SUBMISSIONS, asdict(submission))


def outcomes(run_dir: Path) -> list[Outcome]:
    """The oldest first."""
    return _lines(run_dir / _ATTEMPTS, Outcome)


def note_outcome(run_dir: Path, outcome: Outcome) -> None:
    _append(run_dir / _ATTEMPTS, {**asdict(outcome), "ended": now()})


def note_cancelled(run_dir: Path, job: str) -> None:
    """That `job` is not to go on once its ranks have left."""
    _append(run_dir / _CANCELLED, asdict(Cancellation(job, now())))


def is_cancelled(run_dir: Path, job: str) -> bool:
    return any(line.job == job for line in _lines(run_dir / _CANCELLED, Cancellation))


def newest_checkpoint(run_dir: Path) -> int:
    """Its step, by the names of the folders alone; 0 without any."""
    names = [path.name[5:] for path in (run_dir / "checkpoints").glob("step_*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _append(path: Path, line: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(max(0, file.tell() - 1))
        separator = "" if file.read(1) in (b"", b"\n") else "\n"  # behind a line that a full disk cut off
        file.write(f"{separator}{json.dumps(line)}\n".encode())


def _lines(path: Path, kind: Callable[..., Line]) -> list[Line]:
    """A line that was cut off by a full disk is passed over."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(kind(**json.loads(text)))
        except (ValueError, TypeError):
            continue
    return found
