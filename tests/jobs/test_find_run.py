"""A run is meant by its directory, or by its name below runs/."""

import subprocess
import sys
from pathlib import Path

import pytest

from pathfm.errors import UserError
from pathfm.jobs.find_run import all_runs, find_run


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, mark in {"vitb": "recipe.yaml", "vitl": "exit.json", "queued": "jobs.jsonl"}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / mark).touch()
    (tmp_path / "runs" / "pictures").mkdir()
    (tmp_path / "runs" / "notes.txt").touch()
    return tmp_path / "runs"


def test_a_name_and_a_directory_mean_the_same_run(runs: Path):
    for name in ("vitb", "runs/vitb", "runs/vitb/", str(runs / "vitb"), "./runs/../runs/vitb"):
        assert find_run(name).directory.resolve() == runs / "vitb"


def test_a_folder_of_something_else_gives_way_to_a_run_of_its_name(runs: Path):
    (runs.parent / "vitb").mkdir()
    assert find_run("vitb").directory == Path("runs/vitb")
    (runs.parent / "vitb" / "recipe.yaml").touch()
    assert find_run("vitb").directory == Path("vitb")


def test_runs_may_lie_elsewhere(runs: Path):
    runs.rename(runs.parent / "study")
    assert find_run("vitb", Path("study")).directory == Path("study/vitb")
    assert [run.name for run in all_runs(Path("study"))] == ["queued", "vitb", "vitl"]


def test_a_run_that_is_not_there_is_one_line_with_the_nearest_name(runs: Path):
    with pytest.raises(UserError, match=r"there is no run 'vitb1', here or in .*/runs; did you mean 'vitb'\?"):
        find_run("vitb1")
    with pytest.raises(UserError, match="give a run's directory, or its name in runs/"):
        find_run("something else")


def test_without_a_runs_directory_there_is_something_to_do(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no directory .*; go to where runs/ lies, or name it by --runs-dir"):
        all_runs(tmp_path / "runs")


@pytest.mark.parametrize("module", ["find_run", "slurm_jobs", "run_progress"])
def test_a_login_node_needs_no_torch(module: str):
    code = f"import sys, pathfm.jobs.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
