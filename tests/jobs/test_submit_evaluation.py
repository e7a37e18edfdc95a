"""`launchers/evaluate.py`: backbones judged on a cluster, an array where there are several."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pathfm.errors import UserError
from pathfm.jobs.submit_evaluation import main
from pathfm.launch.attempts import submissions

LAUNCHER = Path(__file__).parents[2] / "launchers" / "evaluate.py"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Labelled tiles, a run that exported two teachers, and a Slurm that takes everything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "labels.csv").write_text("filename,slide\n")
    exports = tmp_path / "runs" / "vits" / "exports"
    exports.mkdir(parents=True)
    (exports.parent / "recipe.yaml").write_text("{}\n")
    for step in (100, 200):
        (exports / f"teacher_{step:08d}.safetensors").touch()
    (tmp_path / "bin").mkdir()
    for name, script in {"sbatch": "echo Submitted batch job 12", "srun": "", "scontrol": "exit 1"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def words(*more: str, weights: tuple[str, ...] = ("vits",)) -> list[str]:
    splits = ["--query", "KNN:root=data:split=query", "--test", "KNN:root=data:split=test"]
    return ["--weights", *weights, *splits, "--cache", "cache", *more]


def started(shown: str) -> list[list[str]]:
    """What `pathfm evaluate` is given by the supervisors."""
    lines = [shlex.split(line.removeprefix("# ")) for line in shown.splitlines() if line.startswith("# srun ")]
    return [line[line.index("evaluate") + 1 :] for line in lines]


def test_a_dry_run_shows_one_job_for_the_runs_teacher_of_this_moment(place: Path, capsys: Capture) -> None:
    assert main(words("--groups", "labels.csv:slide", "--nodes", "2", "--dry-run", "--tasks", "knn")) == 0
    (command,) = started(capsys.readouterr().out)
    teacher = f"{place}/runs/vits/exports/teacher_00000200.safetensors"
    splits = ["--query", "KNN:root=data:split=query", "--test", "KNN:root=data:split=test"]
    folders = ["--cache", f"{place}/cache", "--output", f"{place}/evaluations"]
    groups, name = ["--groups", f"{place}/labels.csv:slide"], ["--name", "vits_teacher_00000200"]
    assert command == [teacher, *splits, *groups, *folders, *name, "--tasks", "knn"]


def test_the_best_teacher_goes_before_the_newest(place: Path, capsys: Capture) -> None:
    (place / "runs" / "vits" / "exports" / "teacher_best.safetensors").touch()
    assert main(words("--dry-run")) == 0
    assert started(capsys.readouterr().out)[0][0] == f"{place}/runs/vits/exports/teacher_best.safetensors"


def test_several_weights_are_an_array_and_random_ones_are_weights_too(place: Path, capsys: Capture) -> None:
    first = "runs/vits/exports/teacher_00000100.safetensors"
    assert main(words("--parallel", "1", weights=("vits", first, "random:vits14"))) == 0
    assert "submitted job 12: evaluation evaluations, 3 runs, 1 x 8 tasks each, 1 at once" in capsys.readouterr().out
    for name in ("vits_teacher_00000200", "vits_teacher_00000100", "random_vits14"):
        (submission,) = submissions(place / "evaluations" / "jobs" / name)
        assert submission.job.startswith("12_")
    assert (place / "cache").is_dir()  # or a container could not be shown it


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--weights", "vitx"], "there is no vitx"),
        (["--weights", "random:vitx"], "no recipe 'vitx'"),
        (["--weights", "vits", "vits"], "two of the weights would be called vits_teacher_00000200"),
        (["--query", "KNN:root=nowhere:split=query"], "there is no"),
        (["--query", "Pathology:root=data"], "labelled tiles are named as KNN:root=FOLDER:split=query or test"),
        (["--groups", "labels.csv"], "groups are given as FILE.csv:COLUMN"),
        (["--groups", "no.csv:slide"], "there is no no.csv"),
        (["--parallel", "2"], "add several --weights"),
        (["--output", "bin/sbatch/out"], "bin/sbatch cannot be written"),
        (["--cluster", "local", "--nodes", "2"], "--nodes is for --cluster slurm"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_queued(place: Path, change: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main(words(*change))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_exports_is_told(place: Path) -> None:
    for path in (place / "runs" / "vits" / "exports").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="run vits has exported no teacher yet"):
        main(words())


def test_here_the_command_itself_is_shown(place: Path, capsys: Capture) -> None:
    assert main(words("--cluster", "local", "--dry-run", "--batch-size", "8")) == 0
    assert capsys.readouterr().out.endswith("--batch-size 8\n")


@pytest.mark.parametrize(("options", "said"), [((), "Several weights make an array"), (("--follow", "x"), "--once")])
def test_the_launcher_starts_without_torch(options: tuple[str, ...], said: str) -> None:
    code = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, str(LAUNCHER), *options, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
