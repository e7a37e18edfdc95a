"""Commands in containers and under torch's starter, as plain lists."""

import json
import shlex
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from pathfm.launch.container import Needs, removal_command, srun_options, task_command
from pathfm.launch.payload import one_process_per_gpu, trainer_command
from pathfm.launch.profile import Container

RECORDED = Path(__file__).parent / "recorded"
BINDS = ("/data/tiles:/data/tiles:ro",)


NEEDS = Needs(
    working_directory=Path("/home/me"),
    run_dir=Path("/scratch/runs/vitl14"),
    read_only=(Path("/scratch/runs/vitl14/code/abc"),),
    environment=("NCCL_SOCKET_IFNAME", "PYTHONPATH"),
    user="1000:100",
)


def wrapped(runtime: str, needs: Needs = NEEDS, **more: object) -> list[str]:
    container = Container(runtime=runtime, image="hospital/pathfm@sha256:0123", binds=BINDS, **more)
    return task_command(container, ["python", "-V"], needs)


def test_without_a_container_the_command_stays() -> None:
    assert task_command(Container(), ["python", "-V"], NEEDS) == ["python", "-V"]


@pytest.mark.parametrize("runtime", ["apptainer", "docker", "podman"])
def test_a_runtimes_command_is_the_recorded_one(runtime: str) -> None:
    assert "\n".join(wrapped(runtime)) + "\n" == (RECORDED / f"{runtime}.txt").read_text()


def test_pyxis_is_told_by_options_of_srun_and_the_command_stays() -> None:
    container = Container(runtime="pyxis", image="/images/pathfm.sqsh", binds=BINDS, options=("--container-readonly",))
    assert task_command(container, ["python", "-V"], NEEDS) == ["python", "-V"]
    assert "\n".join(srun_options(container, NEEDS)) + "\n" == (RECORDED / "pyxis.txt").read_text()


@pytest.mark.parametrize("runtime", ["none", "apptainer", "docker", "podman"])
def test_other_runtimes_need_no_options_of_srun(runtime: str) -> None:
    assert srun_options(Container(runtime=runtime, image="x"), NEEDS) == []


@pytest.mark.parametrize("runtime", ["apptainer", "docker", "podman"])
def test_without_gpus_none_are_asked_for(runtime: str) -> None:
    with_them, without = wrapped(runtime), wrapped(runtime, needs=replace(NEEDS, gpus=False))
    assert {"--nv", "--gpus", "--device=nvidia.com/gpu=all"} & {*with_them}
    assert not {"--nv", "--gpus", "--device=nvidia.com/gpu=all"} & {*without}


@pytest.mark.parametrize("runtime", ["apptainer", "docker", "podman"])
def test_further_options_stand_before_the_image(runtime: str) -> None:
    command = wrapped(runtime, options=("--device=/dev/infiniband",))
    assert command[-4:] == ["--device=/dev/infiniband", "hospital/pathfm@sha256:0123", "python", "-V"]


@pytest.mark.parametrize("runtime", ["apptainer", "docker", "podman", "pyxis"])
def test_baked_code_is_not_hidden_by_the_copy_that_the_supervisor_imports(runtime: str) -> None:
    assert wrapped(runtime, code="baked")[-4:] == ["env", "--unset=PYTHONPATH", "python", "-V"]


def test_a_folder_inside_a_bound_one_is_not_bound_again() -> None:
    folders = tuple(map(Path, ("/home/me/runs", "/home/me", "/home/meg")))
    needs = replace(NEEDS, run_dir=Path("/home/me/runs/a"), folders=folders, read_only=())
    binds = [part for part in wrapped("apptainer", needs=needs) if part.startswith("/home") and ":" in part]
    assert binds == ["/home/me:/home/me", "/home/meg:/home/meg"]


# ---- docker in earnest, but for its daemon

DOCKER = """#!/usr/bin/env python3
import json, sys
arguments = sys.argv[1:]
named = arguments[arguments.index("--env-file") + 1]
json.dump({"arguments": arguments, "environment": open(named).read().split("\\n")}, open("told.json", "w"))
sys.exit(75)
"""


def told_to_docker(folder: Path, **variables: str) -> tuple[list[str], list[str]]:
    """Arguments and environment that docker gets from a task with these variables."""
    (folder / "docker").write_text(DOCKER)
    (folder / "docker").chmod(0o755)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": "/home/me", **variables}
    done = subprocess.run(wrapped("docker"), env=environment, cwd=folder)
    assert done.returncode == 75  # the payload's own
    told = json.loads((folder / "told.json").read_text())
    return told["arguments"], told["environment"]


