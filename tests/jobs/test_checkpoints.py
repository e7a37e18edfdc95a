"""What a person is told about the checkpoints of a run."""

import os
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
import torch

from pathfm.__main__ import main as pathfm
from pathfm.checkpoint.config import CheckpointConfig
from pathfm.checkpoint.manifest import MANIFEST
from pathfm.checkpoint.saver import Saver, Snapshot
from pathfm.checkpoint.store import Store
from pathfm.config import to_yaml
from pathfm.jobs import checkpoints
from pathfm.lifecycle.run import Run
from pathfm.recipe import Recipe

STEPS = (500, 1000, 1500, 2000)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run with four whole checkpoints, of which every 500th step and the last two stay, and 1,000 is the best."""
    begun = Run(tmp_path / "runs" / "vitb")
    retention = CheckpointConfig(keep_last=2, keep_every_steps=500)
    store = Store(begun.checkpoints, retention)
    saver = Saver(store)
    for step in STEPS:
        saver.start(Snapshot(step, {"w": torch.full((1000,), float(step)), "n": torch.tensor(step)}, {}))
    assert saver.wait()
    assert [outcome.error for outcome in saver.outcomes()] == [None] * len(STEPS)
    store.mark_best(1000, {"metric": "acc_20", "value": 0.9})
    begun.recipe.write_text(to_yaml(Recipe(checkpoint=retention)))
    return begun


class Said:
    """What the command printed, and how it ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status = status
        self.error = err
        self.lines = out.splitlines()

    def row(self, step: int) -> str:
        (row,) = [line for line in self.lines if line.split()[0] == f"{step:,}"]
        return row


@pytest.fixture
def ask(capsys) -> Callable[..., Said]:
    def asked(run: Run | str, *options: str) -> Said:
        name = str(run.directory) if isinstance(run, Run) else run
        status = pathfm(["checkpoints", name, *options])
        return Said(status, *capsys.readouterr())

    return asked


def folder_of(run: Run, step: int) -> Path:
    return run.checkpoints / f"step_{step:08d}"


