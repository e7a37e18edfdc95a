"""One process per Slurm job, in its batch step on the host: starts the ranks, passes signals on, decides what is next.

It never runs in an image and never imports torch. submitit's own handlers act on one rank and at once, so ours replace
them.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

from pathfm.errors import EXIT_INTERRUPTED
from pathfm.launch import scontrol
from pathfm.launch.attempts import (
    Attempt,
    Outcome,
    Submission,
    attempt_of,
    newest_checkpoint,
    note_outcome,
    note_submission,
    now,
    outcomes,
)
from pathfm.launch.decision import Decision, Ended, decide
from pathfm.launch.failure import first_failure
from pathfm.launch.sbatch import SlurmJob, submit
from pathfm.lifecycle.run import Run

_PASSED_ON = (signal.SIGUSR2, signal.SIGTERM)


def batch_step(job: SlurmJob) -> int:
    """What submitit runs in the batch step. Returns 0 when the run is finished; else the job ends as the ranks did."""
    attempt = attempt_of(job.run_dir)
    attempt.folder.mkdir(parents=True, exist_ok=True)
    _say(
        f"attempt {attempt.name} on {os.environ.get('SLURM_JOB_NODELIST', 'this node')}: logs are {attempt.log_pattern}"
    )
    # srun passes USR2 on to its tasks; at a TERM it would kill them.
    status = supervise(job.command(attempt.log_pattern), as_signal=signal.SIGUSR2)
    ended = Ended(status, _verdict(attempt), attempt.restart, _crashes_before(attempt, job))
    decision, step = decide(ended, _record(attempt)), newest_checkpoint(job.run_dir)
    which = (attempt.job, attempt.restart, _lineage(attempt, job))
    made_of_it = (decision.what, decision.is_crash, decision.reason)
    note_outcome(job.run_dir, Outcome(*which, status, step, *made_of_it))
    return _carry_out(decision, job, attempt, status, step)


def supervise(command: Sequence[str], as_signal: int | None = None, **streams: Any) -> int:
    """Run `command` to its end. Returns its exit status as a shell would, 128 + n when signal n ended it.

    USR2 and TERM are passed on (as `as_signal`, if given) and never end the supervisor itself: whoever sends them wants
    the payload to save and leave, and somebody must be there afterwards to see how it left. The handlers stay; this is
    the last thing that a process does.
    """
    child = _Child(as_signal)
    for number in _PASSED_ON:
        signal.signal(number, child.pass_on)
    status = child.run(command, **streams)
    return 128 - status if status < 0 else status


class _Child:
    """The payload, and the signals that came before it had a process."""

    def __init__(self, as_signal: int | None) -> None:
        self._as_signal = as_signal
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(self._as_signal or number)

    def run(self, command: Sequence[str], **streams: Any) -> int:
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **streams)
        for number in self._early:
            self._process.send_signal(self._as_signal or number)
        return self._process.wait()


def _verdict(attempt: Attempt) -> str | None:
    """Of exit.json, believed only when this attempt wrote it."""
    ended = Run(attempt.run_dir).how_it_ended() or {}
    of_this = ended.get("job") == attempt.job and ended.get("restart") == attempt.restart
    return str(ended.get("verdict")) if of_this else None


def _record(attempt: Attempt) -> scontrol.JobRecord | None:
    try:
        return scontrol.show_job(attempt.address)
    except scontrol.SlurmRefusal as refusal:
        _say(f"scontrol does not answer: {refusal}")
        return None


def _crashes_before(attempt: Attempt, job: SlurmJob) -> int:
    """In a row at the end of this job's history, with the newest checkpoint that there is now."""
    lineage, here, number = _lineage(attempt, job), newest_checkpoint(attempt.run_dir), 0
    for outcome in reversed(outcomes(attempt.run_dir)):
        if outcome.lineage != lineage or not outcome.was_crash or outcome.checkpoint != here:
            break
        number += 1
    return number


def _lineage(attempt: Attempt, job: SlurmJob) -> str:
    """The first job of the chain of follow-ups."""
    return job.first_job or attempt.job


def _carry_out(decision: Decision, job: SlurmJob, attempt: Attempt, status: int, step: int) -> int:
    _say(f"{decision.what}: {decision.reason}; newest checkpoint: step {step:,}")
    if decision.what == "done":
        return 0
    if decision.is_crash or decision.what == "fail":
        _say(failure := first_failure(attempt.rank_logs(), attempt.folder))
    if decision.what == "requeue":
        _start_again(job, attempt)
    if decision.what == "fail":
        Run(job.run_dir).write_exit("failed", step, f"{failure}\n{decision.reason}")
    raise SystemExit(status or EXIT_INTERRUPTED)  # past submitit, which would otherwise report every job as ended well


def _start_again(job: SlurmJob, attempt: Attempt) -> None:
    """Requeue; where Slurm forbids that, submit a job that follows this one."""
    try:
        scontrol.requeue(attempt.address)
    except scontrol.SlurmRefusal as refusal:
        _say(f"Slurm does not requeue ({refusal}); a new job goes on")
        follow_up = replace(
            job,
            options={**job.options, "dependency": f"afterany:{attempt.address}"},
            first_job=_lineage(attempt, job),
        )
        number = submit(follow_up, batch_step)
        facts = (job.nodes, job.profile.tasks_per_node)
        note_submission(job.run_dir, Submission(number, now(), *facts, follows=attempt.job))
        _say(f"submitted job {number}, which begins when this one has ended")
        return
    if nodes := _bad_nodes(attempt):
        try:
            scontrol.exclude_nodes(attempt.address, nodes)
            _say(f"the next attempt avoids {', '.join(nodes)}")
        except scontrol.SlurmRefusal as refusal:
            _say(f"{', '.join(nodes)} cannot be excluded: {refusal}")


def _bad_nodes(attempt: Attempt) -> list[str]:
    """Nodes that failed the examination at the beginning of the attempt (`pathfm doctor` in every job)."""
    try:
        return [str(node) for node in json.loads((attempt.folder / "doctor.json").read_text())["failed_nodes"]]
    except (OSError, ValueError, KeyError):
        return []


def _say(text: str) -> None:
    print(f"pathfm: {text}", file=sys.stderr, flush=True)
