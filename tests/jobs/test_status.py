"""Where a run stands, as a person is told: by Slurm, by its own word, and by the ends of its files."""

import json
import os
import re
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pathfm.__main__ import main as pathfm
from pathfm.config import to_yaml
from pathfm.jobs import run_progress, status
from pathfm.launch.attempts import Outcome, Submission, note_outcome, note_submission
from pathfm.lifecycle.run import Run
from pathfm.recipe import Recipe
from tests.jobs.fake_slurm import FakeSlurm, slurm

__all__ = ["slurm"]
NEVER = 4_194_304  # beyond every process id of Linux
ALARM = "the GPUs wait for data 42 % of the time (210 samples/s): raise train.num_workers"


def metrics_line(step: int, **more: Any) -> str:
    timing = {"seconds_per_step": 0.5, "samples_per_second": 128.0}
    return json.dumps({"step": step, "epoch": step / 250, "total_loss": 6.125, "timing": timing, **more}) + "\n"


def exit_json(run: Run, verdict: str, job: str | None = None, restart: int = 0, reason: str = "") -> None:
    told = {"verdict": verdict, "step": 500, "reason": reason, "job": job, "restart": restart}
    (run.directory / "exit.json").write_text(json.dumps(told))


def begin(run: Run, attempt: str, nodes: str = "n[1-2]") -> None:
    (run.directory / "logs" / attempt).mkdir(parents=True)
    submitit = run.directory / "logs" / "submitit"
    submitit.mkdir(exist_ok=True)
    with (submitit / f"{attempt.split('.')[0]}_0_log.out").open("a") as log:
        log.write(f"pathfm: attempt {attempt} on {nodes}: logs are {run.directory}/logs/{attempt}/rank_%t.log\n")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Of 2,500 steps (10 epochs of 250), begun as job 12 and at step 500."""
    monkeypatch.chdir(tmp_path)
    begun = Run(Path("runs/vitb"))
    (begun.checkpoints / "step_00000400").mkdir(parents=True)
    recipe = Recipe()
    begun.recipe.write_text(
        to_yaml(recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"epochs": 10})}))
    )
    begun.metrics.write_text(metrics_line(490) + metrics_line(500))
    note_submission(begun.directory, Submission("12", "2026-11-26T12:00:00+00:00", 2, 4))
    begin(begun, "12.0")
    exit_json(begun, "running", "12")
    return begun


def tuning(step: int, teacher: float, student: float | None = None, **more: Any) -> dict[str, Any]:
    """A line of tuning.jsonl."""
    found: dict[str, Any] = {"teacher": {"acc_10": 0.5, "auc_20": teacher}}
    if student is not None:
        found["student"] = {"acc_10": 0.5, "auc_20": student}
    return {"step": step, "samples_seen": 64 * step, "by": "run", **found, "early_stopping": None, **more}


def add(file: Path, *lines: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with file.open("a") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in lines)


def alarm(step: int, hours_ago: float, kind: str = "data-bound") -> dict[str, Any]:
    time = datetime.now(UTC) - timedelta(hours=hours_ago)
    return {"step": step, "time": time.isoformat(timespec="seconds"), "alarm": kind, "text": ALARM}


@pytest.fixture
def row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """A run's cells by their columns; those that the table leaves out are "-"."""
    monkeypatch.setattr(status, "_WIDTH", 1000)

    def told(name: str = "vitb") -> dict[str, str]:
        assert pathfm(["status"]) == 0
        lines = capsys.readouterr().out.splitlines()
        columns = re.split(r"\s{2,}", lines[0].strip())
        starts = [lines[0].index(f" {column}") + 1 for column in columns]
        (line,) = [line for line in lines if line.split()[0] == name]
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        return defaultdict(lambda: "-", zip(columns, cells, strict=True))

    return told


