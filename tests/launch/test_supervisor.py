"""The supervisor passes signals on, outlives them, and decides what becomes of its job."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pathfm.launch.attempts import note_cancelled, outcomes, submissions

SUPERVISE = "import sys; from pathfm.launch.supervisor import supervise; sys.exit(supervise(sys.argv[1:]))"

PAYLOAD = """
import signal, sys, time
def leave(number, frame):
    print(signal.Signals(number).name, flush=True)
    sys.exit(75)
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, leave)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_reaches_the_payload_whose_status_is_the_supervisors(number: signal.Signals) -> None:
    command = [sys.executable, "-c", SUPERVISE, sys.executable, "-c", PAYLOAD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout
        assert supervisor.stdout.readline() == "ready\n"
        supervisor.send_signal(number)
        assert supervisor.stdout.readline().strip() == number.name
        assert supervisor.wait(timeout=30) == 75


def test_a_signal_that_comes_before_the_payload_is_there_is_kept_for_it() -> None:
    code = (
        "import os, signal, sys; from pathfm.launch.supervisor import supervise; "
        "sys.exit(supervise(['sleep', '60'], before=lambda: os.kill(os.getpid(), signal.SIGTERM)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 128 + signal.SIGTERM


def _slurm_of_scripts(folder: Path, **programs: str) -> None:
    """Programs in Slurm's place, which note the words they are called with in `calls`."""
    folder.mkdir()
    for name, script in programs.items():
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/calls\n{script}\n')
        (folder / name).chmod(0o755)


def _batch_step(folder: Path, restart: int = 0, **programs: str) -> subprocess.CompletedProcess[str]:
    """The supervisor of job 7 as its batch step; `srun` and `scontrol` are shell."""
    if not (folder / "bin").exists():
        _slurm_of_scripts(folder / "bin", **programs)
    code = (
        "import sys; from pathlib import Path; from pathfm.launch.profile import Profile; "
        "from pathfm.launch.sbatch import SlurmJob; from pathfm.launch.supervisor import batch_step; "
        f"sys.exit(batch_step(SlurmJob('r', Path({str(folder / 'r')!r}), 1, Profile(), ('true',))))"
    )
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart)}
    environment["PATH"] = f"{folder / 'bin'}:{os.environ['PATH']}"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def _calls(folder: Path) -> list[str]:
    return (folder / "bin" / "calls").read_text().splitlines()


RUNNING = "echo JobId=7 JobName=r JobState=RUNNING Reason=None Restarts=$SLURM_RESTART_COUNT PreemptTime=None"


def test_a_run_that_is_finished_is_not_started_again(tmp_path: Path) -> None:
    done = _batch_step(tmp_path, srun="exit 0", scontrol=RUNNING)
    assert done.returncode == 0, done.stderr
    assert not [call for call in _calls(tmp_path) if call.startswith("scontrol requeue")]
    assert [outcome.decision for outcome in outcomes(tmp_path / "r")] == ["done"]


def test_a_checkpoint_as_told_is_a_requeue(tmp_path: Path) -> None:
    assert _batch_step(tmp_path, srun="exit 75", scontrol=RUNNING).returncode == 75
    assert "scontrol requeue 7" in _calls(tmp_path)


def test_the_third_crash_in_a_row_fails_with_the_first_traceback(tmp_path: Path) -> None:
    crash = (
        'for word in "$@"; do case $word in --output=*) log=${word#--output=};; esac; done\n'
        "echo 'Traceback (most recent call last):\n  File \"x.py\"\nKeyError: 1' > $(dirname $log)/rank_0.log; exit 1"
    )
    for restart in range(3):
        done = _batch_step(tmp_path, restart, srun=crash, scontrol=RUNNING)
        assert done.returncode == 1
    assert [outcome.decision for outcome in outcomes(tmp_path / "r")] == ["requeue", "requeue", "fail"]
    assert "KeyError: 1" in done.stderr
    reason = json.loads((tmp_path / "r" / "exit.json").read_text())["reason"]
    assert reason.startswith("rank 0 failed first")


def test_a_new_checkpoint_in_between_gives_new_attempts(tmp_path: Path) -> None:
    for restart in range(4):
        (tmp_path / "r" / "checkpoints" / f"step_{restart:08d}").mkdir(parents=True)
        _batch_step(tmp_path, restart, srun="exit 1", scontrol=RUNNING)
    # the step before the first is no progress, so restarts 0 and 1 count for themselves alone
    assert {outcome.decision for outcome in outcomes(tmp_path / "r")} == {"requeue"}


