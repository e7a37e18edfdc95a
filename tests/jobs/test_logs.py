"""What ranks say is read across the starts of a job, and followed until the run is over."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pathfm.__main__ import main as pathfm
from pathfm.jobs import logs
from pathfm.launch.attempts import Attempt, Outcome, Submission, note_outcome, note_submission
from pathfm.lifecycle.run import Run
from tests.jobs.fake_slurm import FakeSlurm, slurm

__all__ = ["slurm"]
Capture = pytest.CaptureFixture[str]
NEVER = 4_194_304  # beyond every process id of Linux


def say(run: Run, attempt: str, rank: int, text: str) -> None:
    folder = run.directory / "logs" / attempt
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank_{rank}.log").open("a") as log:
        log.write(text)


def supervisor_says(run: Run, job: str, text: str) -> None:
    folder = run.directory / "logs" / "submitit"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{job}_0_log.out").open("a") as log:
        log.write(text)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Job 12 was started twice, on two ranks."""
    monkeypatch.chdir(tmp_path)
    begun = Run(Path("runs/vitb"))
    note_submission(begun.directory, Submission("12", "", 1, 2))
    supervisor_says(begun, "12", "pathfm: attempt 12.0 on n1: logs are ...\n")
    for second, attempt in enumerate(("12.0", "12.1")):
        for rank in (0, 1):
            say(begun, attempt, rank, f"rank {rank} of {attempt} begins\n")
        os.utime(Attempt(begun.directory, "12", int(attempt[-1])).folder, (second, second))
    return begun


def test_rank_0_of_the_newest_start_is_printed(run: Run, capsys: Capture):
    assert pathfm(["logs", "vitb"]) == 0
    said = capsys.readouterr()
    assert said.out == "rank 0 of 12.1 begins\n"
    assert said.err == "pathfm: rank 0 of attempt 12.1: runs/vitb/logs/12.1/rank_0.log\n"


def test_another_rank_and_an_earlier_start_can_be_asked_for(run: Run, capsys: Capture):
    assert pathfm(["logs", "vitb", "--rank", "1", "--attempt", "12.0"]) == 0
    assert capsys.readouterr().out == "rank 1 of 12.0 begins\n"


def test_how_the_start_ended_is_told_at_the_end(run: Run, capsys: Capture):
    note_outcome(
        run.directory, Outcome("12", 1, "12", 75, 400, "requeue", was_crash=False, reason="the time limit came")
    )
    assert pathfm(["logs", "vitb"]) == 0
    assert capsys.readouterr().err.endswith("\npathfm: attempt 12.1 ended: requeue, the time limit came\n")