def test_a_run_that_trains_is_one_line(run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]):
    slurm.job("12", EndTime="2099-01-01T00:00:00")
    told = row()
    assert re.fullmatch(r"running on n\[1-2\], [\d,]+ days left", told["in the queue"])
    assert told["state"] == "running"
    assert told["step"] == "500 / 2,500 (20 %)"
    assert told["loss"] == "6.1250"
    assert told["samples/s"] == "128"
    assert told["ETA"] == "17 min"
    assert re.fullmatch(r"\d+ s ago", told["logged"])
    assert re.fullmatch(r"400, \d+ s ago", told["checkpoint"])
    assert told["starts"] == "1"


def test_a_run_that_never_began_waits_for_its_job(run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]):
    for file in (run.metrics, run.directory / "exit.json"):
        file.unlink()
    slurm.job("12", like="waiting", StartTime="Unknown")
    told = row()
    assert (told["in the queue"], told["state"]) == ("waiting: Resources", "not begun")
    assert (told["step"], told["loss"], told["logged"], told["samples/s"]) == ("0", "-", "-", "-")


def test_a_run_says_it_runs_but_no_job_lives(run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]):
    told = row()  # Slurm has forgotten the job
    assert (told["in the queue"], told["state"]) == ("no job", "stale: says running, yet no job")
    slurm.job("12", like="cancelled")
    assert row()["state"] == "stale: says running, yet no job"
    slurm.job("12", name="of_somebody_else")  # the number was given again
    assert row()["state"] == "stale: says running, yet no job"


@pytest.mark.parametrize("trouble", ["no Slurm here", "no answer"])
def test_nobody_is_called_stale_on_a_guess(
    run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]], trouble: str, monkeypatch: pytest.MonkeyPatch
):
    if trouble == "no answer":
        slurm.go_down()
    else:
        monkeypatch.setenv("PATH", "/nowhere")
    told = row()
    assert told["state"] == "running"
    assert told["in the queue"] == ("no answer" if trouble == "no answer" else "-")


def test_after_one_refusal_slurm_is_left_in_peace(run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]):
    for number in range(50):
        note_submission(run.directory.with_name(f"other_{number}"), Submission(str(100 + number), "", 1, 1))
    slurm.go_down()
    row()
    assert len(slurm.asked()) <= 2 * 8


@pytest.mark.parametrize(
    ("verdict", "reason", "outcome", "job", "state"),
    [
        ("interrupted", "SIGUSR2", ("requeue", "the time limit came"), "waiting, requeued", "interrupted: SIGUSR2"),
        (
            "interrupted",
            "SIGTERM",
            ("leave", "somebody cancelled the job"),
            None,
            "interrupted: somebody cancelled the job",
        ),
        ("running", "", ("leave", "somebody cancelled the job"), None, "killed: somebody cancelled the job"),
        ("running", "", ("requeue", "a crash (status 137)"), "waiting, requeued", "killed: a crash (status 137)"),
        ("running", "", None, "waiting, requeued", "killed, to go on"),
        ("failed", "ValueError: no tile\nmore", None, "waiting, requeued", "crashed, tried again: ValueError: no tile"),
        ("failed", "ValueError: no tile\nmore", ("fail", "3 crashes"), None, "failed: ValueError: no tile"),
        ("failed", "", ("fail", "something is to be mended"), None, "failed: something is to be mended"),
        ("interrupted", "SIGUSR2", None, "of the next attempt", "starting"),
        ("done", "", ("done", "the run is finished"), None, "done"),
    ],
)
def test_the_state_of_a_run_between_two_starts(
    run: Run,
    slurm: FakeSlurm,
    row: Callable[..., dict[str, str]],
    verdict: str,
    reason: str,
    outcome: tuple[str, str] | None,
    job: str | None,
    state: str,
):
    exit_json(run, verdict, "12", reason=reason)
    if outcome:
        note_outcome(run.directory, Outcome("12", 0, "12", 1, 400, outcome[0], was_crash=False, reason=outcome[1]))
    if job == "of the next attempt":
        slurm.job("12", Restarts="1")
    elif job:
        slurm.job("12", like=job)
    assert row()["state"] == state


