"""What Slurm knows of a job, and what it is asked to do with one: `scontrol` and `scancel`, read and retried."""

import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

_ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
_WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_FIELD = re.compile(r"(?:^|\s)([A-Z][A-Za-z/:]*)=")
_TRIES = 5
_SECONDS_BETWEEN = 4.0
_PATIENCE_S = 60.0  # scontrol itself tries for a minute when it finds no configuration


@dataclass(frozen=True)
class JobRecord:
    """One line of `scontrol -o show job`. Times as Slurm writes them; empty where it says None or Unknown."""

    job: str
    name: str = ""
    state: str = "RUNNING"
    reason: str = ""
    restarts: int = 0
    preempt_time: str = ""
    end_time: str = ""
    start_time: str = ""
    nodes: str = ""
    array_element: str = ""  # JOB_INDEX: the first element's own number means the whole array to scancel

    @property
    def address(self) -> str:
        """What scancel and scontrol call the job."""
        return self.array_element or self.job

    @property
    def is_waiting(self) -> bool:
        return self.state in _WAITING

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED

    @property
    def is_completing(self) -> bool:
        return self.state == "COMPLETING"

    @property
    def is_live(self) -> bool:
        """In the queue or on nodes."""
        return not self.has_ended


class SlurmRefusal(RuntimeError):
    """A command that Slurm did not carry out, in its own words."""


def parse_job(line: str) -> JobRecord:
    """From `scontrol -o show job`. Values with blanks in them (a comment, a name) do not confuse it."""
    marks = list(_FIELD.finditer(line))
    ends = [mark.start() for mark in marks[1:]] + [len(line)]
    fields: dict[str, str] = {}
    for mark, end in zip(marks, ends, strict=True):
        fields.setdefault(mark[1], line[mark.end() : end].strip())  # the first: a comment may hold a KEY=value too
    return JobRecord(
        job=fields["JobId"],
        name=fields.get("JobName", ""),
        state=fields.get("JobState", "UNKNOWN"),
        reason=_known(fields.get("Reason", "")),
        restarts=int(fields.get("Restarts", "0")),
        preempt_time=_known(fields.get("PreemptTime", "")),
        end_time=_known(fields.get("EndTime", "")),
        start_time=_known(fields.get("StartTime", "")),
        nodes=_known(fields.get("NodeList", "")),
        array_element=f"{fields['ArrayJobId']}_{index}" if (index := fields.get("ArrayTaskId", "")).isdigit() else "",
    )


def show_job(job: str, tries: int = _TRIES, patience_s: float = _PATIENCE_S) -> JobRecord | None:
    """None: Slurm has forgotten it. Raises `SlurmRefusal` when no controller answers in all tries."""
    try:
        text = _retried(["scontrol", "-o", "show", "job", job], tries, patience_s)
    except SlurmRefusal as refusal:
        if "Invalid job id" in str(refusal):
            return None
        raise
    records = [parse_job(line) for line in text.splitlines() if line.startswith("JobId=")]
    if "_" in job:  # an element that waits may not be split off yet
        return replace(records[0], array_element=job) if records else None
    return next((record for record in records if record.job == job), None)  # the number of an array shows them all


def requeue(job: str) -> None:
    """Raises `SlurmRefusal`. The caller's own job is ended by this: TERM follows within a second."""
    _retried(["scontrol", "requeue", job], _TRIES)


def exclude_nodes(job: str, nodes: Sequence[str]) -> None:
    """For a job that waits. Raises `SlurmRefusal`."""
    _retried(["scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}"], _TRIES)


def cancel(job: str) -> None:
    """End it for good, within KillWait. Raises `SlurmRefusal`."""
    _retried(["scancel", job], tries=2)


def ask_to_leave(job: str) -> None:
    """USR2 to the supervisor, which hands it to the ranks: they save, however long it takes. Raises `SlurmRefusal`."""
    _retried(["scancel", "--signal=USR2", "--batch", job], tries=2)


def _retried(words: Sequence[str], tries: int, patience_s: float = _PATIENCE_S) -> str:
    """The output of a command. A controller that restarts is waited for; a refusal for good is not tried again."""
    refusal = ""
    for attempt in range(tries):
        if attempt:
            time.sleep(_SECONDS_BETWEEN)
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=patience_s)
        except subprocess.TimeoutExpired:
            refusal = f"{words[0]} did not answer within {patience_s:.0f} s"
            continue
        except OSError as error:
            raise SlurmRefusal(f"{words[0]}: {error.strerror}") from error
        if done.returncode == 0:
            return done.stdout
        refusal = " ".join((done.stderr or done.stdout).split())
        if any(word in refusal for word in ("Invalid job id", "disabled", "denied", "invalid user")):
            break
    raise SlurmRefusal(refusal)


def _known(value: str) -> str:
    return "" if value in ("None", "Unknown", "(null)", "N/A") else value
