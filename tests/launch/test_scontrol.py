"""What Slurm says of a job is read from recorded lines; commands are tried again as long as that may help."""

import os
from pathlib import Path

import pytest

from pathfm.launch import scontrol
from pathfm.launch.scontrol import JobRecord, SlurmRefusal, cancel, exclude_nodes, parse_job, requeue, show_job
from tests.launch.recorded_jobs import lines, record

_NO_SUCH_JOB = "slurm_load_jobs error: Invalid job id specified"
_NO_CONTROLLER = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def test_a_job_that_runs():
    assert record("running with a comment") == JobRecord(
        job="3",
        name="tcga_l",
        state="RUNNING",
        reason="",
        restarts=0,
        preempt_time="",
        end_time="2026-11-26T17:10:16",
        start_time="2026-11-26T13:10:16",
        nodes="n[1-2]",
    )


def test_a_comment_that_looks_like_fields_is_no_field():
    (line,) = lines("running with a comment")
    assert "Comment=a note: JobState=FAILED Restarts=7, and blanks = more" in line
    assert record("running with a comment").state == "RUNNING"
    assert record("requeue, at once").restarts == 1


@pytest.mark.parametrize(
    ("name", "state", "reason", "restarts"),
    [
        ("waiting", "PENDING", "Resources", 0),
        ("waiting for another job", "PENDING", "Dependency", 0),
        ("waiting, requeued", "PENDING", "BeginTime", 1),
        ("requeue, at once", "COMPLETING", "", 1),
        ("ending by scancel", "COMPLETING", "", 0),
        ("ending by time limit", "COMPLETING", "TimeLimit", 0),
        ("ending by preemption that requeues", "COMPLETING", "", 1),
        ("ending by preemption that cancels", "COMPLETING", "", 0),
        ("completed", "COMPLETED", "", 0),
        ("cancelled", "CANCELLED", "", 0),
        ("cancelled while it waited", "CANCELLED", "Resources", 0),
        ("time limit", "TIMEOUT", "TimeLimit", 0),
        ("preempted", "PREEMPTED", "", 0),
        ("element of an array", "FAILED", "NonZeroExitCode", 0),
    ],
)
def test_state_reason_and_restarts_are_read(name: str, state: str, reason: str, restarts: int):
    job = record(name)
    assert (job.state, job.reason, job.restarts) == (state, reason, restarts)
    assert job.is_waiting == (state == "PENDING")
    assert job.is_completing == (state == "COMPLETING")
    assert job.has_ended == (state in ("COMPLETED", "CANCELLED", "TIMEOUT", "PREEMPTED", "FAILED"))
    assert job.is_live is not job.has_ended


def test_what_slurm_does_not_know_is_empty():
    waiting = record("waiting for another job")
    assert (waiting.start_time, waiting.end_time, waiting.nodes, waiting.preempt_time) == ("", "", "", "")
    assert record("waiting").start_time == "2026-11-26T17:10:16"
    assert record("waiting").nodes == ""  # n[1-2] is only where it is planned to run
    assert record("running with a comment").preempt_time == ""


def test_the_moment_of_a_preemption_is_read():
    job = record("ending by preemption that cancels")
    assert job.preempt_time == job.end_time == "2026-11-26T13:11:30"


def test_an_element_of_an_array_has_a_number_of_its_own():
    (line,) = lines("element of an array")
    assert "ArrayJobId=6 ArrayTaskId=3" in line  # asked for as 6_3
    assert parse_job(line).job == "7"
    assert [parse_job(line).job for line in lines("all of an array")] == ["6", "8", "7"]


def test_a_state_that_is_new_to_us_counts_as_live():
    assert parse_job("JobId=1 JobName=a JobState=DREAMING").is_live
    assert parse_job("JobId=1").state == "UNKNOWN"