def test_of_several_jobs_the_newest_that_lives_is_told(run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]):
    note_submission(run.directory, Submission("13", "", 2, 4, follows="12"))
    slurm.job("12", EndTime="Unknown")
    slurm.job("13", like="waiting for another job")
    assert row()["in the queue"] == "waiting: Dependency"
    slurm.forget("13")
    assert row()["in the queue"] == "running on n[1-2]"


def test_a_job_that_was_not_submitted_by_us_is_found_by_its_word(
    run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]
):
    exit_json(run, "running", "77")
    slurm.job("77", name="my_script.sh", EndTime="Unknown")
    assert row()["state"] == "running"


def test_a_run_that_is_done_is_not_asked_for(run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]):
    exit_json(run, "done", "12")
    assert row()["in the queue"] == "-"
    assert slurm.asked() == []


@pytest.mark.parametrize(
    ("process", "host", "state"),
    [
        (os.getpid(), socket.gethostname(), "running"),
        (NEVER, socket.gethostname(), "stale: says running, yet no process"),
        (NEVER, "another", "running"),
    ],
)
def test_a_run_on_this_machine_is_told_by_its_process(
    run: Run, row: Callable[..., dict[str, str]], process: int, host: str, state: str
):
    (run.directory / "jobs.jsonl").unlink()
    (run.directory / ".lock").write_text(f"process {process} on {host}")
    exit_json(run, "running", job=None)
    (run.directory / "provenance.json").write_text("[{}, {}, {}]")
    (run.directory / "logs" / "12.0").rmdir()
    told = row()
    assert (told["in the queue"], told["state"], told["starts"]) == ("-", state, "3")


def test_starts_and_crashes_are_counted(run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]):
    crash = Outcome("12", 0, "12", 1, 400, "requeue", was_crash=True, reason="a crash (status 1)")
    note_outcome(run.directory, crash)
    note_outcome(run.directory, replace(crash, restart=1, was_crash=False))
    begin(run, "12.1")
    begin(run, "12.2")
    assert row()["starts"] == "3, 1 crashed"


def test_a_crash_or_alarm_that_came_last_is_told(run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]):
    assert row()["trouble"] == "-"
    add(run.alarms, alarm(100, 30, "collapse"), alarm(300, 5))
    assert row()["trouble"] == "data-bound, 5:00 h ago"
    note_outcome(run.directory, Outcome("12", 0, "12", 1, 400, "requeue", was_crash=True, reason="a crash (status 1)"))
    assert re.fullmatch(r"crash, \d+ s ago", row()["trouble"])


def test_the_last_tuning_is_told_by_the_number_that_the_run_tracks(
    run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]
):
    assert "auc_20" not in row()
    add(run.tuning, tuning(200, 0.8, 0.7), tuning(400, 0.9125, 0.9))
    assert row()["auc_20"] == "0.912/0.900 at 400"
    add(run.tuning, tuning(500, 0.95, by="follow"))
    assert row()["auc_20"] == "0.950 at 500"
    run.recipe.write_text("tune: {early_stopping: {tracking: acc_10}}\n")
    assert row()["acc_10"] == "0.500 at 500"
    run.recipe.write_text("tune: {early_stopping: {tracking: acc_7}}\n")
    assert row()["acc_10"] == "0.500 at 500"  # the first there is


def test_runs_that_track_other_numbers_say_which(run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]):
    add(run.tuning, tuning(400, 0.9, 0.8))
    other = Run(Path("runs/other"))
    other.directory.mkdir()
    other.recipe.write_text("tune: {early_stopping: {tracking: acc_10}}\n")
    other.metrics.write_text(metrics_line(20_000))
    add(other.tuning, tuning(7_500, 0.9, 0.8))
    assert row()["tuning"] == "auc_20 0.900/0.800 at 400"
    assert row("other")["tuning"] == "acc_10 0.500/0.500 at 7,500"


