"""Commands in containers and under torch's starter, as plain lists."""

import shlex
from pathlib import Path

from pathfm.launch.container import inside
from pathfm.launch.payload import one_process_per_gpu, trainer_command
from pathfm.launch.profile import Container

RECORDED = Path(__file__).parent / "recorded"
BINDS = ("/data/tiles:/data/tiles:ro",)


def _wrapped(container: Container, needs: tuple[str, ...] = ("/scratch/runs",)) -> list[str]:
    return inside(
        container,
        ["python", "-V"],
        working_directory=Path("/home/me"),
        needs=[Path(need) for need in needs],
        with_gpus=True,
        environment=["NCCL_SOCKET_IFNAME", "WANDB_MODE"],
        user="1000:100",
    )


def test_without_a_container_the_command_stays() -> None:
    assert _wrapped(Container()) == ["python", "-V"]


def test_apptainer_binds_what_the_run_needs_and_shows_the_gpus() -> None:
    command = _wrapped(Container(runtime="apptainer", image="/images/pathfm.sif", binds=BINDS))
    assert shlex.join(command) == (
        "apptainer exec --nv --bind /data/tiles:/data/tiles:ro --bind /home/me:/home/me "
        "--bind /scratch/runs:/scratch/runs --pwd /home/me /images/pathfm.sif python -V"
    )


def test_docker_is_the_recorded_command() -> None:
    command = _wrapped(Container(runtime="docker", image="hospital/pathfm:1", binds=BINDS))
    assert shlex.join(command) + "\n" == (RECORDED / "docker.txt").read_text()


def test_a_folder_inside_a_bound_one_is_not_bound_again() -> None:
    command = _wrapped(Container(runtime="apptainer", image="x.sif"), needs=("/home/me/runs", "/home/me", "/home/meg"))
    assert [part for part in command if ":" in part] == ["/home/me:/home/me", "/home/meg:/home/meg"]


def test_several_gpus_get_a_process_each_of_the_same_trainer() -> None:
    trainer = trainer_command("python", Path("/c/vits14.yaml"), Path("/runs/a"), ["optim.epochs=3"])
    assert shlex.join(trainer) == (
        "python -u -m pathfm.train --config-file /c/vits14.yaml --output-dir /runs/a optim.epochs=3"
    )
    assert shlex.join(one_process_per_gpu(trainer)) == (
        "python -u -m torch.distributed.run --standalone --nproc_per_node=gpu "
        "-m pathfm.train --config-file /c/vits14.yaml --output-dir /runs/a optim.epochs=3"
    )
