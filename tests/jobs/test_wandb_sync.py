import os
import re
import subprocess
import sys
from pathlib import Path

from pathfm.__main__ import main
from pathfm.config import to_yaml
from pathfm.recipe import Recipe
from pathfm.track.wandb_mirror.mirror import only_mirror
from pathfm.track.weights_and_biases import start_wandb
from tests.track.runs_to_show import BATCH, OFFLINE, RunToShow
from tests.track.wandb_server import WandbServer


def a_run(folder: Path, name: str = "run", **wandb) -> RunToShow:
    run = RunToShow(folder / name)
    recipe = Recipe.model_validate({"train": {"global_batch_size": BATCH}, "wandb": wandb})
    (run.directory / "recipe.yaml").write_text(to_yaml(recipe))
    run.steps(1, 21)
    run.tuning(10)
    run.picture("tokens_00000010.png")
    return run


def synced(server: WandbServer, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, **server.environment, "WANDB_MODE": "offline"}  # as on a node without internet
    command = [sys.executable, "-m", "pathfm", "wandb-sync", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def test_offline_runs_come_to_the_server_whole_and_again_sends_nothing(tmp_path: Path):
    first, second = a_run(tmp_path, "first"), a_run(tmp_path, "second", enable=True)
    recipe = {"train": {"global_batch_size": BATCH}}
    start_wandb(Recipe().wandb, first.directory, recipe, OFFLINE).finish()
    with WandbServer() as server:
        done = synced(server, str(first.directory), str(second.directory))
        assert done.returncode == 0, done.stderr
        assert re.findall(r"(\w+): 20 rows were missing and are sent", done.stdout) == ["first", "second"]
        for run in (first, second):
            kept = server.runs[(run.directory / "wandb_id").read_text()]
            assert kept.steps() == list(range(1, 21))
            assert kept.rows()[9]["tune/teacher.acc_20"] == 0.5
            assert kept.config["optim"]["value"]["base_lr"] == Recipe().optim.base_lr
        again = synced(server, str(first.directory))
        assert "first: 0 rows were missing" in again.stdout
        first.steps(21, 23)
        assert "first: 2 rows were missing" in synced(server, str(first.directory)).stdout
        assert server.runs[(first.directory / "wandb_id").read_text()].steps() == list(range(1, 23))


def test_a_server_that_refuses_is_told_in_one_line(tmp_path: Path):
    run = a_run(tmp_path, enable=True)
    with WandbServer("forbids") as server:
        done = synced(server, str(run.directory))
    assert done.returncode == 2
    assert "error: W&B did not take run run (" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_was_never_shown_needs_a_project(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run = a_run(tmp_path)
    assert main(["wandb-sync", str(run.directory)]) == 2
    assert "run run was not shown to W&B so far; name the project by --project" in capsys.readouterr().err


def test_without_a_key_one_line_says_how_to_get_one(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run = a_run(tmp_path)
    assert main(["wandb-sync", str(run.directory), "--project", "tiles"]) == 2
    assert "set WANDB_API_KEY, or run 'wandb login'" in capsys.readouterr().err
    assert not (run.directory / "wandb").exists()


def test_a_run_that_is_being_shown_is_left_to_its_own_mirror(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    run = a_run(tmp_path, enable=True)
    with only_mirror(run.directory):
        assert main(["wandb-sync", str(run.directory)]) == 2
    assert "is being shown to W&B by another process" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_told(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert main(["wandb-sync", str(tmp_path)]) == 2
    assert "has no recipe.yaml" in capsys.readouterr().err