def test_columns_that_say_nothing_of_any_run_are_left_out(
    run: Run, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    def columns() -> list[str]:
        assert pathfm(["status"]) == 0
        return re.split(r"\s{2,}", capsys.readouterr().out.splitlines()[0].strip())

    assert columns() == [
        "run", "in the queue", "state", "step", "loss", "logged", "samples/s", "ETA", "checkpoint", "starts",
    ]  # fmt: skip
    for file in (run.metrics, run.directory / "jobs.jsonl", run.directory / "exit.json"):
        file.unlink()
    (run.checkpoints / "step_00000400").rmdir()
    assert columns() == ["run", "state", "step", "starts"]


def test_a_table_is_no_wider_than_a_window(run: Run, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]):
    end = datetime.now() + timedelta(hours=3, minutes=10)
    slurm.job("12", EndTime=end.isoformat(timespec="seconds"))
    run.metrics.write_text(metrics_line(1_234_560))
    run.recipe.write_text("optim: {total_steps: 2500000}\n")
    add(run.tuning, tuning(1_220_000, 0.9, 0.8))
    add(run.alarms, alarm(1_220_000, 5))
    (run.checkpoints / "step_01234000").mkdir()
    assert pathfm(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 140
    told = re.split(r"\s{2,}", lines[1].strip())
    assert told[:4] == ["vitb", "running, 3:10 h left", "running", "1.23M / 2.5M (49 %)"]
    assert told[-5:-2] == ["128", "7 days", "0.900/0.800 at 1.22M"]
    assert told[-1] == "data-bound, 5:00 h ago"


def test_steps_in_few_letters():
    steps = (0, 9_999, 10_000, 12_345, 999_499, 999_500, 1_250_000, 12_345_678)
    assert [status._count(number) for number in steps] == [
        "0", "9,999", "10k", "12.3k", "999k", "1M", "1.25M", "12.3M",
    ]  # fmt: skip


def test_only_lines_of_training_tell_how_far_a_run_is(run: Run):
    add(run.metrics, {"step": 2000, "epoch": 8.0, "auc_20": 0.9})
    assert run_progress.progress_of(run).step == 500


def test_only_the_end_of_the_tunings_and_alarms_is_read(run: Run, monkeypatch: pytest.MonkeyPatch):
    add(run.tuning, *(tuning(step, 0.5, 0.4) for step in range(1000)))
    with run.tuning.open("a") as file:
        file.write('{"step": 1000, "teach')
    monkeypatch.setattr(run_progress, "_TAIL_BYTES", 1000)
    assert len(run_progress.last_lines(run.tuning)) < 10
    tuned = run_progress.tuned_of(run, "auc_20")
    assert tuned is not None
    assert (tuned.step, tuned.teacher, tuned.student, tuned.best) == (999, 0.5, 0.4, None)


def test_only_the_end_of_the_metrics_is_read(run: Run, monkeypatch: pytest.MonkeyPatch):
    with run.metrics.open("w") as file:
        file.write("no line of metrics\n" * 1000)
        file.write(metrics_line(700) + metrics_line(710) + '{"step": 720, "tot')
    monkeypatch.setattr(run_progress, "_TAIL_BYTES", 1000)
    assert run_progress.progress_of(run).step == 710


def test_the_total_is_what_the_plan_has(run: Run, row: Callable[..., dict[str, str]]):
    def total(**settings: str) -> int | None:
        text = "\n".join(f"{group}: {values}" for group, values in settings.items())
        run.recipe.write_text(text)
        return run_progress.progress_of(run).total_steps

    assert total(optim="{epochs: 10, total_steps: null}", train="{epoch_length: null}") == 2500
    assert total(optim="{epochs: 2.5}", train="{epoch_length: null}") == 625
    assert total(optim="{epochs: 10}", train="{epoch_length: 40}") == 400
    assert total(optim="{epochs: 10, total_steps: 77}") == 77
    assert total(train="{epoch_length: 40}") is None
    run.metrics.unlink()
    assert total(optim="{epochs: 10}", train="{epoch_length: 40}") == 400
    assert total(optim="{epochs: 10}") is None


def test_the_total_is_the_trainers_own(tmp_path: Path):
    from pathfm.training.plan import plan_training

    for epoch_size in (1_000_003, 7, 64 * 1250):
        recipe = Recipe()
        train = recipe.train.model_copy(update={"global_batch_size": 7})
        plan = plan_training(
            train,
            recipe.optim,
            recipe.teacher,
            recipe.dino.model_copy(update={"koleo_loss_weight": 0.0}),
            1,
            epoch_size,
        )
        run = Run(tmp_path)
        run.recipe.write_text(to_yaml(recipe))
        for step in (1, 3, 10_001):
            run.metrics.write_text(metrics_line(step, epoch=step / plan.epoch_length))
            assert run_progress.progress_of(run).total_steps == plan.total_steps


def test_a_loss_that_is_not_finite_is_told(run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]):
    run.metrics.write_text(metrics_line(500, total_loss=None))
    assert row()["loss"] == "not finite"


