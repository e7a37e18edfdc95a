"""The Slurm jobs of a run that wait or run, and how to say so in few words. For login nodes: no torch."""

import shutil
from collections.abc import Iterator
from datetime import datetime

from pathfm.launch.attempts import submissions
from pathfm.launch.scontrol import JobRecord, show_job
from pathfm.lifecycle.run import Run

_PATIENCE_S = 10.0  # somebody sits before the screen


def slurm_is_here() -> bool:
    return shutil.which("scontrol") is not None


def job_ids(run: Run) -> list[str]:
    """Of all that were submitted for the run and of the one that trained it last; the newest first."""
    submitted = [submission.job for submission in submissions(run.directory)]
    last = how_it_ended(run).get("job")
    others = [last] if isinstance(last, str) and last not in submitted else []
    return [*others, *reversed(dict.fromkeys(submitted))]


def live_records(run: Run, tries: int = 1, patience_s: float = _PATIENCE_S) -> Iterator[tuple[str, JobRecord]]:
    """By the number it was asked for, each job once, the newest first; a stranger's may be among them.

    Raises `SlurmRefusal` when nobody answers.
    """
    seen: set[str] = set()  # an element of an array is known by two numbers
    for job in job_ids(run):
        record = show_job(job, tries, patience_s)
        if record is not None and record.is_live and record.job not in seen:
            seen.add(record.job)
            yield job, record


def live_jobs(run: Run) -> Iterator[JobRecord]:
    """The newest first. Raises `SlurmRefusal` when nobody answers."""
    submitted = {submission.job for submission in submissions(run.directory)}
    for job, record in live_records(run):
        if job not in submitted or is_named_after(record, run):  # a script that somebody wrote may bear any name
            yield record


def is_named_after(record: JobRecord, run: Run) -> bool:
    """False for a stranger's job, which got the number of one of ours that Slurm has forgotten."""
    return record.name in (run.name, run.directory.absolute().name)


def how_it_ended(run: Run) -> dict[str, object]:
    """exit.json; empty where there is none, or a damaged one."""
    return run.how_it_ended() or {}


def in_words(job: JobRecord, now: datetime | None = None) -> str:
    """`running on n[1-2], 3:10 h left`, `waiting: Resources, starts ~14:05`."""
    now = now or datetime.now()
    if job.is_waiting:
        return f"waiting{f': {job.reason}' if job.reason else ''}{_start_of(job, now)}"
    nodes = f" on {job.nodes}" if job.nodes else ""
    if job.is_completing or job.has_ended:
        return f"{'ending' if job.is_completing else job.state.lower()}{nodes}"
    end = _time(job.end_time)
    left = f", {time_span((end - now).total_seconds())} left" if end and end > now else ""
    return f"{job.state.lower()}{nodes}{left}"


def time_span(seconds: float) -> str:
    """`50 s`, `12 min`, `3:10 h`, `4 days`."""
    if seconds < 99.5:
        return f"{max(seconds, 0):.0f} s"
    if (minutes := round(seconds / 60)) < 100:
        return f"{minutes} min"
    if (hours := minutes // 60) < 72:
        return f"{hours}:{minutes % 60:02d} h"
    return f"{round(hours / 24):,} days"


def _start_of(job: JobRecord, now: datetime) -> str:
    if not (start := _time(job.start_time)) or start < now:
        return ""
    return f", starts ~{start:%H:%M}" if start.date() == now.date() else f", starts ~{start:%b %d %H:%M}"


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