def test_all_ranks_are_merged_by_their_clocks(run: Run, capsys: Capture):
    say(run, "12.2", 0, "loading\n23:59:58 I one\n00:00:02 I five\n  its second line\n")
    say(run, "12.2", 1, "23:59:59 I two\nTraceback:\n00:00:01 I four")
    assert pathfm(["logs", "vitb", "--all"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "[0] loading",
        "[0] 23:59:58 I one",
        "[1] 23:59:59 I two",
        "[1] Traceback:",
        "[1] 00:00:01 I four",
        "[0] 00:00:02 I five",
        "[0]   its second line",
    ]


def test_the_supervisor_has_a_log_of_its_own(run: Run, capsys: Capture):
    assert pathfm(["logs", "vitb", "--supervisor"]) == 0
    assert capsys.readouterr().out == "pathfm: attempt 12.0 on n1: logs are ...\n"


def test_a_start_whose_ranks_never_spoke_has_its_supervisors_words(run: Run, capsys: Capture):
    (run.directory / "logs" / "12.2").mkdir()
    assert pathfm(["logs", "vitb"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("pathfm: the supervisor of job 12, as no rank has said anything: ")
    assert said.out == "pathfm: attempt 12.0 on n1: logs are ...\n"


def test_a_run_on_this_machine_has_one_log_the_newest(tmp_path: Path, capsys: Capture):
    run = Run(tmp_path / "vitb")
    for second, job in enumerate(("77", "9")):
        supervisor_says(run, job, f"step 1 of {job}\n")
        os.utime(run.directory / "logs" / "submitit" / f"{job}_0_log.out", (second, second))
    assert pathfm(["logs", str(run.directory)]) == 0
    assert capsys.readouterr().out == "step 1 of 9\n"


def test_a_run_on_a_terminal_spoke_there(tmp_path: Path, capsys: Capture):
    run = Run(tmp_path / "vitb")
    supervisor_says(run, "77", "")
    assert pathfm(["logs", str(run.directory)]) == 0
    assert capsys.readouterr().err.endswith("nothing is in it; a run that was started on a terminal speaks there\n")


def test_what_is_not_there_is_one_line_with_what_is(run: Run, capsys: Capture):
    assert pathfm(["logs", "vitb", "--rank", "2"]) == 2
    assert "attempt 12.1 of run vitb has no log of rank 2; its ranks are 0 to 1" in capsys.readouterr().err
    assert pathfm(["logs", "vitb", "--attempt", "12.7"]) == 2
    assert "run vitb has no attempt 12.7; there are: 12.0, 12.1" in capsys.readouterr().err


def test_without_logs_there_is_something_to_do(tmp_path: Path, slurm: FakeSlurm, capsys: Capture):
    run = Run(tmp_path / "vitb")
    run.directory.mkdir()
    assert pathfm(["logs", str(run.directory)]) == 2
    assert "has no logs yet; only what launchers/pretrain.py starts is logged there" in capsys.readouterr().err
    note_submission(run.directory, Submission("12", "", 1, 2))
    slurm.job("12", like="waiting", StartTime="Unknown")
    assert pathfm(["logs", str(run.directory)]) == 2
    assert "has no logs yet; job 12 is waiting: Resources; wait for it with -f" in capsys.readouterr().err
    slurm.forget("12")
    assert pathfm(["logs", str(run.directory)]) == 2
    assert "has no logs yet; look at pathfm status" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_no_obstacle(run: Run, capsys: Capture):
    with (run.directory / "logs" / "12.1" / "rank_0.log").open("ab") as log:
        log.write(b"\xff\xfe\0 odd\n")
    assert pathfm(["logs", "vitb"]) == 0
    assert " odd\n" in capsys.readouterr().out


# ---- following


class Followed:
    """`pathfm logs -f` in a thread, and what it has said so far."""

    def __init__(self, capsys: Capture, *arguments: str) -> None:
        self.out = self.err = ""
        self.status: int | None = None
        self._capsys = capsys
        self._thread = threading.Thread(target=self._run, args=(arguments,), daemon=True)
        self._thread.start()

    def _run(self, arguments: tuple[str, ...]) -> None:
        self.status = pathfm(["logs", "-f", *arguments])

    def wait_for(self, is_so: Callable[["Followed"], bool]) -> None:
        deadline = time.monotonic() + 60
        while not is_so(self):
            said = self._capsys.readouterr()
            self.out, self.err = self.out + said.out, self.err + said.err
            assert time.monotonic() < deadline, (self.out, self.err)
            time.sleep(0.01)

    def wait_for_end(self) -> None:
        self._thread.join(60)
        self.wait_for(lambda followed: followed.status is not None)
        self.wait_for(lambda followed: "is over" in followed.err)


@pytest.fixture
def follow(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Followed]:
    monkeypatch.setattr(logs, "_SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(logs, "_SECONDS_BETWEEN_QUESTIONS", 0.05)
    return lambda *arguments: Followed(capsys, *arguments)


def test_following_goes_over_to_the_next_start_and_ends_with_the_run(
    run: Run, slurm: FakeSlurm, follow: Callable[..., Followed]
):
    slurm.job("12")
    followed = follow("vitb")
    followed.wait_for(lambda f: "rank 0 of 12.1 begins\n" in f.out)
    say(run, "12.1", 0, "step 1\nhalf a")
    followed.wait_for(lambda f: "step 1\n" in f.out)
    assert "half" not in followed.out
    say(run, "12.1", 0, " line\nthe end of 12.1")
    followed.wait_for(lambda f: "half a line\n" in f.out)
    note_outcome(
        run.directory, Outcome("12", 1, "12", 75, 400, "requeue", was_crash=False, reason="the time limit came")
    )
    slurm.job("12", like="waiting, requeued")
    (run.directory / "logs" / "12.2").mkdir()  # begun, and no rank has spoken
    time.sleep(0.1)
    say(run, "12.2", 0, "rank 0 of 12.2 begins\n")
    followed.wait_for(lambda f: f.out.endswith("half a line\nthe end of 12.1\nrank 0 of 12.2 begins\n"))
    told = (
        "attempt 12.1 ended: requeue, the time limit came; now rank 0 of attempt 12.2: runs/vitb/logs/12.2/rank_0.log"
    )
    followed.wait_for(lambda f: told in f.err)
    assert followed.status is None
    say(run, "12.2", 0, "finished")
    (run.directory / "exit.json").write_text('{"verdict": "done", "job": "12", "restart": 2}')
    slurm.job("12", like="completed")
    followed.wait_for_end()
    assert followed.status == 0
    assert followed.out.endswith("finished\n")
    assert "run vitb is over (done): no job of it waits or runs" in followed.err


def test_following_waits_for_a_job_that_has_not_begun(
    tmp_path: Path, slurm: FakeSlurm, follow: Callable[..., Followed]
):
    run = Run(tmp_path / "vitb")
    note_submission(run.directory, Submission("12", "", 1, 2))
    slurm.job("12", like="waiting", StartTime="Unknown")
    followed = follow(str(run.directory))
    followed.wait_for(lambda f: "run vitb has no logs yet; job 12 is waiting: Resources\n" in f.err)
    say(run, "12.0", 0, "rank 0 begins\n")
    followed.wait_for(lambda f: "rank 0 begins\n" in f.out)
    slurm.forget("12")
    followed.wait_for_end()


def test_following_ends_when_the_job_is_cancelled_not_while_slurm_is_silent(
    run: Run, slurm: FakeSlurm, follow: Callable[..., Followed]
):
    slurm.job("12", like="cancelled")
    slurm.go_down()
    followed = follow("vitb", "--all")
    followed.wait_for(lambda f: len(slurm.asked()) >= 3)
    assert followed.status is None
    (slurm.folder / "down").unlink()
    followed.wait_for_end()
    assert "run vitb is over (it never began)" in followed.err
    assert followed.out == "[0] rank 0 of 12.1 begins\n[1] rank 1 of 12.1 begins\n"


def test_following_a_run_on_this_machine_ends_with_its_process(tmp_path: Path, follow: Callable[..., Followed]):
    run = Run(tmp_path / "vitb")
    supervisor_says(run, "77", "step 1\n")
    (run.directory / ".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}")
    followed = follow(str(run.directory))
    followed.wait_for(lambda f: "step 1\n" in f.out)
    time.sleep(0.2)
    assert followed.status is None
    (run.directory / ".lock").write_text(f"process {NEVER} on {socket.gethostname()}")
    followed.wait_for_end()


def test_ctrl_c_is_the_usual_way_out_of_following(run: Run):
    # as a terminal starts it: whoever runs the tests in the background has SIGINT ignored, and so have their children
    as_usual = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    folder = str(run.directory.absolute())
    viewing = f"from pathfm.__main__ import main; raise SystemExit(main(['logs', '-f', {folder!r}]))"
    command = [sys.executable, "-c", f"{as_usual}; {viewing}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as viewer:
        assert viewer.stdout
        assert viewer.stdout.readline() == "rank 0 of 12.1 begins\n"
        viewer.send_signal(signal.SIGINT)
        assert viewer.wait(timeout=30) == 0