@pytest.mark.parametrize(
    "file",
    [
        "exit.json", "recipe.yaml", "metrics.jsonl", "jobs.jsonl", "attempts.jsonl", ".lock", "alarms.jsonl",
        "results/tuning.jsonl",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "content",
    [
        b'{"step": 1, "alarm": "x", "total_loss": [], "teacher": {"a": 1}, "early_stopping": 7}',
        b"",
        b"\xff\xfe\0\x01",
        b"[1, 2]",
        b"7",
        b'{"step": "x", "job": 7',
        b"null",
        b"a: [b",
    ],
)
def test_damaged_files_are_no_obstacle(
    run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]], file: str, content: bytes, capsys: Any
):
    (run.directory / "results").mkdir()
    (run.directory / file).write_bytes(content)
    (run.directory / "provenance.json").write_bytes(content)
    assert row()["run"] == "vitb"
    assert pathfm(["status", "vitb"]) == 0


def test_files_where_folders_belong_and_the_other_way_round_are_no_obstacle(
    run: Run, slurm: FakeSlurm, row: Callable[..., dict[str, str]]
):
    odd = Run(Path("runs/odd"))
    for name in ("exit.json", "recipe.yaml", "metrics.jsonl", "attempts.jsonl", "provenance.json", "wandb_id", ".lock"):
        (odd.directory / name).mkdir(parents=True)
    odd.checkpoints.touch()
    (odd.directory / "logs").touch()
    assert row("odd")["run"] == "odd"
    assert row("vitb")["step"] == "500 / 2,500 (20 %)"
    assert pathfm(["status", "odd"]) == 0