def test_docker_gets_the_gpus_that_slurm_gave_to_the_step_by_their_numbers_on_the_node(tmp_path: Path) -> None:
    arguments, environment = told_to_docker(tmp_path, SLURM_STEP_GPUS="2,3", CUDA_VISIBLE_DEVICES="0,1")
    assert [part for part in arguments if "--gpus" in part] == ['--gpus="device=2,3"']
    assert not [line for line in environment if line.startswith("CUDA_VISIBLE_DEVICES")]  # inside they are 0 and 1


def test_docker_gets_all_gpus_where_slurm_says_nothing_and_the_task_chooses(tmp_path: Path) -> None:
    arguments, environment = told_to_docker(tmp_path, CUDA_VISIBLE_DEVICES="0,1")
    assert [part for part in arguments if "--gpus" in part] == ["--gpus=all"]
    assert "CUDA_VISIBLE_DEVICES=0,1" in environment


def test_docker_gets_ranks_network_and_keys_but_no_secret_on_its_command_line(tmp_path: Path) -> None:
    variables = {
        "SLURM_PROCID": "3",
        "SLURMD_NODENAME": "n1",
        "NCCL_IB_HCA": "mlx5",
        "NCCL_SOCKET_IFNAME": "ib0",
        "WANDB_API_KEY": "secret",
        "PATHFM_IMAGE": "x",
        "PYTHONPATH": "/code",
        "https_proxy": "http://proxy:3128",
    }
    arguments, environment = told_to_docker(tmp_path, LD_PRELOAD="", OTHER="no", **variables)
    assert sorted(filter(None, environment)) == sorted(f"{name}={value}" for name, value in variables.items())
    assert "secret" not in " ".join([*arguments, *wrapped("docker"), *wrapped("podman")])


def test_a_signal_to_a_task_in_docker_is_dockers_own(tmp_path: Path) -> None:
    (tmp_path / "docker").write_text("#!/bin/sh\ntrap 'exit 75' USR2\necho ready\nwhile :; do sleep 0.05; done\n")
    (tmp_path / "docker").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    with subprocess.Popen(wrapped("docker"), env=environment, stdout=subprocess.PIPE, text=True) as task:
        assert task.stdout
        assert task.stdout.readline() == "ready\n"
        task.send_signal(signal.SIGUSR2)
        assert task.wait(timeout=30) == 75


# ---- what a killed task leaves


@pytest.mark.parametrize("runtime", ["docker", "podman"])
def test_containers_of_the_run_are_removed_and_no_others(runtime: str, tmp_path: Path) -> None:
    listing = f'[ "$1 $4" = "ps --filter" ] && echo "c1 c2" && echo "$@" > {tmp_path}/asked'
    (tmp_path / runtime).write_text(f'#!/bin/sh\n{listing}\n[ "$1" = rm ] && echo "$@" > {tmp_path}/removed\nexit 0\n')
    (tmp_path / runtime).chmod(0o755)
    command = removal_command(Container(runtime=runtime, image="x"), Path("/my runs/a"))
    subprocess.run(command, check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert (tmp_path / "asked").read_text() == "ps --all --quiet --filter label=pathfm.run=/my runs/a\n"
    assert (tmp_path / "removed").read_text() == "rm --force c1 c2\n"


@pytest.mark.parametrize("runtime", ["none", "apptainer", "pyxis"])
def test_a_container_that_is_a_child_of_its_task_leaves_nothing(runtime: str) -> None:
    assert removal_command(Container(runtime=runtime, image="x"), Path("/runs/a")) == []


def test_several_gpus_get_a_process_each_of_the_same_trainer() -> None:
    trainer = trainer_command("python", Path("/c/vits14.yaml"), Path("/runs/a"), ["optim.epochs=3"])
    assert shlex.join(trainer) == (
        "python -u -m pathfm.train --config-file /c/vits14.yaml --output-dir /runs/a optim.epochs=3"
    )
    assert shlex.join(one_process_per_gpu(trainer)) == (
        "python -u -m torch.distributed.run --standalone --nproc_per_node=gpu "
        "-m pathfm.train --config-file /c/vits14.yaml --output-dir /runs/a optim.epochs=3"
    )
