"""Every live job of a run is cancelled, no other, and the person is told what stays and how to go on."""

from pathlib import Path

import pytest

from pathfm.__main__ import main as pathfm
from pathfm.launch.attempts import Submission, is_cancelled, note_submission
from pathfm.lifecycle.run import Run
from tests.jobs.fake_slurm import FakeSlurm, slurm

__all__ = ["slurm"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Two jobs, of which the second follows the first, and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    begun = Run(Path("runs/vitb"))
    (begun.checkpoints / "step_00001200").mkdir(parents=True)
    note_submission(begun.directory, Submission("12", "", 2, 4, command="pretrain.py --config vitb14"))
    note_submission(begun.directory, Submission("13", "", 2, 4, command="pretrain.py --config vitb14", follows="12"))
    return begun


def test_a_job_that_trains_is_asked_to_save_and_one_that_waits_is_cancelled_first(
    run: Run, slurm: FakeSlurm, capsys: Capture
):
    slurm.job("12", EndTime="Unknown")
    slurm.job("13", like="waiting for another job")
    assert pathfm(["cancel", "vitb"]) == 0
    assert slurm.cancelled() == ["13"]
    assert slurm.signalled() == ["--signal=USR2 --batch 12"]
    assert is_cancelled(run.directory, "12")
    assert capsys.readouterr().out.splitlines() == [
        "cancelled job 13 of run vitb (waiting: Dependency)",
        "cancelled job 12 of run vitb (running on n[1-2]); it saves and leaves",
        "its checkpoints stay, the newest is of step 1,200",
        "go on with: pretrain.py --config vitb14 --resubmit",
    ]


def test_whoever_cannot_wait_for_a_checkpoint_cancels_now(run: Run, slurm: FakeSlurm, capsys: Capture):
    slurm.job("12", EndTime="Unknown")
    assert pathfm(["cancel", "vitb", "--now"]) == 0
    assert slurm.cancelled() == ["12"]
    assert "cancelled job 12 of run vitb (running on n[1-2])\n" in capsys.readouterr().out


def test_a_job_that_only_waited_has_nothing_to_save(run: Run, slurm: FakeSlurm, capsys: Capture):
    (run.checkpoints / "step_00001200").rmdir()
    slurm.job("12", like="waiting", StartTime="Unknown")
    assert pathfm(["cancel", "runs/vitb"]) == 0
    assert "it has no checkpoint yet\ngo on with" in capsys.readouterr().out


def test_a_second_cancel_has_nothing_to_do(run: Run, slurm: FakeSlurm, capsys: Capture):
    slurm.job("12", like="waiting", StartTime="Unknown")
    assert pathfm(["cancel", "vitb"]) == 0
    capsys.readouterr()
    assert pathfm(["cancel", "vitb"]) == 0
    assert capsys.readouterr().out == "run vitb has no job that waits or runs; nothing to cancel\n"
    assert slurm.cancelled() == ["12"]


def test_an_element_of_a_sweep_is_cancelled_once_and_alone(run: Run, slurm: FakeSlurm):
    note_submission(run.directory, Submission("77_1", "", 2, 4))
    run.write_exit("running", 3)
    (run.directory / "exit.json").write_text('{"verdict": "running", "job": "77"}')
    for number in ("77", "77_1"):
        slurm.job(number, like="element of an array", JobId="77", ArrayJobId="77", ArrayTaskId="1", JobState="RUNNING")
    assert pathfm(["cancel", "vitb"]) == 0
    assert slurm.signalled() == ["--signal=USR2 --batch 77_1"]
    assert is_cancelled(run.directory, "77")
    assert slurm.cancelled() == []


@pytest.mark.parametrize("state", ["completed", "cancelled", "time limit", "preempted"])
def test_jobs_that_have_ended_are_left_alone(run: Run, slurm: FakeSlurm, state: str):
    slurm.job("12", like=state)
    assert pathfm(["cancel", "vitb"]) == 0
    assert slurm.cancelled() == []


def test_a_strangers_job_that_got_the_number_is_left_alone(run: Run, slurm: FakeSlurm, capsys: Capture):
    slurm.job("12", name="of_somebody_else")
    assert pathfm(["cancel", "vitb"]) == 0
    said = capsys.readouterr()
    assert said.err == "note: job 12 is named 'of_somebody_else', not 'vitb'; it is left alone\n"
    assert said.out.startswith("run vitb has no job")
    assert slurm.cancelled() == []


def test_a_run_that_is_reached_by_a_link_has_its_jobs_name_from_either(run: Run, slurm: FakeSlurm):
    run.directory.rename("elsewhere")
    run.directory.symlink_to(Path("elsewhere").absolute())
    slurm.job("12")
    assert pathfm(["cancel", "vitb", "--now"]) == 0
    assert slurm.cancelled() == ["12"]


def test_several_runs_are_cancelled_at_once(run: Run, slurm: FakeSlurm):
    note_submission(Path("runs/vitl"), Submission("20", "", 1, 8))
    slurm.job("12")
    slurm.job("20", name="vitl")
    assert pathfm(["cancel", "--now", "vitb", "vitl"]) == 0
    assert slurm.cancelled() == ["12", "20"]


def test_of_several_runs_none_is_cancelled_when_one_is_mistyped(run: Run, slurm: FakeSlurm, capsys: Capture):
    slurm.job("12")
    assert pathfm(["cancel", "vitb", "vitl"]) == 2
    assert "there is no run 'vitl'" in capsys.readouterr().err
    assert slurm.cancelled() == []


def test_a_refusal_is_told_in_slurms_own_words(run: Run, slurm: FakeSlurm, capsys: Capture):
    slurm.job("12")
    slurm.deny()
    assert pathfm(["cancel", "vitb"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: job 12 of run vitb was not cancelled: scancel: error: Kill job error")
    assert "cancelled job" not in said.out
    assert "its checkpoints stay" not in said.out


def test_a_controller_that_does_not_answer_is_one_line(run: Run, slurm: FakeSlurm, capsys: Capture):
    slurm.go_down()
    assert pathfm(["cancel", "vitb"]) == 2
    assert "error: Slurm does not answer (slurm_load_jobs error: Unable to contact" in capsys.readouterr().err


def test_without_slurm_there_is_something_to_do(run: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert pathfm(["cancel", "vitb"]) == 2
    assert (
        "there is no Slurm here (scontrol is not on PATH); cancel where the run was submitted"
        in capsys.readouterr().err
    )
