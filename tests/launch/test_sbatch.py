"""The sbatch text is submitit's own, is compared with a record, and starts a job that ends as its payload ends."""

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pathfm.errors import UserError
from pathfm.launch.container import Needs, removal_command, srun_options, task_command
from pathfm.launch.payload import trainer_command
from pathfm.launch.profile import Container, Profile, read_profile
from pathfm.launch.sbatch import (
    EXPORTED,
    SlurmArray,
    SlurmJob,
    array_of,
    array_text,
    executor_parameters,
    submit,
    submit_array,
    tell_apart,
)

RECORDED = Path(__file__).parent / "recorded"
PROFILES = Path(__file__).parents[2] / "launchers" / "profiles"
HOME = Path("/home/me")


DOCKER = Container(runtime="docker", image="hospital/pathfm:1", binds=("/data/tiles:/data/tiles:ro",))
PYXIS = Container(runtime="pyxis", image="/images/pathfm.sqsh", binds=DOCKER.binds, code="baked")
OPTIONS = {"exclude": "n[3-4]", "dependency": "afterok:12", "reservation": "night", "comment": "a first try, 2 nodes"}


def _job(profile: Profile, nodes: int = 4, home: Path = HOME, name: str = "vitl14", sweep: str = "") -> SlurmJob:
    run_dir = home / "runs" / name
    code = home / "runs" / (sweep or name) / "code"
    needs = Needs(
        working_directory=home,
        run_dir=run_dir,
        read_only=() if profile.container.has_the_code else (code / "ba9876543210",),
        gpus=profile.gpus_per_node > 0,
        environment=(*EXPORTED, *profile.environment),
        user="1000:100",
    )
    trainer = trainer_command("python", run_dir / "code" / "recipe_0123456789ab.yaml", run_dir, ())
    return SlurmJob(
        name,
        run_dir,
        nodes,
        profile,
        tuple(task_command(profile.container, trainer, needs)),
        code / "ba9876543210",
        container_options=tuple(srun_options(profile.container, needs)),
        clean_up=tuple(removal_command(profile.container, run_dir)),
    )


def _array(profile: Profile, home: Path = HOME) -> SlurmArray:
    names = ("vitl14-base_lr_1e-3", "vitl14-base_lr_2e-3", "vitl14-base_lr_4e-3")
    jobs = (replace(_job(profile, home=home, name=name, sweep="vitl14.sweep"), options=OPTIONS) for name in names)
    return SlurmArray("vitl14", home / "runs" / "vitl14.sweep" / "submitit", tuple(jobs), at_once=2)


def _shown(array: SlurmArray) -> str:
    """The script and what every supervisor starts."""
    text = array_text(array).replace(shlex.quote(sys.executable), "PYTHON")
    commands = [shlex.join(job.command(str(job.run_dir / "logs" / "7.0" / "rank_%t.log"))) for job in array.jobs]
    return "\n\n".join([text.rstrip(), *commands]) + "\n"


def _ends(job: SlurmJob) -> int:
    """A supervisor that says whose it is."""
    print("supervisor of", job.name, flush=True)
    raise SystemExit(3 if job.name.endswith("4e-3") else 0)


def _run_script(script: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **variables}
    return subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)


def _slurm_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, sbatch: str, scontrol: str = "") -> None:
    """Programs in Slurm's place; `sbatch` and `scontrol` are shell."""
    folder.mkdir()
    for name, script in (("sbatch", sbatch), ("srun", ""), ("scontrol", scontrol)):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("slurm", array_of(_job(read_profile(PROFILES / "slurm.yaml")))),
        ("example", array_of(_job(read_profile(PROFILES / "example.yaml")))),
        ("job_in_docker", array_of(_job(Profile(container=DOCKER, environment={"NCCL_DEBUG": "WARN"})))),
        ("job_in_pyxis", array_of(_job(Profile(container=PYXIS)))),
        ("sweep", _array(read_profile(PROFILES / "example.yaml", {"time_limit_hours": 12.5, "qos": "short"}))),
    ],
)
def test_the_text_is_the_recorded_one(name: str, array: SlurmArray) -> None:
    assert _shown(array) == (RECORDED / f"{name}.txt").read_text()


def test_a_dry_run_shows_what_a_submission_submits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = _job(read_profile(PROFILES / "example.yaml"), home=tmp_path / "a folder with spaces")
    shown = array_text(array_of(job))
    assert not job.folder.exists()
    _slurm_on_path(tmp_path / "bin", monkeypatch, sbatch=f'cp "$1" {tmp_path}/got; echo Submitted batch job 77')
    assert submit(job, _ends) == "77"
    assert (tmp_path / "got").read_text() == shown


