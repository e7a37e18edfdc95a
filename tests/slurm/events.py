"""Every way in which a cluster ends a job, and on which cluster it is tried."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.slurm.cluster import wait_for
from tests.slurm.trial import Trial


@dataclass(frozen=True)
class Event:
    """One row of the matrix. `may_lose`: the steps since the last periodic save."""

    name: str
    happen: Callable[[Trial], None]
    cluster: dict[str, Any] = field(default_factory=dict)
    state: str = "COMPLETED"
    comes_back: bool = True
    may_lose: bool = False


def _signal(*options: str) -> Callable[[Trial], None]:
    return lambda trial: trial.scancel(*options)


def _twice(trial: Trial) -> None:
    trial.scancel("--signal=USR2")
    time.sleep(0.3)
    trial.scancel("--signal=USR2")


def _then_cancelled(trial: Trial) -> None:
    trial.scancel("--signal=USR2")
    trial.scancel()


def _signal_without_requeue(trial: Trial) -> None:
    trial.cluster.scontrol("update", f"JobId={trial.job}", "Requeue=0")
    trial.scancel("--signal=USR2")
    wait_for(trial.goes_on_in_another_job, 60, trial.told)


def _pathfm_cancel(trial: Trial) -> None:
    trial.pathfm("cancel", str(trial.run_dir))


def _crash_loop(trial: Trial) -> None:
    trial.break_the_code("raise RuntimeError('a fault in the code')")
    trial.kill_rank(1)


def _time_limit(trial: Trial) -> None:
    trial.lower_time_limit()
    wait_for(lambda: trial.record().restarts > 0 or trial.record().has_ended, 180, trial.told)
    trial.raise_time_limit()


def _preempted(trial: Trial) -> None:
    trial.someone_more_important()


def _by_admin(trial: Trial) -> None:
    trial.cluster.scontrol("requeue", trial.job)


def _rank_killed(trial: Trial) -> None:
    trial.kill_rank(3)


def _node_lost(trial: Trial) -> None:
    """The node without the batch step loses its power; an admin sets it down, and later it is back."""
    trial.cluster.kill_node("n2")
    trial.cluster.scontrol("update", "NodeName=n2", "State=DOWN", "Reason=power")
    wait_for(lambda: trial.record().is_waiting, 60, trial.told)
    trial.cluster.start_node("n2")
    trial.cluster.scontrol("update", "NodeName=n2", "State=RESUME")


def _preemption(mode: str, grace_s: int, *, user_signal: bool) -> Event:
    words = f"preemption, {mode}, GraceTime {grace_s}" + (", with user signal" if user_signal else "")
    cluster = {"grace_s": grace_s, "preempt": mode, "user_signal": user_signal}
    return Event(words, _preempted, cluster, may_lose=grace_s == 0)


EVENTS = [
    Event("USR2 to the tasks", _signal("--signal=USR2")),
    Event("USR2, --full", _signal("--signal=USR2", "--full")),
    Event("USR2, --batch", _signal("--signal=USR2", "--batch")),
    Event("TERM to the tasks", _signal("--signal=TERM")),
    # Under proctrack/linuxproc this reaches srun too, as a process below the supervisor, and srun then kills its tasks.
    Event("TERM, --full", _signal("--signal=TERM", "--full"), may_lose=True),
    Event("USR2 where Slurm may not requeue: a follow-up job", _signal_without_requeue),
    Event("USR2 twice", _twice),
    Event("time limit, USR2 30 s before", _time_limit),
    Event("requeued by an admin", _by_admin),
    Event("USR2, then scancel", _then_cancelled, state="CANCELLED", comes_back=False),
    Event("scancel", _signal(), state="CANCELLED", comes_back=False),
    Event("pathfm cancel", _pathfm_cancel, {"kill_wait_s": 2}, state="CANCELLED", comes_back=False),
    Event("one rank killed", _rank_killed, may_lose=True),
    *(
        _preemption(mode, grace_s, user_signal=user_signal)
        for user_signal in (False, True)
        for mode, grace_s in (("REQUEUE", 0), ("REQUEUE", 10), ("REQUEUE", 30))
    ),
    _preemption("CANCEL", 0, user_signal=False),
    _preemption("CANCEL", 10, user_signal=False),
    # Supervisor and ranks are killed before anybody has saved.
    Event(
        "preemption, CANCEL, GraceTime 0, KillWait 1",
        _preempted,
        {"preempt": "CANCEL", "kill_wait_s": 1},
        may_lose=True,
    ),
    Event("a crash at every start", _crash_loop, state="FAILED", comes_back=False),
    Event("node killed and set down", _node_lost, may_lose=True),
]