def test_what_is_to_be_mended_fails_at_once(tmp_path: Path) -> None:
    assert _batch_step(tmp_path, srun="exit 2", scontrol=RUNNING).returncode == 2
    assert [outcome.decision for outcome in outcomes(tmp_path / "r")] == ["fail"]


def test_a_cancelled_job_is_left_alone(tmp_path: Path) -> None:
    completing = "echo JobId=7 JobState=COMPLETING Reason=None Restarts=0 PreemptTime=None EndTime=2026-01-01T00:00:00"
    _batch_step(tmp_path, srun="exit 75", scontrol=completing)
    assert [outcome.decision for outcome in outcomes(tmp_path / "r")] == ["leave"]


# ranks that leave only when a requeue was asked for: a supervisor that waited for them first would wait for ever
SLOW = "trap '' USR2; kill -TERM $PPID; until grep -q 'scontrol requeue' {folder}/bin/calls; do sleep 0.1; done"
CUT_SHORT = "echo JobId=7 JobState=COMPLETING Reason=TimeLimit Restarts=0 EndTime=2026-01-01T00:00:00"


def test_a_job_that_its_limit_ends_is_requeued_before_its_ranks_have_left(tmp_path: Path) -> None:
    slow = f"{SLOW.format(folder=tmp_path)}; exit 75"
    assert _batch_step(tmp_path, srun=slow, scontrol=CUT_SHORT).returncode == 75
    assert [call for call in _calls(tmp_path) if call.startswith("scontrol requeue")] == ["scontrol requeue 7"]
    assert [outcome.decision for outcome in outcomes(tmp_path / "r")] == ["leave"]


def test_an_early_requeue_that_is_refused_is_tried_again_at_the_end(tmp_path: Path) -> None:
    refused_once = (
        f"case $1 in requeue) [ $(grep -c 'scontrol requeue' {tmp_path}/bin/calls) = 1 ] && "
        f"{{ echo 'Requested operation is presently disabled' >&2; exit 1; }};; esac\n{CUT_SHORT}"
    )
    slow = f"{SLOW.format(folder=tmp_path)}; sleep 1; exit 75"
    assert _batch_step(tmp_path, srun=slow, scontrol=refused_once).returncode == 75
    assert _calls(tmp_path).count("scontrol requeue 7") == 2
    assert [outcome.decision for outcome in outcomes(tmp_path / "r")] == ["requeue"]


def test_a_run_that_was_asked_to_leave_for_good_is_cancelled_when_it_has_saved(tmp_path: Path) -> None:
    note_cancelled(tmp_path / "r", "7")
    note_cancelled(tmp_path / "r", "8")
    done = _batch_step(tmp_path, srun="exit 75", scontrol=RUNNING, scancel="")
    assert done.returncode == 75
    assert _calls(tmp_path) == ["scancel 7"]  # it did not even begin
    assert "cancelled with 'pathfm cancel'" in done.stderr


def test_a_run_that_is_asked_to_leave_for_good_while_it_trains_is_not_requeued(tmp_path: Path) -> None:
    asked = f'echo \'{{"job": "7"}}\' > {tmp_path}/r/cancelled.jsonl; exit 75'
    _batch_step(tmp_path, srun=asked, scontrol=RUNNING, scancel="")
    assert _calls(tmp_path)[-1] == "scancel 7"
    assert not [call for call in _calls(tmp_path) if "requeue" in call]
    assert [outcome.reason for outcome in outcomes(tmp_path / "r")] == [
        "cancelled with 'pathfm cancel'; its checkpoint stays"
    ]


def test_where_slurm_may_not_requeue_a_new_job_follows(tmp_path: Path) -> None:
    refusing = f'case $1 in requeue) echo "Requested operation is presently disabled" >&2; exit 1;; esac\n{RUNNING}'
    done = _batch_step(tmp_path, srun="exit 75", scontrol=refusing, sbatch="echo Submitted batch job 8")
    assert done.returncode == 75, done.stderr
    (follow_up,) = submissions(tmp_path / "r")
    assert (follow_up.job, follow_up.follows) == ("8", "7")
    script = (tmp_path / "r" / "logs" / "submitit" / "8_submission.sh").read_text()
    assert "#SBATCH --dependency=afterany:7\n" in script


def test_nodes_that_failed_their_examination_are_excluded(tmp_path: Path) -> None:
    folder = tmp_path / "r" / "logs" / "7.0"
    folder.mkdir(parents=True)
    (folder / "doctor.json").write_text('{"failed_nodes": ["n3"]}')
    _batch_step(tmp_path, srun="exit 1", scontrol=RUNNING)
    assert "scontrol update JobId=7 ExcNodeList=n3" in _calls(tmp_path)
