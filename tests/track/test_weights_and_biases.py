import sys
from pathlib import Path

import pytest

from pathfm.track.config import WandbConfig
from pathfm.track.weights_and_biases import WeightsAndBiases, run_id, start_wandb, wandb_mode
from tests.jobs.journeys import wait_until


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


def test_the_real_client_writes_offline_files(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb = start_wandb(WandbConfig(), tmp_path, {"optim": {"base_lr": 1}}, {"WANDB_MODE": "offline"})
    wandb.log({"step": 1, "total_loss": 2.5, "timing": {"seconds_per_step": 1.0}, "koleo_loss": None})
    wandb.finish()
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert run_id(WandbConfig(), tmp_path) in written.name
    # The client's own process writes the file, and is told to end without being waited for.
    wait_until(lambda: b"timing/seconds_per_step" in written.read_bytes())
    assert b"total_loss" in written.read_bytes()


def test_without_a_key_online_becomes_offline_and_nobody_is_asked(tmp_path: Path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    wandb = start_wandb(WandbConfig(enable=True), tmp_path, {}, {})
    wandb.finish()
    assert "has no key here" in caplog.text
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_client_that_dies_is_no_reason_to_stop(caplog):
    class Dying:
        def log(self, values, step):
            raise BrokenPipeError("wandb-core is gone")

    wandb = WeightsAndBiases(Dying())
    wandb.log({"step": 1})
    wandb.log({"step": 2})
    wandb.finish()
    assert caplog.text.count("wandb-core is gone") == 1
