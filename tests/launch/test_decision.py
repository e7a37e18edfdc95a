"""Every row of what Slurm says when a step has ended, and what is to be done then."""

from dataclasses import replace

import pytest

from pathfm.launch.decision import CRASHES_IN_A_ROW, Decision, Ended, decide, goes_on
from pathfm.launch.scontrol import JobRecord
from tests.launch.recorded_jobs import record

RUNNING = record("running with a comment")
IN_GRACE = JobRecord("3", state="RUNNING", preempt_time="2026-11-26T13:20:00", end_time="2026-11-26T13:25:00")
REQUEUED = record("waiting, requeued")
REQUEUEING = record("requeue, at once")
CANCELLED = record("ending by scancel")
TIME_LIMIT = record("ending by time limit")
PREEMPTED_AND_CANCELLED = record("ending by preemption that cancels")
HOW_A_RANK_MAY_LEAVE = [
    (75, "interrupted"),
    (75, None),
    (1, "running"),
    (143, "running"),
    (137, None),
    (0, "interrupted"),
]


def left(status: int, verdict: str | None, crashes_before: int = 0, restart: int = 0) -> Ended:
    return Ended(status, verdict, restart, crashes_before)


def what(ended: Ended, job: JobRecord | None) -> str:
    return decide(ended, job).what


@pytest.mark.parametrize(
    "job", [None, RUNNING, IN_GRACE, REQUEUEING, REQUEUED, CANCELLED, TIME_LIMIT, PREEMPTED_AND_CANCELLED]
)
@pytest.mark.parametrize(("status", "verdict"), [(0, "done"), (0, None), (1, "done"), (143, "done")])
def test_a_finished_run_is_done_whatever_becomes_of_the_job(status: int, verdict: str | None, job: JobRecord | None):
    assert decide(left(status, verdict), job) == Decision("done", "the run is finished")


@pytest.mark.parametrize("job", [REQUEUED, REQUEUEING, record("ending by preemption that requeues")])
@pytest.mark.parametrize(("status", "verdict"), HOW_A_RANK_MAY_LEAVE)
def test_what_slurm_requeues_is_left_to_slurm(status: int, verdict: str | None, job: JobRecord):
    assert decide(left(status, verdict), job) == Decision("leave", "Slurm is requeueing the job by itself")


@pytest.mark.parametrize("job", [CANCELLED, record("cancelled")])
@pytest.mark.parametrize(("status", "verdict"), HOW_A_RANK_MAY_LEAVE)
def test_what_a_person_cancelled_stays_cancelled(status: int, verdict: str | None, job: JobRecord):
    decision = decide(left(status, verdict), job)
    assert decision == Decision("leave", "somebody cancelled the job; its checkpoint stays")


@pytest.mark.parametrize("job", [None, RUNNING, IN_GRACE, REQUEUED, TIME_LIMIT, PREEMPTED_AND_CANCELLED])
@pytest.mark.parametrize(("status", "verdict"), HOW_A_RANK_MAY_LEAVE)
def test_what_pathfm_cancelled_does_not_go_on_whatever_else_happened(
    status: int, verdict: str | None, job: JobRecord | None
):
    ended = replace(left(status, verdict), cancelled=True)
    assert decide(ended, job) == Decision("leave", "cancelled with 'pathfm cancel'; its checkpoint stays")


@pytest.mark.parametrize(
    ("job", "goes"), [(RUNNING, False), (CANCELLED, False), (TIME_LIMIT, True), (PREEMPTED_AND_CANCELLED, True)]
)
def test_a_job_that_slurm_ends_but_nobody_cancelled_goes_on(job: JobRecord, goes: bool):
    assert goes_on(job) is goes


@pytest.mark.parametrize("job", [TIME_LIMIT, record("time limit")])
@pytest.mark.parametrize(("status", "verdict"), HOW_A_RANK_MAY_LEAVE)
def test_the_time_limit_is_no_crash_and_goes_on(status: int, verdict: str | None, job: JobRecord):
    assert decide(left(status, verdict, crashes_before=9), job) == Decision("requeue", "the time limit came")


@pytest.mark.parametrize("job", [PREEMPTED_AND_CANCELLED, record("preempted")])
@pytest.mark.parametrize(("status", "verdict"), HOW_A_RANK_MAY_LEAVE)
def test_a_preemption_that_cancels_is_no_crash_and_goes_on(status: int, verdict: str | None, job: JobRecord):
    decision = decide(left(status, verdict, crashes_before=9), job)
    assert decision == Decision("requeue", "preempted, where preemption cancels")


def test_a_cancelled_job_stays_cancelled_though_it_was_preempted_some_time_before():
    job = JobRecord("3", state="COMPLETING", preempt_time="2026-11-26T13:20:00", end_time="2026-11-26T13:20:02")
    assert what(left(75, "interrupted"), job) == "leave"


@pytest.mark.parametrize("job", [RUNNING, None, JobRecord("3", state="SIGNALING")])
@pytest.mark.parametrize(
    ("status", "verdict"), [(75, "interrupted"), (75, None), (143, "interrupted"), (0, "interrupted")]
)
def test_a_run_that_left_as_it_was_told_goes_on(status: int, verdict: str | None, job: JobRecord | None):
    decision = decide(left(status, verdict, crashes_before=9), job)
    assert decision == Decision("requeue", "left with a checkpoint, as it was told")


@pytest.mark.parametrize(
    ("status", "verdict", "reason"),
    [
        (75, "interrupted", "preempted, with a checkpoint"),
        (143, "running", "preempted before it could save"),
        (2, None, "preempted before it could save"),
    ],
)
def test_within_the_grace_of_a_preemption_nothing_is_a_crash(status: int, verdict: str | None, reason: str):
    assert decide(left(status, verdict, crashes_before=9), IN_GRACE) == Decision("requeue", reason)


@pytest.mark.parametrize("job", [RUNNING, None])
@pytest.mark.parametrize("status", [1, 134, 137, 139, 140])
@pytest.mark.parametrize("verdict", ["running", "failed", None])
def test_a_crash_is_tried_again_within_its_budget(status: int, verdict: str | None, job: JobRecord | None):
    for before in range(CRASHES_IN_A_ROW):
        decision = decide(left(status, verdict, crashes_before=before), job)
        assert decision == Decision("requeue", f"a crash (status {status})", is_crash=True)
    decision = decide(left(status, verdict, crashes_before=CRASHES_IN_A_ROW), job)
    assert (decision.what, decision.is_crash) == ("fail", True)
    assert decision.reason == "3 crashes in a row without a new checkpoint in between"


@pytest.mark.parametrize("job", [RUNNING, None])
def test_what_a_person_is_to_mend_fails_at_once(job: JobRecord | None):
    assert decide(left(2, None), job) == Decision("fail", "something is to be mended before it can start")


def test_only_restarts_beyond_this_attempt_are_slurms_own():
    job = JobRecord("3", state="RUNNING", restarts=2)
    assert what(left(75, "interrupted", restart=2), job) == "requeue"
    assert what(left(75, "interrupted", restart=1), job) == "leave"
