"""One process per Slurm job, in its batch step on the host: starts the ranks, passes signals on, decides what is next.

It never runs in an image and never imports torch. submitit's own handlers act on one rank and at once, so ours replace
them.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

from pathfm.errors import EXIT_INTERRUPTED
from pathfm.launch import scontrol
from pathfm.launch.attempts import (
    Attempt,
    Outcome,
    Submission,
    attempt_of,
    is_cancelled,
    newest_checkpoint,
    note_outcome,
    note_submission,
    now,
    outcomes,
)
from pathfm.launch.decision import Decision, Ended, decide, goes_on
from pathfm.launch.failure import first_failure
from pathfm.launch.sbatch import SlurmJob, submit
from pathfm.lifecycle.run import Run

_SECONDS_TO_CLEAN_UP = 60.0
_PASSED_ON = (signal.SIGUSR2, signal.SIGTERM)


def batch_step(job: SlurmJob) -> int:
    """What submitit runs in the batch step. Returns 0 when the run is finished; else the job ends as the ranks did."""
    attempt = attempt_of(job.run_dir)
    if is_cancelled(job.run_dir, attempt.job):  # while Slurm was requeueing it
        return _stay_cancelled(attempt, EXIT_INTERRUPTED)
    attempt.folder.mkdir(parents=True, exist_ok=True)
    early = _EarlyRequeue(attempt)
    _say(
        f"attempt {attempt.name} on {os.environ.get('SLURM_JOB_NODELIST', 'this node')}: logs are {attempt.log_pattern}"
    )
    # srun passes USR2 on to its tasks; at a TERM it would kill them.
    ranks, clean_up = job.command(attempt.log_pattern), partial(_clean_up, job)
    status = supervise(ranks, as_signal=signal.SIGUSR2, at_term=early.begin, before=clean_up)
    clean_up()
    cancelled = is_cancelled(job.run_dir, attempt.job)
    ended = Ended(status, _verdict(attempt), attempt.restart, _crashes_before(attempt, job), cancelled)
    decision, step = early.decision() or decide(ended, _record(attempt)), newest_checkpoint(job.run_dir)
    which = (attempt.job, attempt.restart, _lineage(attempt, job))
    made_of_it = (decision.what, decision.is_crash, decision.reason)
    note_outcome(job.run_dir, Outcome(*which, status, step, *made_of_it))
    if cancelled and decision.what == "leave":
        return _stay_cancelled(attempt, status)
    return _carry_out(decision, job, attempt, status, step)


def supervise(
    command: Sequence[str],
    as_signal: int | None = None,
    at_term: Callable[[], None] = lambda: None,
    before: Callable[[], None] = lambda: None,
    **streams: Any,
) -> int:
    """Run `command` to its end. Returns its exit status as a shell would, 128 + n when signal n ended it.

    USR2 and TERM are passed on (as `as_signal`, if given) and never end the supervisor itself: whoever sends them wants
    the payload to save and leave, and somebody must be there afterwards to see how it left. The handlers stay; this is
    the last thing that a process does. `before` is called when signals are heard already; `at_term` once more for every
    TERM, and must return at once.
    """
    child = _Child(as_signal, at_term)
    for number in _PASSED_ON:
        signal.signal(number, child.pass_on)
    before()
    status = child.run(command, **streams)
    return 128 - status if status < 0 else status


class _Child:
    """The payload, and the signals that came before it had a process."""

    def __init__(self, as_signal: int | None, at_term: Callable[[], None]) -> None:
        self._as_signal = as_signal
        self._at_term = at_term
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self._at_term()
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(self._as_signal or number)

    def run(self, command: Sequence[str], **streams: Any) -> int:
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, **streams)
        for number in self._early:
            self._process.send_signal(self._as_signal or number)
        return self._process.wait()


class _EarlyRequeue:
    """Asks for the requeue as soon as Slurm ends the job by a limit or a preemption that cancels.

    After KillWait the supervisor itself is killed, perhaps while the ranks are still saving.
    """

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._thread: threading.Thread | None = None
        self._asked = False

    def begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._ask, daemon=True)
            self._thread.start()

    def decision(self) -> Decision | None:
        """None when nothing was asked, or refused: then all is still to be decided."""
        if self._thread is not None:
            self._thread.join()
        return Decision("leave", "the job was ended by Slurm; it was requeued at once") if self._asked else None

    def _ask(self) -> None:
        record = _record(self._attempt)
        if record is None or not goes_on(record) or is_cancelled(self._attempt.run_dir, self._attempt.job):
            return
        try:
            scontrol.requeue(self._attempt.address)
            self._asked = True
        except scontrol.SlurmRefusal as refusal:
            _say(f"Slurm does not requeue yet ({refusal})")


def _clean_up(job: SlurmJob) -> None:
    """End containers that killed tasks of this run left on our nodes: they would hold the run, the GPUs, the ports."""
    if command := job.clean_up_command():
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, timeout=_SECONDS_TO_CLEAN_UP, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            _say(f"containers may be left on the nodes: {error}")


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


def _stay_cancelled(attempt: Attempt, status: int) -> int:
    """In Slurm's own books too, and also where Slurm is just requeueing the job."""
    _say("cancelled with 'pathfm cancel'; the job does not go on")
    try:
        scontrol.cancel(attempt.address)
    except scontrol.SlurmRefusal as refusal:
        _say(f"scancel was refused: {refusal}")
    raise SystemExit(status or EXIT_INTERRUPTED)


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