def test_a_dry_run_of_an_array_shows_what_a_submission_submits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = _array(Profile(), home=tmp_path)
    shown = array_text(array)
    _slurm_on_path(tmp_path / "bin", monkeypatch, sbatch=f'cp "$1" {tmp_path}/got; echo Submitted batch job 77')
    assert submit_array(array, _ends) == ["77_0", "77_1", "77_2"]
    assert (tmp_path / "got").read_text() == shown


def test_the_job_runs_its_supervisor_and_ends_as_that_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor is this file's, which the snapshot of a run would not hold."""
    job = replace(_job(Profile(), nodes=1, home=tmp_path), code=None)
    _slurm_on_path(tmp_path / "bin", monkeypatch, sbatch="echo Submitted batch job 5")
    submit(job, _ends)
    done = _run_script(job.folder / "5_submission.sh", SLURM_JOB_ID="5")
    assert done.returncode == 0, done.stderr
    assert "supervisor of vitl14" in done.stdout


def test_every_element_of_an_array_has_a_supervisor_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = _array(Profile(), home=tmp_path)
    array = replace(array, jobs=tuple(replace(job, code=None) for job in array.jobs))
    _slurm_on_path(tmp_path / "bin", monkeypatch, sbatch="echo Submitted batch job 5")
    submit_array(array, _ends)
    statuses = []
    for index, job in enumerate(array.jobs):
        places = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": str(index), "SLURM_JOB_ID": str(5 + index)}
        done = _run_script(array.folder / "5_submission.sh", **places)
        assert f"supervisor of {job.name}" in done.stdout, done.stderr
        statuses.append(done.returncode)
    assert statuses == [0, 0, 3]


def test_every_element_of_an_array_is_named_after_its_run_and_its_run_has_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = _array(Profile(), home=tmp_path)
    named = f'echo "$@" >> {tmp_path}/named; case "$2" in *_1) echo scontrol: no such job >&2; exit 1;; esac'
    named = f'case "$1" in update) {named};; *) echo JobId=$((5 + ${{4#5_}})) ArrayJobId=5 ArrayTaskId=${{4#5_}};; esac'
    _slurm_on_path(tmp_path / "bin", monkeypatch, sbatch="echo Submitted batch job 5", scontrol=named)
    job_ids = submit_array(array, _ends)
    (refused,) = tell_apart(array, job_ids)
    assert refused.endswith("base_lr_2e-3 bears the name of its array in the queue: scontrol: no such job")
    assert (tmp_path / "named").read_text().splitlines()[0] == "update JobId=5_0 JobName=vitl14-base_lr_1e-3"
    assert [path.read_text() for path in array.jobs[2].folder.iterdir()] == [""]  # it has not begun
    (array.folder / "5_2_0_log.out").write_text("began\n")
    assert (array.jobs[2].folder / "7_0_log.out").read_text() == "began\n"  # by the number that its attempts have


def test_a_sweep_of_one_run_is_a_job_with_the_name_of_its_run() -> None:
    array = replace(_array(Profile()), jobs=_array(Profile()).jobs[:1])
    text = array_text(array)
    assert "#SBATCH --job-name=vitl14-base_lr_1e-3\n" in text
    assert "--array" not in text


def test_the_copy_of_the_code_is_imported_even_from_within_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _job(Profile(setup=("export PYTHONPATH=/site",)), home=tmp_path)
    assert job.code is not None
    for place in (job.code, tmp_path / "checkout"):
        (place / "somepackage").mkdir(parents=True)
        (place / "somepackage" / "__init__.py").write_text("print(__file__)")
    setup = executor_parameters(job)["slurm_setup"]
    python = f"{shlex.quote(sys.executable)} -m somepackage.nothing; echo $PYTHONPATH"
    monkeypatch.delenv("PYTHONPATH", raising=False)
    said = subprocess.run(
        ["bash", "-c", "\n".join([*setup, python])], cwd=tmp_path / "checkout", capture_output=True, text=True
    ).stdout.splitlines()
    assert said == [f"{job.code}/somepackage/__init__.py", f"{job.code}:/site"]


def test_a_refused_job_says_why_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "sbatch: error: invalid partition specified: gpuu"
    _slurm_on_path(tmp_path / "bin", monkeypatch, sbatch=f"echo {shlex.quote(reason)} >&2; exit 1")
    with pytest.raises(UserError, match="invalid partition specified: gpuu"):
        submit(_job(Profile(partition="gpuu"), home=tmp_path), _ends)


def test_a_submission_from_within_a_job_does_not_inherit_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/other/slurm.conf")
    _slurm_on_path(tmp_path / "bin", monkeypatch, sbatch=f"env > {tmp_path}/seen; echo Submitted batch job 2")
    submit(_job(Profile(), home=tmp_path), _ends)
    assert "SLURM_CPUS_PER_TASK" not in (tmp_path / "seen").read_text()
    assert "SLURM_CONF=/etc/other/slurm.conf" in (tmp_path / "seen").read_text()
    assert os.environ["SLURM_CPUS_PER_TASK"] == "3"
