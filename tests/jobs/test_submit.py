"""The launcher finds mistakes before the queue, prints what it would submit, and starts the same run everywhere."""

import fcntl
import io
import os
import shlex
import shutil
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
from pathfm.launch.attempts import Outcome, note_outcome, submissions
from pathfm.lifecycle.run import Run
from pathfm.recipe import read_recipe
from tests.jobs.fake_slurm import FakeSlurm, slurm  # noqa: F401

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


@pytest.fixture
def queue(slurm: FakeSlurm) -> FakeSlurm:  # noqa: F811
    """A Slurm that takes jobs: it keeps the script as `submitted`, and the next job is number 12."""
    for name in ("sbatch", "srun"):
        script = f'cp "$1" {slurm.folder}/submitted; echo Submitted batch job 12'
        (slurm.folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (slurm.folder / name).chmod(0o755)
    return slurm


def _words(tmp_path: Path, data: Path, *more: str) -> list[str]:
    settings = [f"train.dataset_path=Pathology:root={data}", "train.batch_size_per_gpu=1"]
    return ["--config", "vits14", "--run", "first", "--runs-dir", str(tmp_path / "runs"), *settings, *more]


def _was_submitted(slurm: FakeSlurm) -> bool:  # noqa: F811
    return (slurm.folder / "submitted").exists()


def _refusal(arguments: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_dry_run_works_in_any_folder_without_slurm_torch_or_data(tmp_path: Path) -> None:
    done = _launch("--nodes", "4", "--config", "vitl14", "--dry-run", "optim.epochs=3", cwd=tmp_path)
    assert done.returncode == 0
    assert "#SBATCH --nodes=4\n" in done.stdout
    assert f"#SBATCH --output={tmp_path}/runs/vitl14/logs/submitit/%j_0_log.out\n" in done.stdout
    assert "# srun --kill-on-bad-exit=1 --nodes=4 --ntasks=32" in done.stdout
    assert f"export PYTHONPATH={tmp_path}/runs/vitl14/code/" in done.stdout
    assert f"--config-file {tmp_path}/runs/vitl14/code/recipe_" in done.stdout
    assert done.stdout.endswith(f" --output-dir {tmp_path}/runs/vitl14\n")
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
        (["--config", "vits14", "--profile", "exampel"], "did you mean 'example'? there are: example, slurm"),
        (["--config", "vits14", "--runs-dir", "/tmp/100%j"], "'%'"),
        (["--config", "vits14", "--cluster", "local", "--nodes", "2"], "--nodes is for --cluster slurm"),
        (["--config", "vits14", "--cluster", "debug", "--profile", "slurm"], "--profile is for --cluster slurm"),
        (
            ["--config", "vits14", "--cluster", "local", "--gpus-per-node", "0"],
            "--gpus-per-node is for --cluster slurm",
        ),
        (["--config", "vits14", "--cluster", "local", "--comment", "x"], "--comment is for --cluster slurm"),
        (["--config", "vits14", "--cluster", "local", "--sweep", "train.seed=1"], "--sweep is for --cluster slurm"),
        (["--config", "vits14", "--cluster", "local", "--live"], "--live is for --cluster slurm"),
        (["--config", "vits14", "--gpus-per-node", "-1"], "the command line: gpus_per_node"),
        (["--config", "vits14", "--time", "10:00"], "'10:00' is no time limit"),
        (["--config", "vits14", "--time", "0:00:30"], "time_limit_hours"),
        (["--config", "vits14", "--sweep", "optim.epoch=3,4"], "the nearest known key is 'optim.epochs'"),
        (["--config", "vits14", "--parallel", "2"], "add --sweep KEY=VALUE,VALUE"),
        (["--config", "vits14", "--sweep", "train.seed=1,2", "--parallel", "0"], "at least one runs"),
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
    tmp_path: Path, data: Path, queue: FakeSlurm, cluster: str, settings: list[str], message: str
) -> None:
    settings = [setting.format(data=data) for setting in settings]
    with pytest.raises(UserError, match=message):
        main(["--config", "vits14", "--cluster", cluster, "--runs-dir", str(tmp_path / "runs"), *settings])
    assert not (tmp_path / "runs").exists()
    assert not _was_submitted(queue)


def test_an_image_and_a_bind_that_are_not_there_stop_the_submission(
    tmp_path: Path, data: Path, queue: FakeSlurm
) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("container: {runtime: apptainer, image: /no/such.sif, binds: ['/no/tiles:/tiles']}\n")
    settings = [f"train.dataset_path=Pathology:root={data}", "train.batch_size_per_gpu=1"]
    with pytest.raises(UserError, match=r"no image /no/such\.sif.*/no/tiles to bind"):
        main(["--config", "vits14", "--profile", str(profile), "--runs-dir", str(tmp_path / "runs"), *settings])


def test_data_that_the_container_shows_elsewhere_is_checked_where_the_host_has_it(
    tmp_path: Path, data: Path, queue: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "mine.yaml"
    (queue.folder / "docker").write_text("#!/bin/sh\nexit 1\n")
    (queue.folder / "docker").chmod(0o755)
    profile.write_text(
        f"container: {{runtime: docker, image: 'x@sha256:1', binds: ['{data}:/in/the/image:ro']}}\ngpus_per_node: 0\n"
    )
    settings = ["train.dataset_path=Pathology:root=/in/the/image", "train.batch_size_per_gpu=1"]
    arguments = ["--config", "vits14", "--profile", str(profile), "--runs-dir", str(tmp_path / "runs"), *settings]
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "/in/the/image:/in/the/image" not in shown.out
    assert main(arguments) == 0


def test_what_a_dry_run_shows_is_a_script_also_where_a_command_has_several_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("container: {runtime: docker, image: 'x@sha256:1'}\n")
    assert main(["--config", "vits14", "--profile", str(profile), "--dry-run"]) == 0
    _, _, starts = capsys.readouterr().out.partition("starts this, and waits for it:\n")
    assert "exec docker run" in starts
    assert {line[:2] for line in starts.splitlines()} == {"# "}


def test_a_submission_says_the_job_and_how_to_follow_it(
    tmp_path: Path, data: Path, queue: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_words(tmp_path, data)) == 0
    shown = capsys.readouterr().out
    assert "submitted job 12: run first, 1 x 8 tasks" in shown
    assert f"pathfm logs {tmp_path}/runs/first -f" in shown
    assert "--job-name=first" in (queue.folder / "submitted").read_text()
    (noted,) = submissions(tmp_path / "runs" / "first")
    assert (noted.job, noted.nodes, noted.tasks_per_node) == ("12", 1, 8)
    assert noted.command == shlex.join(["pathfm", "submit", *_words(tmp_path, data)])


def test_options_overrule_the_profile_and_further_ones_go_to_sbatch(capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--gpus-per-node", "2", "--partition", "low", "--account", "a", "--qos", "q", "--constraint", "h100"]
    further = ["--exclude", "n[3-4]", "--dependency", "afterok:5", "--reservation", "r", "--comment", "two words"]
    options = [*where, "--time", "1-12:30:00", *further]
    assert main(["--config", "vits14", "--profile", "example", "--dry-run", *options]) == 0
    shown = capsys.readouterr().out.splitlines()
    for line in ("gres=gpu:a100:2", "partition=low", "account=a", "qos=q", "constraint=h100", "time=2190"):
        assert f"#SBATCH --{line}" in shown
    for line in ("exclude='n[3-4]'", "dependency=afterok:5", "reservation=r", "comment='two words'", "mem=480G"):
        assert f"#SBATCH --{line}" in shown


# ---- what runs is what was submitted


def test_the_job_runs_copies_of_code_and_recipe(tmp_path: Path, data: Path, queue: FakeSlurm) -> None:
    assert main(_words(tmp_path, data, "optim.epochs=3")) == 0
    code = tmp_path / "runs" / "first" / "code"
    (copy,) = (path for path in code.iterdir() if path.is_dir())
    (recipe,) = code.glob("recipe_*.yaml")
    assert f"export PYTHONPATH={copy}$" in (queue.folder / "submitted").read_text()
    assert read_recipe(recipe).recipe.optim.epochs == 3
    says = "import pathfm.jobs.arguments as a; print(a.CONFIGS)"
    done = subprocess.run(
        [sys.executable, "-c", says], env={"PYTHONPATH": str(copy)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == f"{copy}/configs\n", done.stderr


def test_live_runs_the_checkout_itself(tmp_path: Path, data: Path, queue: FakeSlurm) -> None:
    assert main(_words(tmp_path, data, "--live")) == 0
    assert f"export PYTHONPATH={CONFIGS.parent}$" in (queue.folder / "submitted").read_text()
    assert [path.name[:7] for path in (tmp_path / "runs" / "first" / "code").iterdir()] == ["recipe_"]


# ---- once more under the same name


def test_a_run_whose_job_is_in_the_queue_is_not_submitted_again(tmp_path: Path, data: Path, queue: FakeSlurm) -> None:
    main(_words(tmp_path, data))
    (queue.folder / "submitted").unlink()
    queue.job("12", like="waiting", name="first")
    refusal = _refusal(_words(tmp_path, data, "--resubmit"))
    assert refusal.startswith("run first has job 12 already (waiting: Resources")
    run = tmp_path / "runs" / "first"
    assert f"pathfm logs {run} -f" in refusal
    assert f"pathfm cancel {run}" in refusal
    assert not _was_submitted(queue)


def test_a_number_that_another_cluster_gave_to_a_stranger_does_not_count(
    tmp_path: Path, data: Path, queue: FakeSlurm
) -> None:
    main(_words(tmp_path, data))
    queue.job("12", name="something-else")
    assert main(_words(tmp_path, data, "--resubmit")) == 0


def test_a_run_that_has_ended_goes_on_only_when_told_to(tmp_path: Path, data: Path, queue: FakeSlurm) -> None:
    main(_words(tmp_path, data))
    note_outcome(tmp_path / "runs" / "first", Outcome("12", 0, "12", 143, 40, "leave", False, "somebody cancelled it"))
    (tmp_path / "runs" / "first" / "checkpoints" / "step_00000040").mkdir(parents=True)
    assert _refusal(_words(tmp_path, data)) == (
        "run first has ended: job 12, newest checkpoint of step 40: somebody cancelled it; "
        "add --resubmit to go on with it"
    )
    assert main(_words(tmp_path, data, "--resubmit")) == 0
    first, second = submissions(tmp_path / "runs" / "first")
    assert first.command == second.command


def test_a_run_that_is_done_is_left_alone(
    tmp_path: Path, data: Path, queue: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(tmp_path / "runs" / "first").directory.mkdir(parents=True)
    Run(tmp_path / "runs" / "first").write_exit("done", 40)
    assert main(_words(tmp_path, data)) == 0
    assert capsys.readouterr().out == "run first is finished; nothing is submitted\n"
    assert not _was_submitted(queue)


def test_a_run_that_was_begun_on_this_machine_goes_on_on_slurm(tmp_path: Path, data: Path, queue: FakeSlurm) -> None:
    Run(tmp_path / "runs" / "first").directory.mkdir(parents=True)
    Run(tmp_path / "runs" / "first").write_exit("interrupted", 40)
    assert main(_words(tmp_path, data)) == 0


def test_another_recipe_under_the_same_name_is_named_before_the_queue(
    tmp_path: Path, data: Path, queue: FakeSlurm
) -> None:
    run = tmp_path / "runs" / "first"
    main(_words(tmp_path, data))
    (recipe,) = (run / "code").glob("recipe_*.yaml")
    shutil.copy(recipe, run / "recipe.yaml")
    assert main(_words(tmp_path, data, "--resubmit")) == 0
    refusal = _refusal(_words(tmp_path, data, "--resubmit", "optim.epochs=7"))
    assert "run first was begun with another recipe (optim.epochs: " in refusal


def test_two_submissions_at_once_make_one_job(tmp_path: Path, data: Path, queue: FakeSlurm) -> None:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    with (run / ".submission.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "just being submitted by another process" in _refusal(_words(tmp_path, data))
    assert main(_words(tmp_path, data)) == 0


# ---- sweeps


def test_a_sweep_is_one_array_of_runs(
    tmp_path: Path, data: Path, queue: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(_words(tmp_path, data, "--sweep", "optim.base_lr=1e-3,2e-3", "--sweep", "train.seed=5")) == 0
    script = (queue.folder / "submitted").read_text()
    assert "#SBATCH --array=0-1%2\n" in script
    assert "#SBATCH --job-name=first\n" in script
    shown = capsys.readouterr()
    assert "submitted job 12: sweep first, 2 runs, 1 x 8 tasks each" in shown.out
    for number, rate in enumerate(("1e-3", "2e-3")):
        run = tmp_path / "runs" / f"first-base_lr_{rate}-seed_5"
        assert f"12_{number}  {run.name}" in shown.out
        assert submissions(run)[0].job == f"12_{number}"
        (recipe,) = (run / "code").glob("recipe_*.yaml")
        assert read_recipe(recipe).recipe.optim.base_lr == float(rate)
        assert (run / "logs" / "submitit" / f"12_{number}_0_log.out").is_file()


def test_a_sweep_that_is_submitted_again_leaves_alone_what_runs_and_what_is_done(
    tmp_path: Path, data: Path, queue: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = _words(tmp_path, data, "--sweep", "train.seed=1,2,3,4")
    main(sweep)
    Run(tmp_path / "runs" / "first-seed_2").write_exit("done", 40)
    queue.job("12_3", name="first-seed_4")
    capsys.readouterr()
    assert "run first-seed_1 has ended: job 12_0" in _refusal(sweep)
    assert main([*sweep, "--resubmit"]) == 0
    assert "#SBATCH --array=0-1%2\n" in (queue.folder / "submitted").read_text()
    shown = capsys.readouterr().out
    assert "run first-seed_2 is finished" in shown
    assert len(submissions(tmp_path / "runs" / "first-seed_1")) == 2
    assert len(submissions(tmp_path / "runs" / "first-seed_4")) == 1


def test_a_dry_run_of_a_sweep_shows_every_command_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--runs-dir", str(tmp_path / "runs"), "--parallel", "2", "--dry-run"]
    assert main(["--config", "vits14", "--sweep", "train.seed=1,2,3", *where]) == 0
    shown = capsys.readouterr().out
    assert "#SBATCH --array=0-2%2\n" in shown
    assert [f"--output-dir {tmp_path}/runs/vits14-seed_{seed}\n" in shown for seed in (1, 2, 3)] == [True] * 3
    assert not (tmp_path / "runs").exists()


# ---- this machine


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