def test_other_folders_below_runs_are_no_runs(run: Run, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]):
    Path("runs/pictures").mkdir()
    Path("runs/notes.txt").touch()
    assert pathfm(["status"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert pathfm(["status", "--runs-dir", "runs/pictures"]) == 0
    assert capsys.readouterr().out.startswith("there are no runs in /")


def test_one_run_is_told_in_full(run: Run, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]):
    slurm.job("13", Restarts="1", EndTime="Unknown")
    note_submission(run.directory, Submission("13", "2026-11-27T12:00:00+00:00", 2, 4, follows="12"))
    note_outcome(
        run.directory, Outcome("12", 0, "12", 75, 400, "requeue", was_crash=False, reason="the time limit came")
    )
    begin(run, "13.1", nodes="n[3-4]")
    exit_json(run, "failed", "13", 1, reason="ValueError: no tile\nof cohort a")
    run.exports.mkdir()
    (run.exports / "teacher_00000400.safetensors").touch()
    (run.directory / "wandb_id").write_text("abc123")
    run.recipe.write_text("optim: {epochs: 10}\nwandb: {username: lab, project: tiles}\n")
    assert pathfm(["status", "vitb"]) == 0
    told = capsys.readouterr().out
    assert "  job         13: running on n[1-2]\n" in told
    assert "  state       crashed, tried again: ValueError: no tile\n              of cohort a\n" in told
    assert "2 steps/s, 128 samples/s, 17 min of steps to go" in told
    assert re.search(r"submitted   job 12, 2026-11-2\d \d\d:\d\d, 2 x 4 tasks\n +job 13, .*, follows 12\n", told)
    assert "teacher_00000400.safetensors" in told
    assert "https://wandb.ai/lab/tiles/runs/abc123" in told
    attempts = [line.split() for line in told.splitlines()[-2:]]
    assert attempts[0][:2] == ["12.0", "n[1-2]"]
    assert attempts[0][-6:] == ["requeue", "400", "the", "time", "limit", "came"]
    assert attempts[1][:3] == ["13.1", "n[3-4]", "-"]


def test_one_run_is_told_with_its_tuning_alarms_and_the_crash_that_it_outlived(
    run: Run, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    slurm.job("12", Restarts="1", EndTime="Unknown")
    exit_json(run, "running", "12", 1)
    reason = "a crash (status 1): ValueError: no tile\nof cohort a"
    note_outcome(run.directory, Outcome("12", 0, "12", 1, 400, "requeue", was_crash=True, reason=reason))
    stopping = {"metric": "auc_20", "best": 0.915, "best_step": 300, "without_improvement": 3, "patience": 20}
    add(run.tuning, tuning(400, 0.912, 0.903, early_stopping=stopping))
    add(run.alarms, *(alarm(step, 24 - step / 100) for step in (100, 200, 300, 400)))
    assert pathfm(["status", "vitb"]) == 0
    told = capsys.readouterr().out
    assert "  tuning      auc_20: teacher 0.9120, student 0.9030, at step 400, 100 steps ago\n" in told
    assert "              best: 0.9150, at step 300; patience for 17 of 20 tunings left\n" in told
    assert re.search(
        r"  last error  \d{4}-\d\d-\d\d \d\d:\d\d, attempt 12.0: a crash .*: no tile\n {14}of cohort a\n", told
    )
    alarms = re.findall(r"\d{4}-\d\d-\d\d \d\d:\d\d, step (\d+), data-bound: (.*)\n", told)
    assert alarms == [("200", ALARM), ("300", ALARM), ("400", ALARM)]


def test_a_run_that_never_stops_early_says_how_long_it_has_not_improved(
    run: Run, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
):
    found = {"metric": "auc_20", "best": 0.915, "best_step": 300, "without_improvement": 3, "patience": None}
    add(run.tuning, tuning(400, 0.912, 0.903, early_stopping=found))
    assert pathfm(["status", "vitb"]) == 0
    assert "best: 0.9150, at step 300; 3 tunings since without an improvement\n" in capsys.readouterr().out


def test_watching_looks_again_until_ctrl_c(run: Run, slurm: FakeSlurm, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    looks = []

    def page(*asked: object) -> str:
        looks.append(asked)
        if len(looks) > 3:
            raise KeyboardInterrupt
        return f"look {len(looks)}"

    monkeypatch.setattr(status, "_page", page)
    monkeypatch.setattr(status, "_SECONDS_BETWEEN_LOOKS", 0.0)
    assert pathfm(["status", "--watch"]) == 0
    assert re.findall(r"look \d", capsys.readouterr().out) == ["look 1", "look 2", "look 3"]


def test_nothing_is_changed_and_torch_is_not_needed(run: Run, slurm: FakeSlurm):
    def everything() -> dict[Path, tuple[int, bytes]]:
        found = [run.directory, *run.directory.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in found}

    before = everything()
    code = "import sys; from pathfm.__main__ import main; sys.exit(main(['status', 'vitb']) or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
    assert everything() == before
