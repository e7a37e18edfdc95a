import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from pathfm.track.config import WandbConfig
from pathfm.track.wandb_mirror.mirror import Mirror, gone_back_to, only_mirror
from pathfm.track.wandb_mirror.processes import end_children
from pathfm.track.weights_and_biases import WeightsAndBiases, start_wandb
from tests.jobs.journeys import wait_until
from tests.track.runs_to_show import (
    OFFLINE,
    RECIPE,
    RunToShow,
    metrics_line,
    numbers_of,
    offline_config,
    offline_folders,
    offline_rows,
    records,
    show,
)


def start(run: RunToShow, **settings) -> WeightsAndBiases:
    return start_wandb(WandbConfig(**settings), run.directory, RECIPE, OFFLINE)


def test_a_segment_is_shown_row_by_row_over_the_samples_seen(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    (run.directory / "provenance.json").write_text('[{"commit": "abc", "diff": "+ a line"}]')
    wandb = start(run)
    run.steps(1, 4)
    wandb.nudge()
    run.steps(4, 6)
    wandb.finish()
    rows = offline_rows(run.directory)
    assert [(row["_step"], row["step"], row["samples_seen"]) for row in rows] == [(n, n, 4 * n) for n in range(1, 6)]
    assert rows[1]["total_loss"] == 0.5
    assert rows[1]["timing/seconds_per_step"] == 0.5
    assert "koleo_loss" not in rows[1]  # null: there was none
    defined = {metric.name or metric.glob_name: metric.step_metric for metric in records(run.directory, "metric")}
    assert defined == {"step": "", "samples_seen": "", "*": "samples_seen"}
    assert offline_config(run.directory) == {**RECIPE, "provenance": [{"commit": "abc"}]}


def test_three_segments_one_of_them_killed_are_one_run_with_every_step_once(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    first = start(run)
    run.steps(1, 20)
    first.finish()
    # A trainer that is killed takes nothing along: the pipe ends, and the mirror sends what there is.
    pid = os.fork()
    if pid == 0:
        start(run)
        run.steps(20, 30)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_until(lambda: '"metrics": 29' in (run.directory / "wandb" / "sent.jsonl").read_text())
    run.metrics.forget_after(25)  # as a start does, and then the steps come again
    third = start(run)
    run.steps(26, 41)
    third.finish()
    assert len(offline_folders(run.directory)) == 3
    assert sorted(numbers_of(offline_rows(run.directory))) == list(range(1, 41))
    assert {record.run_id for record in records(run.directory, "run")} == {(run.directory / "wandb_id").read_text()}


def test_what_a_killed_mirror_had_not_written_is_sent_by_the_next(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    wandb = start(run)
    run.steps(1, 31)
    sent = run.directory / "wandb" / "sent.jsonl"
    wait_until(lambda: sent.is_file() and '"metrics": 30' in sent.read_text())
    os.kill(wandb._mirror.pid, signal.SIGKILL)  # the client keeps rows in memory for seconds: these are gone
    wandb.finish()
    again = start(run)
    run.steps(31, 41)
    again.finish()
    assert sorted(numbers_of(offline_rows(run.directory))) == list(range(1, 41))


def test_a_tuning_and_a_picture_share_the_row_of_their_step_and_late_ones_get_their_own(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    run.steps(10, 31, every=10)
    run.tuning(20)
    run.picture("tokens_00000020.png")
    show(run)
    run.tuning(10, by="follow")
    run.picture("tokens_00000010.png", grey=9)
    run.steps(40, 51, every=10)
    show(run)
    rows = {row["_step"]: row for row in offline_rows(run.directory)}
    assert sorted(rows) == [10, 20, 30, 31, 40, 50]
    tuned = {"tune/teacher.acc_20": 0.5, "tune/teacher.acc_20_low": 0.4, "tune/teacher.acc_20_high": 0.6}
    assert rows[20] | tuned | {"tune/student.auc_20": 0.7} == rows[20]
    assert rows[20]["total_loss"] == 1 / 20
    assert rows[20]["previews/tokens/_type"] == "image-file"
    assert rows[31]["samples_seen"] == 40  # where it belongs on the x axis
    assert rows[31] | tuned == rows[31]
    assert "total_loss" not in rows[31]
    assert rows[31]["previews/tokens/_type"] == "image-file"


def test_late_rows_between_all_steps_push_no_metrics_out(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    for step in range(1, 4):
        run.steps(step, step + 1)
        show(run)
        run.tuning(step)  # after the metrics of its step were sent
    show(run)
    rows = offline_rows(run.directory)
    assert [row["samples_seen"] for row in rows if "total_loss" in row] == [4, 8, 12]
    assert [row["samples_seen"] for row in rows if "tune/teacher.acc_20" in row] == [4, 8, 12]
    assert numbers_of(rows) == sorted(set(numbers_of(rows)))


def test_pictures_and_alarms_are_shown_once_however_often_the_run_starts(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    run.picture("crops.png")
    run.steps(1, 3)
    run.alarm(2, "collapse")
    show(run)
    run.picture("losses.png", grey=1)
    run.alarm(2, "data-bound", "2026-01-01T00:10:00+00:00")
    show(run)
    run.picture("losses.png", grey=2)
    show(run)
    rows = offline_rows(run.directory)
    assert sum("previews/crops/_type" in row for row in rows) == 1
    assert sum("previews/losses/_type" in row for row in rows) == 2
    alerts = [(alert.title, alert.text, alert.level) for alert in records(run.directory, "alert")]
    assert alerts == [
        ("run: collapse", "step 2: of step 2", "ERROR"),
        ("run: data-bound", "step 2: of step 2", "WARN"),
    ]


def test_exports_become_references_once_when_that_is_wanted(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    run.steps(1, 3)
    run.exports("00000002")
    show(run)
    assert not records(run.directory, "artifact")
    for _ in range(2):
        show(run, log_teacher=True)
    (artifact,) = records(run.directory, "artifact")
    assert artifact.type == "model"
    assert "00000002" in artifact.aliases
    references = {entry.path: entry.ref for entry in artifact.manifest.contents}
    folder = (run.directory / "exports").as_uri()
    assert references == {name: f"{folder}/{name}" for name in ("teacher_00000002.pth", "teacher_00000002.safetensors")}


def test_a_run_that_went_back_is_noticed_by_the_batches_it_leaves_out():
    before = [metrics_line(step) for step in (10, 20, 30)]
    after = [metrics_line(step, left_out=7) for step in (30, 40)]
    assert gone_back_to(before, -1, sent_to=40, sent_left_out=0) is None
    assert gone_back_to([*before[:2], *after], -1, sent_to=40, sent_left_out=0) == 20
    assert gone_back_to(after, 20, sent_to=40, sent_left_out=0) == 20  # the lines before were looked at earlier
    assert gone_back_to(after, 20, sent_to=40, sent_left_out=7) is None  # known
    assert gone_back_to(after, 20, sent_to=20, sent_left_out=0) is None  # nothing of what is void was sent
    assert gone_back_to(after, 20, sent_to=40, sent_left_out=None) is None


def test_offline_files_keep_what_they_have_after_a_run_went_back(tmp_path: Path, caplog):
    run = RunToShow(tmp_path / "run")
    run.steps(1, 11)
    show(run)
    run.metrics.forget_after(5)
    run.steps(6, 16, left_out=3)
    for _ in range(2):
        show(run)
    rows = offline_rows(run.directory)
    assert numbers_of(rows) == list(range(1, 16))
    assert [row["batches_passed_over"] for row in rows] == [0] * 10 + [3] * 5
    assert caplog.text.count("went back to step 5") == 1


def test_the_second_mirror_of_a_run_waits_for_the_first(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    run.steps(1, 5)
    with only_mirror(run.directory) as alone:
        assert alone
        wandb = start(run)
        time.sleep(0.5)
        with only_mirror(run.directory) as another:
            assert not another
        assert not offline_folders(run.directory)
    wait_until(lambda: bool(offline_folders(run.directory)))
    wandb.finish()
    assert numbers_of(offline_rows(run.directory)) == [1, 2, 3, 4]


def a_mirror_whose_client_dies(directory: Path) -> None:
    run = RunToShow(directory)
    mirror = Mirror(directory, "offline", WandbConfig(), RECIPE)
    run.steps(1, 5)
    mirror.look()
    end_children()
    run.steps(5, 9)
    time.sleep(1)  # in which the client hears of it
    with pytest.raises(OSError, match=r"."):
        mirror.look()
    mirror.abandon()
    mirror.look()
    mirror.finish()


def test_a_client_that_dies_is_started_anew_and_nothing_is_missing(tmp_path: Path):
    mirror = get_context("spawn").Process(target=a_mirror_whose_client_dies, args=(tmp_path / "run",))
    mirror.start()
    mirror.join()
    assert mirror.exitcode == 0
    assert sorted(numbers_of(offline_rows(tmp_path / "run"))) == list(range(1, 9))


def test_what_tells_a_trainer_to_leave_does_not_end_its_mirror(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    wandb = start(run)
    for told in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # before it has imported anything
        os.kill(wandb._mirror.pid, told)
    run.steps(1, 3)
    wandb.finish()
    assert numbers_of(offline_rows(run.directory)) == [1, 2]


def test_a_mirror_shows_nothing_of_the_run_that_began_anew_in_its_place(tmp_path: Path):
    run = RunToShow(tmp_path / "run")
    wandb = start(run)
    run.steps(1, 3)
    sent = run.directory / "wandb" / "sent.jsonl"
    wait_until(lambda: sent.is_file() and '"metrics": 2' in sent.read_text())
    (run.directory / "wandb").rename(tmp_path / "earlier")  # as --no-resume does
    (run.directory / "wandb").mkdir()
    run.steps(3, 5)
    wandb.finish()
    assert not sent.exists()
    assert '"metrics": 4' not in (tmp_path / "earlier" / "sent.jsonl").read_text()
