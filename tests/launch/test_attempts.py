"""Jobs, their starts and how these ended are files of the run, which outlive full disks and killed writers."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pathfm.launch.attempts import (
    Attempt,
    Outcome,
    Submission,
    attempt_of,
    attempts,
    newest_checkpoint,
    note_outcome,
    note_submission,
    outcomes,
    submissions,
)

OUTCOME = Outcome("12", 0, "12", 75, 400, "requeue", was_crash=False, reason="the time limit came")
SUBMISSION = Submission("12", "2026-11-26T13:10:16+00:00", 2, 4, command="python launchers/pretrain.py --nodes 2")


def begin(run: Path, name: str, when: int, *logs: str) -> None:
    folder = run / "logs" / name
    folder.mkdir(parents=True)
    for log in logs:
        (folder / log).touch()
    os.utime(folder, (when, when))


def test_attempts_are_sorted_by_their_beginning_not_by_their_names(tmp_path: Path):
    begin(tmp_path, "9.0", 100)
    begin(tmp_path, "9.1", 200)
    begin(tmp_path, "10.0", 300)
    begin(tmp_path, "9.10", 250)
    assert [attempt.name for attempt in attempts(tmp_path)] == ["9.0", "9.1", "9.10", "10.0"]


def test_attempts_of_one_moment_are_sorted_by_restart(tmp_path: Path):
    for restart in (10, 2, 1):
        begin(tmp_path, f"9.{restart}", 100)
    assert [attempt.restart for attempt in attempts(tmp_path)] == [1, 2, 10]


def test_other_things_among_the_logs_are_no_attempts(tmp_path: Path):
    begin(tmp_path, "9.0", 100)
    begin(tmp_path, "submitit", 100)
    begin(tmp_path, "9.old", 100)
    (tmp_path / "logs" / "notes.1").touch()
    assert [attempt.name for attempt in attempts(tmp_path)] == ["9.0"]
    assert attempts(tmp_path / "elsewhere") == []


def test_rank_logs_are_in_the_order_of_ranks_and_nothing_else(tmp_path: Path):
    begin(
        tmp_path, "9.0", 100, "rank_10.log", "rank_2.log", "rank_0.log", "rank_%t.log", "rank_0.log.gz", "doctor.json"
    )
    logs = Attempt(tmp_path, "9", 0).rank_logs()
    assert [log.name for log in logs] == ["rank_0.log", "rank_2.log", "rank_10.log"]


def test_an_attempt_is_known_from_the_environment_of_its_job(tmp_path: Path):
    first = attempt_of(tmp_path, {"SLURM_JOB_ID": "12"})
    assert first == Attempt(tmp_path, "12", 0)
    assert attempt_of(tmp_path, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"}).restart == 3
    assert attempt_of(tmp_path, {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": ""}) == first
    assert first.log_pattern == f"{tmp_path}/logs/12.0/rank_%t.log"


def test_what_was_noted_is_read_back_in_its_order(tmp_path: Path):
    follow_up = replace(SUBMISSION, job="13", follows="12")
    note_submission(tmp_path, SUBMISSION)
    note_submission(tmp_path, follow_up)
    assert submissions(tmp_path) == [SUBMISSION, follow_up]
    note_outcome(tmp_path, OUTCOME)
    (read,) = outcomes(tmp_path)
    assert replace(read, ended="") == OUTCOME
    assert read.ended.endswith("+00:00")


def test_a_run_that_never_met_slurm_has_neither(tmp_path: Path):
    assert submissions(tmp_path) == []
    assert outcomes(tmp_path) == []


@pytest.mark.parametrize("damage", [b'{"job": "12", "restart": 1, "line', b"\0" * 40, b"\xff\xfe", b"{}", b"[1]", b"7"])
def test_a_damaged_line_is_passed_over_and_costs_no_other(tmp_path: Path, damage: bytes):
    note_outcome(tmp_path, OUTCOME)
    with (tmp_path / "attempts.jsonl").open("ab") as file:
        file.write(damage)
    assert [outcome.restart for outcome in outcomes(tmp_path)] == [0]
    note_outcome(tmp_path, replace(OUTCOME, restart=2))
    assert [outcome.restart for outcome in outcomes(tmp_path)] == [0, 2]


def test_the_newest_checkpoint_is_told_by_names_alone(tmp_path: Path):
    assert newest_checkpoint(tmp_path) == 0
    for name in ("step_00000400", "step_00001200", "step_00001600.passed_over", ".step_00002000.n1.7.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_checkpoint(tmp_path) == 1200
