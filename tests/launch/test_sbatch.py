"""The sbatch text is submitit's own, is compared with a record, and starts a job that ends as its payload ends."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pathfm.errors import UserError
from pathfm.launch.container import inside
from pathfm.launch.payload import trainer_command
from pathfm.launch.profile import Profile, read_profile
from pathfm.launch.sbatch import SlurmJob, sbatch_text, submit
from pathfm.launch.srun import srun_command

RECORDED = Path(__file__).parent / "recorded"
PROFILES = Path(__file__).parents[2] / "launchers" / "profiles"
HOME = Path("/home/me")


def _job(profile: Profile, nodes: int = 4, home: Path = HOME) -> SlurmJob:
    config, run_dir = home / "pathfm" / "configs" / "vitl14.yaml", home / "runs" / "vitl14"
    overrides = ["train.dataset_path=Pathology:root=/data/tiles:subset=train"]
    payload = inside(
        profile.container,
        trainer_command("python", config, run_dir, overrides),
        working_directory=home,
        needs=(run_dir.parent, config.parent),
        with_gpus=True,
    )
    command = srun_command(nodes, profile.tasks_per_node, profile.cpus_per_task, payload)
    return SlurmJob("vitl14", run_dir / "logs" / "submitit", nodes, profile, tuple(command))


def _slurm_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str, srun: str = "") -> None:
    """Programs in Slurm's place; `sbatch` and `srun` are shell."""
    folder.mkdir()
    for name, script in (("sbatch", sbatch), ("srun", srun)):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize("name", ["slurm", "hospital"])
def test_the_text_is_the_recorded_one(name: str) -> None:
    job = _job(read_profile(PROFILES / f"{name}.yaml"))
    text = sbatch_text(job).replace(shlex.quote(sys.executable), "PYTHON")
    found = f"{text}\n\n{shlex.join(job.command)}\n"
    assert found == (RECORDED / f"{name}.txt").read_text()


def test_a_dry_run_shows_what_a_submission_submits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(read_profile(PROFILES / "hospital.yaml"), home=tmp_path / "a folder with spaces")
    shown = sbatch_text(job)
    assert not job.folder.exists()
    _slurm_on_path(tmp_path / "bin", monkeypatch, sbatch=f'cp "$1" {tmp_path}/got; echo Submitted batch job 77')
    assert submit(job) == "77"
    assert (tmp_path / "got").read_text() == shown


@pytest.mark.parametrize("status", [0, 3])
def test_the_job_ends_with_the_status_of_its_payload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    job = _job(Profile(), nodes=1, home=tmp_path)
    job = replace(job, command=("srun", "--ntasks=1", "sh", "-c", f"echo trained; exit {status}"))
    _slurm_on_path(tmp_path / "bin", monkeypatch, sbatch="echo Submitted batch job 5", srun='shift; exec "$@"')
    submit(job)
    script = job.folder / "5_submission.sh"
    done = subprocess.run(
        ["bash", str(script)], env={**os.environ, "SLURM_JOB_ID": "5"}, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert "trained" in done.stdout


def test_a_refused_job_says_why_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "sbatch: error: invalid partition specified: gpuu"
    _slurm_on_path(tmp_path / "bin", monkeypatch, sbatch=f"echo {shlex.quote(reason)} >&2; exit 1")
    with pytest.raises(UserError, match="invalid partition specified: gpuu"):
        submit(_job(Profile(partition="gpuu"), home=tmp_path))


def test_a_submission_from_within_a_job_does_not_inherit_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    _slurm_on_path(tmp_path / "bin", monkeypatch, sbatch=f"env > {tmp_path}/seen; echo Submitted batch job 2")
    submit(_job(Profile(), home=tmp_path))
    assert "SLURM_CPUS_PER_TASK" not in (tmp_path / "seen").read_text()
    assert os.environ["SLURM_CPUS_PER_TASK"] == "3"
