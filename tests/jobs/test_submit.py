"""The launcher finds mistakes before the queue, prints what it would submit, and starts the same run everywhere."""

import io
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathfm.data.index import IndexRequest, build_index
from pathfm.errors import UserError
from pathfm.jobs import submit
from pathfm.jobs.submit import main

LAUNCHER = Path(__file__).parents[2] / "launchers" / "pretrain.py"
CONFIGS = LAUNCHER.parents[1] / "configs"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A packed data set of 8 images."""
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "pretrain_dataset.tar", "w") as tar:
        for number in range(8):
            picture = io.BytesIO()
            Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8)).save(picture, format="PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = len(picture.getvalue())
            tar.addfile(member, io.BytesIO(picture.getvalue()))
    build_index(IndexRequest(folder / "pretrain_dataset.tar", folder, name="pretrain"))
    return folder


def _launch(
    *arguments: str, cwd: Path, python: tuple[str, ...] = (sys.executable,)
) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*python, str(LAUNCHER), *arguments], cwd=cwd, capture_output=True, text=True)


def _recorded_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    for name in ("sbatch", "srun"):
        (folder / name).write_text(f'#!/bin/sh\ncp "$1" {folder}/submitted; echo Submitted batch job 12\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_dry_run_works_in_any_folder_without_slurm_torch_or_data(tmp_path: Path) -> None:
    done = _launch("--nodes", "4", "--config", "vitl14", "--dry-run", "optim.epochs=3", cwd=tmp_path)
    assert done.returncode == 0
    assert "#SBATCH --nodes=4\n" in done.stdout
    assert f"#SBATCH --output={tmp_path}/runs/vitl14/logs/submitit/%j_0_log.out\n" in done.stdout
    assert "# srun --kill-on-bad-exit=1 --nodes=4 --ntasks=32" in done.stdout
    assert f"--config-file {CONFIGS}/vitl14.yaml --output-dir {tmp_path}/runs/vitl14 optim.epochs=3" in done.stdout
    assert "no data set is given" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_login_node_never_imports_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathfm.jobs.submit import main; "
        "main(['--config', 'vits14', '--dry-run']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 0


def test_nothing_of_a_run_depends_on_when_it_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for _ in range(2):
        main(["--config", "vits14", "--dry-run"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_settings_stand_in_any_position(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "optim.epochs=3",
        "--config",
        "vits14",
        "train.seed=1",
        "--cluster",
        "local",
        "--dry-run",
        "train.seed=2",
    ]
    assert main([*arguments, "train.device=cpu"]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert command[:4] == [sys.executable, "-u", "-m", "pathfm.train"]
    assert command[-4:] == ["optim.epochs=3", "train.seed=1", "train.seed=2", "train.device=cpu"]


def test_without_slurm_one_line_says_how_to_train_here(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, str(LAUNCHER), "--config", "vits14"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "there is no Slurm here" in done.stderr
    assert "--cluster local" in done.stderr


def test_a_python_without_pathfm_is_told_how_to_get_it(tmp_path: Path) -> None:
    done = _launch("--config", "vits14", cwd=tmp_path, python=(sys.executable, "-I", "-S"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "make env" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "vitl15"], "did you mean 'vitl14'"),
        (["--config", "vits14", "optim.epoch=3"], "the nearest known key is 'optim.epochs'"),
        (["--config", "vits14", "--run", "../other"], "'../other' cannot be a run's name"),
        (["--config", "vits14", "--no-resume"], "--no-resume is not for Slurm"),
        (["--config", "vits14", "--nodes", "0"], "--nodes is 0"),
        (["--config", "vits14", "--profile", "hospitl"], "did you mean 'hospital'? there are: hospital, slurm"),
        (["--config", "vits14", "--runs-dir", "/tmp/100%j"], "'%'"),
        (["--config", "vits14", "--cluster", "local", "--nodes", "2"], "--nodes is for --cluster slurm"),
        (["--config", "vits14", "--cluster", "debug", "--profile", "slurm"], "--profile is for --cluster slurm"),
        (["--config", "vits14", "train.dataset_path=Patology:root=/x"], "did you mean 'Pathology'"),
    ],
)
def test_a_mistake_is_one_line_even_in_a_dry_run(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main([*arguments, "--dry-run"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cluster", ["local", "debug", "slurm"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "no data set is given"),
        (["train.dataset_path=Pathology:root=/nowhere"], "/nowhere"),
        (["train.dataset_path=Pathology:root={data}", "train.batch_size_per_gpu=64"], "larger than an epoch of 8"),
    ],
)
def test_what_would_stop_the_run_stops_the_submission(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, cluster: str, settings: list[str], message: str
) -> None:
    _recorded_slurm(tmp_path / "bin", monkeypatch)
    settings = [setting.format(data=data) for setting in settings]
    with pytest.raises(UserError, match=message):
        main(["--config", "vits14", "--cluster", cluster, "--runs-dir", str(tmp_path / "runs"), *settings])
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "bin" / "submitted").exists()


def test_an_image_and_a_bind_that_are_not_there_stop_the_submission(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _recorded_slurm(tmp_path / "bin", monkeypatch)
    profile = tmp_path / "mine.yaml"
    profile.write_text("container: {runtime: apptainer, image: /no/such.sif, binds: ['/no/tiles:/tiles']}\n")
    settings = [f"train.dataset_path=Pathology:root={data}", "train.batch_size_per_gpu=1"]
    with pytest.raises(UserError, match=r"no image /no/such\.sif .*/no/tiles to bind"):
        main(["--config", "vits14", "--profile", str(profile), "--runs-dir", str(tmp_path / "runs"), *settings])


def test_data_that_the_container_shows_elsewhere_is_checked_where_the_host_has_it(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _recorded_slurm(tmp_path / "bin", monkeypatch)
    profile = tmp_path / "mine.yaml"
    profile.write_text(f"container: {{runtime: docker, image: x, binds: ['{data}:/in/the/image:ro']}}\n")
    settings = ["train.dataset_path=Pathology:root=/in/the/image", "train.batch_size_per_gpu=1"]
    arguments = ["--config", "vits14", "--profile", str(profile), "--runs-dir", str(tmp_path / "runs"), *settings]
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "/in/the/image:/in/the/image" not in shown.out
    assert main(arguments) == 0


def test_a_submission_says_the_job_and_its_log(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _recorded_slurm(tmp_path / "bin", monkeypatch)
    settings = [f"train.dataset_path=Pathology:root={data}", "train.batch_size_per_gpu=1"]
    assert main(["--config", "vits14", "--run", "first", "--runs-dir", str(tmp_path / "runs"), *settings]) == 0
    shown = capsys.readouterr().out
    assert "submitted job 12: run first" in shown
    assert str(tmp_path / "runs" / "first" / "logs" / "submitit" / "12_0_log.out") in shown
    assert "--job-name=first" in (tmp_path / "bin" / "submitted").read_text()


@pytest.mark.parametrize(("gpus", "starter"), [(0, "pathfm.train"), (1, "pathfm.train"), (2, "torch.distributed.run")])
def test_this_machine_gets_one_process_per_gpu(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, gpus: int, starter: str
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(submit, "gpus_of_this_machine", lambda: gpus)
    monkeypatch.setattr(submit, "run_local", lambda command, folder: started.append(command) or 75)
    settings = [f"train.dataset_path=Pathology:root={data}", "train.batch_size_per_gpu=1"]
    assert main(["--config", "vits14", "--cluster", "local", "--runs-dir", str(tmp_path), *settings]) == 75
    assert started[0][started[0].index("-m") + 1] == starter
