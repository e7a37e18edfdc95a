import os
import signal
import time
from pathlib import Path

import pytest

from pathfm.track.config import WandbConfig
from pathfm.track.wandb_mirror.wandb_run import run_id
from pathfm.track.weights_and_biases import start_wandb, wandb_mode
from tests.jobs.journeys import wait_until
from tests.track.runs_to_show import OFFLINE, RECIPE, RunToShow, key_free, offline_folders


@pytest.mark.parametrize(
    ("environment", "config", "mode"),
    [
        ({}, WandbConfig(), "disabled"),
        ({}, WandbConfig(enable=True), "online"),
        ({}, WandbConfig(enable=True, mode="offline"), "offline"),
        ({"WANDB_MODE": "offline"}, WandbConfig(), "offline"),
        ({"WANDB_MODE": "disabled"}, WandbConfig(enable=True), "disabled"),
    ],
)
def test_the_environment_wins_over_the_recipe(environment, config, mode):
    assert wandb_mode(config, environment) == mode


def test_a_run_keeps_its_id_for_ever(tmp_path: Path):
    first = run_id(WandbConfig(), tmp_path)
    assert run_id(WandbConfig(), tmp_path) == first
    assert run_id(WandbConfig(resume_id="abc"), tmp_path) == "abc"


def test_where_it_is_not_wanted_nothing_is_started_or_written(tmp_path: Path):
    wandb = start_wandb(WandbConfig(), tmp_path, RECIPE, key_free(os.environ))
    wandb.nudge()
    wandb.finish()
    assert not list(tmp_path.iterdir())


def test_without_a_key_online_becomes_offline_and_nobody_is_asked(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    RunToShow(tmp_path).steps(1, 2)
    start_wandb(WandbConfig(enable=True), tmp_path, {}, key_free(os.environ)).finish()
    assert "has no key here" in caplog.text
    assert len(offline_folders(tmp_path)) == 1


def test_a_mirror_that_hangs_costs_the_end_its_deadline_and_every_step_nothing(tmp_path: Path, caplog):
    wandb = start_wandb(WandbConfig(finish_within_s=0.5), tmp_path, RECIPE, OFFLINE)
    os.kill(wandb._mirror.pid, signal.SIGSTOP)
    started = time.monotonic()
    for _ in range(1_200_000):  # more than the pipe holds
        wandb.nudge()
        if time.monotonic() - started > 20:
            pytest.fail("a full pipe is waited for")
    pid, started = wandb._mirror.pid, time.monotonic()
    wandb.finish()
    assert 0.4 < time.monotonic() - started < 3
    assert not Path(f"/proc/{pid}").exists()
    assert "not told everything" in caplog.text


def test_a_mirror_that_died_is_no_reason_to_stop(tmp_path: Path, caplog):
    wandb = start_wandb(WandbConfig(), tmp_path, RECIPE, OFFLINE)
    os.kill(wandb._mirror.pid, signal.SIGKILL)
    wandb._mirror.wait()
    wandb.nudge()
    wandb.finish()
    wandb.finish()
    assert caplog.text.count("not told everything") == 1


def test_a_mirror_that_cannot_be_started_is_told_in_one_line(tmp_path: Path, caplog):
    (tmp_path / "wandb").write_text("a file where a folder is to be")
    wandb = start_wandb(WandbConfig(), tmp_path, RECIPE, OFFLINE)
    wandb.nudge()
    wandb.finish()
    assert "W&B could not be started" in caplog.text


def test_the_key_is_in_no_file_and_on_no_command_line(tmp_path: Path, monkeypatch):
    key = "0123456789abcdef0123456789abcdef01234567"
    run = RunToShow(tmp_path / "run")
    wandb = start_wandb(WandbConfig(), run.directory, RECIPE, {**OFFLINE, "WANDB_API_KEY": key, "HOME": str(tmp_path)})
    run.steps(1, 5)
    sent = run.directory / "wandb" / "sent.jsonl"
    wait_until(lambda: sent.exists() and '"metrics": 4' in sent.read_text())
    command_lines = [line.read_bytes() for line in Path("/proc").glob("[0-9]*/cmdline") if _is_readable(line)]
    wandb.finish()
    assert any(b"pathfm.track.wandb_mirror" in line for line in command_lines)
    assert any(b"wandb-core" in line for line in command_lines)
    assert not [line for line in command_lines if key.encode() in line]
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in written)
    assert not [file for file in written if key.encode() in file.read_bytes()]


def _is_readable(file: Path) -> bool:
    try:
        file.read_bytes()
    except OSError:
        return False
    return True