def flip_a_byte(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(bytes(content))


DAMAGES = {
    "__0_0.distcp differs from its checksum": flip_a_byte,
    "__0_0.distcp has 20 bytes, its manifest says": lambda folder: os.truncate(folder / "__0_0.distcp", 20),
    "__0_0.distcp is missing": lambda folder: (folder / "__0_0.distcp").unlink(),
    ".metadata is missing": lambda folder: (folder / ".metadata").unlink(),
    "manifest.json is missing": lambda folder: (folder / MANIFEST).unlink(),
    "manifest.json is not readable": lambda folder: (folder / MANIFEST).write_text('{"format"'),
}


def test_whole_checkpoints_are_a_table_with_the_newest_last(run, ask):
    os.utime(folder_of(run, 500) / MANIFEST, (1_700_000_000, 1_700_000_000))
    said = ask(run)
    assert said.status == 0
    assert said.error == ""
    assert said.lines[0].split() == ["step", "written", "size", "ranks", "whole?", "stays", "because"]
    assert [line.split()[0] for line in said.lines[1:-1]] == ["500", "1,000", "1,500", "2,000"]
    local_time = f"{datetime.fromtimestamp(1_700_000_000):%Y-%m-%d %H:%M}"
    assert said.row(500).split() == ["500", *local_time.split(), "8.2", "kB", "1", "whole", "every", "500", "steps"]
    assert said.row(1000).endswith("  whole   every 500 steps, best")
    assert said.row(2000).endswith("  whole   one of the last 2, every 500 steps")
    assert said.lines[-1] == "a start of run vitb goes on from step 2,000"


@pytest.mark.parametrize("reason", DAMAGES)
def test_a_damage_is_named_and_the_checkpoint_before_is_what_a_start_goes_on_from(run, ask, reason):
    DAMAGES[reason](folder_of(run, 2000))
    said = ask(run)
    assert said.status == 1
    assert f"  NO: {reason}" in said.row(2000)
    assert all("  whole  " in said.row(step) for step in STEPS[:-1])
    assert said.lines[-1] == "a start of run vitb goes on from step 1,500, and sets 1 newer aside"


def test_a_damage_in_the_middle_changes_the_status_but_not_what_a_start_goes_on_from(run, ask):
    flip_a_byte(folder_of(run, 1000))
    said = ask(run)
    assert said.status == 1
    assert said.lines[-1] == "a start of run vitb goes on from step 2,000"


def test_all_damages_of_one_checkpoint_are_told(run, ask):
    flip_a_byte(folder_of(run, 500))
    (folder_of(run, 500) / ".metadata").unlink()
    assert "NO: .metadata is missing, __0_0.distcp differs from its checksum" in ask(run).row(500)


def test_a_run_without_a_whole_checkpoint_would_not_start(run, ask):
    for step in STEPS:
        flip_a_byte(folder_of(run, step))
    said = ask(run)
    assert said.status == 1
    assert said.lines[-1].startswith("a start of run vitb stops: none of its checkpoints is whole; restore one")


def test_without_verifying_only_manifests_are_read(run, ask):
    flip_a_byte(folder_of(run, 2000))
    said = ask(run, "--no-verify")
    assert said.status == 0
    assert "  not verified  " in said.row(2000)
    assert said.lines[-1] == "a start of run vitb goes on from step 2,000, if its files are whole"
    (folder_of(run, 2000) / MANIFEST).unlink()
    said = ask(run, "--no-verify")
    assert said.status == 1
    assert "NO: manifest.json is missing" in said.row(2000)


def test_folders_that_are_not_published_are_counted(run, ask):
    (run.checkpoints / "step_00002500.passed_over").mkdir()
    (run.checkpoints / "step_00003000.passed_over").mkdir()
    (run.checkpoints / ".step_00002500.node7.1234.partial").mkdir()
    said = ask(run)
    assert said.status == 0
    assert said.lines[-3].startswith("  2 more set aside by a run that went back")
    assert said.lines[-2].startswith("  1 more being written now, or left by a process that ended")
    assert said.lines[-1] == "a start of run vitb goes on from step 2,000"


def test_nothing_on_disk_is_changed(run, ask):
    def everything() -> dict[Path, tuple[int, bytes]]:
        found = [run.directory, *run.directory.rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in found}

    (run.checkpoints / ".step_00002500.node7.1234.partial").mkdir()
    flip_a_byte(folder_of(run, 2000))
    before = everything()
    ask(run)
    assert everything() == before


def test_a_checkpoint_that_training_removes_meanwhile_is_no_damage(run, ask, monkeypatch):
    def removed_before(path: Path, *rest):
        if path == folder_of(run, 500):
            shutil.rmtree(path)
        return checkpoints_damages(path, *rest)

    checkpoints_damages = checkpoints.damages
    monkeypatch.setattr(checkpoints, "damages", removed_before)
    said = ask(run)
    assert said.status == 0
    assert [line.split()[0] for line in said.lines[1:-1]] == ["1,000", "1,500", "2,000"]


def test_a_finished_run_is_told_as_such(run, ask):
    run.write_exit("done", 2000)
    assert ask(run).lines[-1] == "run vitb is finished: a start has nothing to do"
    run.write_exit("interrupted", 2000)
    assert ask(run).lines[-1] == "a start of run vitb goes on from step 2,000"


@pytest.mark.parametrize("mistake", ["missing", "no recipe: at all", "train: [", "closed"])
def test_a_recipe_that_cannot_be_read_leaves_the_defaults_and_a_note(run, ask, mistake, monkeypatch):
    if mistake == "missing":
        run.recipe.unlink()
    elif mistake == "closed":
        monkeypatch.setattr(checkpoints, "read_layer", refuse)
    else:
        run.recipe.write_text(mistake)
    said = ask(run)
    assert said.status == 0
    assert said.row(2000).endswith("one of the last 3")
    assert said.row(500).endswith("  -")
    (note,) = said.error.splitlines()
    assert note.startswith("note: why checkpoints stay is told by the default settings, as ")


def refuse(path: Path) -> None:
    raise PermissionError(f"Permission denied: {path}")


def test_a_run_is_found_by_its_name_in_runs(run, ask, monkeypatch):
    monkeypatch.chdir(run.directory.parents[1])
    assert ask("vitb").lines == ask("runs/vitb").lines == ask(run).lines
    Path("vitb").mkdir()  # something else
    assert ask("vitb").lines == ask(run).lines


def test_a_run_that_is_not_there_is_one_line_with_the_nearest_name(run, ask, monkeypatch):
    monkeypatch.chdir(run.directory.parents[1])
    said = ask("vitb1")
    assert (said.status, said.lines) == (2, [])
    assert said.error.startswith("error: there is no run 'vitb1', here or in ")
    assert said.error.endswith("/runs; did you mean 'vitb'?\n")
    said = ask("something else")
    assert said.error.endswith("/runs; give a run's directory, or its name in runs/\n")


@pytest.mark.parametrize("directory", ["checkpoints", "nothing"])
def test_a_run_without_checkpoints_is_one_line(tmp_path, ask, directory):
    begun = Run(tmp_path / "begun")
    (begun.directory / directory).mkdir(parents=True)
    begun.recipe.write_text(to_yaml(Recipe()))
    said = ask(begun)
    assert (said.status, said.lines) == (2, [])
    assert said.error == (
        f"error: run begun has no checkpoints in {begun.checkpoints}; it has not come to its first one\n"
    )
