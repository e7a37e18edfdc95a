"""`launchers/evaluate.py --follow`: tuning in a job of its own, beside the one that trains."""

import shlex
from pathlib import Path

import pytest

from pathfm.config import to_yaml
from pathfm.errors import UserError
from pathfm.jobs.submit_evaluation import main
from pathfm.launch.attempts import submissions
from pathfm.recipe import read_recipe
from tests.labelled import make_labelled, tuning_settings

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture
def place(tmp_path: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was begun, and a Slurm that takes everything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "vits").mkdir(parents=True)
    write_recipe(tmp_path, *tuning_settings(labelled), "tune.online=false")
    (tmp_path / "bin").mkdir()
    for name, script in {"sbatch": "echo Submitted batch job 12", "srun": "", "scontrol": "exit 1"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def write_recipe(place: Path, *settings: str) -> None:
    recipe = read_recipe(None, ["crops.local_crops_size=112", "student.patch_size=14", *settings]).recipe
    (place / "runs" / "vits" / "recipe.yaml").write_text(to_yaml(recipe))


def test_a_dry_run_shows_one_job_that_follows_the_run(place: Path, capsys: Capture) -> None:
    assert main(["--follow", "vits", "--gpus-per-node", "1", "--dry-run", "tune.knn.batch_size=64"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# srun ")]
    command = shlex.split(line.removeprefix("# "))
    expected = ["evaluate", "--follow", f"{place}/runs/vits", "tune.knn.batch_size=64"]
    assert command[command.index("evaluate") :] == expected


def test_its_jobs_are_kept_apart_from_the_runs_own(place: Path, capsys: Capture) -> None:
    assert main(["--follow", "vits"]) == 0
    assert "submitted job 12: run vits-following" in capsys.readouterr().out
    (submission,) = submissions(place / "runs" / "vits" / "following")
    assert submission.job == "12"
    assert not (place / "runs" / "vits" / "jobs.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--follow", "vitx"], "there is no run 'vitx'.*did you mean 'vits'"),
        (["--follow", "vits", "tune.knn.nb_knn=[500]"], r"every k of tune.knn.nb_knn=\[500\] exceeds the 36"),
        (["--follow", "vits", "tune.test_dataset_path=KNN:root=/nowhere:split=test"], "nowhere"),
        (["--follow", "vits", "tune.tune_evry=1"], "no key 'tune.tune_evry'"),
        (["--follow", "vits", "--cluster", "local", "--nodes", "2"], "--nodes is for --cluster slurm"),
    ],
)
def test_what_can_be_known_to_be_wrong_is_said_before_the_queue(place: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(words)


def test_a_run_that_has_nothing_to_tune_on_is_refused(place: Path) -> None:
    write_recipe(place)
    with pytest.raises(UserError, match="run vits has nothing to tune on; add tune"):
        main(["--follow", "vits"])