class Programs:
    """Programs on PATH that answer as they are told, one answer a call, the last one ever after."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def answer(self, program: str, *answers: tuple[int, str]) -> None:
        for number, (status, text) in enumerate(answers, start=1):
            (self.folder / f"{program}.{number}").write_text(text)
            (self.folder / f"{program}.{number}.status").write_text(str(status))
        path = self.folder / program
        path.write_text(
            f'#!/bin/sh\ncd {self.folder}\necho "$@" >> {program}.calls\nn=$(grep -c "" < {program}.calls)\n'
            f"[ $n -gt {len(answers)} ] && n={len(answers)}\ns=$(cat {program}.$n.status)\n"
            f"if [ $s = 0 ]; then cat {program}.$n; else cat {program}.$n >&2; fi\nexit $s\n"
        )
        path.chmod(0o755)

    def calls(self, program: str) -> list[str]:
        return (self.folder / f"{program}.calls").read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.defpath}")
    monkeypatch.setattr(scontrol, "_SECONDS_BETWEEN", 0.0)
    return Programs(tmp_path)


def test_a_controller_that_restarts_is_asked_again(slurm: Programs):
    (line,) = lines("running with a comment")
    slurm.answer("scontrol", (1, _NO_CONTROLLER), (0, f"{line}\n"))
    job = show_job("3")
    assert job is not None
    assert job.nodes == "n[1-2]"
    assert slurm.calls("scontrol") == ["-o show job 3"] * 2


def test_a_controller_that_never_answers_is_a_refusal_in_its_own_words(slurm: Programs):
    slurm.answer("scontrol", (1, f"{_NO_CONTROLLER}\n"))
    with pytest.raises(SlurmRefusal, match="Unable to contact slurm controller"):
        show_job("3", tries=3)
    assert len(slurm.calls("scontrol")) == 3


def test_a_job_that_slurm_has_forgotten_is_none_at_once(slurm: Programs):
    slurm.answer("scontrol", (1, _NO_SUCH_JOB))
    assert show_job("3") is None
    assert len(slurm.calls("scontrol")) == 1


def test_an_element_of_an_array_is_never_addressed_by_the_number_of_the_whole(slurm: Programs):
    assert [parse_job(line).address for line in lines("all of an array")] == ["6_5", "6_4", "6_3"]
    slurm.answer("scontrol", (0, lines("all of an array")[0].replace("ArrayTaskId=5", "ArrayTaskId=5-9%1")))
    element = show_job("6_7")
    assert element is not None
    assert (element.job, element.address) == ("6", "6_7")


def test_an_element_that_slurm_has_forgotten_is_not_taken_for_another_of_its_array(slurm: Programs):
    slurm.answer("scontrol", (0, "\n".join(lines("all of an array")[1:])))
    assert show_job("6") is None


def test_of_an_array_the_first_line_counts(slurm: Programs):
    slurm.answer("scontrol", (0, "\n".join(lines("all of an array"))))
    job = show_job("6")
    assert job is not None
    assert job.job == "6"


def test_an_answer_without_a_job_is_none(slurm: Programs):
    slurm.answer("scontrol", (0, "No jobs in the system\n"))
    assert show_job("3") is None


def test_without_slurm_the_missing_program_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmRefusal, match="scontrol: No such file or directory"):
        show_job("3")
    with pytest.raises(SlurmRefusal, match="scancel: No such file or directory"):
        cancel("3")


def test_a_program_that_hangs_is_not_waited_for(slurm: Programs):
    (slurm.folder / "scontrol").write_text("#!/bin/sh\nexec sleep 60\n")
    (slurm.folder / "scontrol").chmod(0o755)
    with pytest.raises(SlurmRefusal, match="scontrol did not answer within 0 s"):
        show_job("3", tries=2, patience_s=0.1)


def test_a_requeue_is_tried_again_until_it_is_taken(slurm: Programs):
    slurm.answer("scontrol", (1, _NO_CONTROLLER), (1, _NO_CONTROLLER), (0, ""))
    requeue("12")
    assert slurm.calls("scontrol") == ["requeue 12"] * 3


@pytest.mark.parametrize(
    "refusal",
    [
        "Requested operation is presently disabled for job 12",
        "Access/permission denied for job 12",
        _NO_SUCH_JOB,
    ],
)
def test_a_requeue_that_is_forbidden_is_not_tried_again(slurm: Programs, refusal: str):
    slurm.answer("scontrol", (1, refusal))
    with pytest.raises(SlurmRefusal, match=refusal):
        requeue("12")
    assert len(slurm.calls("scontrol")) == 1


def test_nodes_are_excluded_and_jobs_cancelled_by_name(slurm: Programs):
    slurm.answer("scontrol", (0, ""))
    slurm.answer("scancel", (0, ""))
    exclude_nodes("12", ["n3", "n7"])
    cancel("12")
    assert slurm.calls("scontrol") == ["update JobId=12 ExcNodeList=n3,n7"]
    assert slurm.calls("scancel") == ["12"]
