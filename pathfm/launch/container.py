"""A command as every task of a job starts it: as it is, or inside the profile's image. Pure.

Apptainer and pyxis hand the host's environment over; docker and podman only what is named, which is done by name, so
that no value (a W&B key) is ever on a command line.
"""

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathfm.launch.profile import Container

# Families of variables that a task reads: its rank, its GPUs, the network, how to report.
_FAMILIES = ("CUDA", "FI", "GLOO", "NCCL", "NVIDIA", "OMP", "PATHFM", "SLURM", "SLURMD", "TORCH", "UCX", "WANDB")
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LABEL = "pathfm.run"

# docker's daemon is outside of the job: it must be told the GPUs by their numbers on the node, and inside they count
# from zero. `exec`, so that docker itself receives the signals of the task, which it hands on.
_DOCKER_RUN = """\
gpus=all
if [ -n "$SLURM_STEP_GPUS" ]; then gpus="\\"device=$SLURM_STEP_GPUS\\""; unset CUDA_VISIBLE_DEVICES; fi
exec docker run --env-file <(env | grep -E "$1") ${2:+"$2=$gpus"} "${@:3}\""""


@dataclass(frozen=True)
class Needs:
    """What a task must find inside, beside the profile's binds."""

    working_directory: Path
    run_dir: Path
    folders: tuple[Path, ...] = ()  # seen at the same path
    read_only: tuple[Path, ...] = ()  # likewise, and not to be changed: the code
    gpus: bool = True
    environment: tuple[str, ...] = ()  # names of variables beyond rank, GPUs, network and W&B
    user: str = ""  # UID:GID who will own the files of the run, where the container has users of its own

    @property
    def writable(self) -> list[Path]:
        return _outermost([self.working_directory, self.run_dir.parent, *self.folders])


def task_command(container: Container, command: Sequence[str], needs: Needs) -> list[str]:
    """What srun starts for every task."""
    if container.has_the_code:
        command = ["env", "--unset=PYTHONPATH", *command]  # there the supervisor finds its own
    if container.runtime in ("none", "pyxis"):
        return list(command)
    start = {"apptainer": _apptainer, "docker": _docker, "podman": _podman}[container.runtime]
    return [*start(container, needs), container.image, *command]


def srun_options(container: Container, needs: Needs) -> list[str]:
    """What srun is told about the image: pyxis is a plugin of Slurm's."""
    if container.runtime != "pyxis":
        return []
    image = [f"--container-image={container.image}", f"--container-mounts={','.join(_binds(container, needs))}"]
    return [
        *image,
        f"--container-workdir={needs.working_directory}",
        f"--container-env={','.join(needs.environment)}",  # these overrule the image's own
        "--no-container-remap-root",
        "--no-container-entrypoint",
        *container.options,
    ]


def removal_command(container: Container, run_dir: Path) -> list[str]:
    """For every node: end what a killed task may have left, because its container is no child of it. Or nothing."""
    if container.runtime not in ("docker", "podman"):
        return []
    program, label = container.runtime, shlex.quote(f"label={_label(run_dir)}")
    listing = f"{program} ps --all --quiet --filter {label}"
    return ["sh", "-c", f"{listing} | xargs --no-run-if-empty {program} rm --force"]


def host_path(container: Container, path: Path) -> Path | None:
    """Where the host has what lies at `path` in the image, as the profile binds it; None: the profile does not."""
    for bind in sorted(container.binds, key=lambda bind: -len(bind.split(":")[1])):  # the innermost wins
        host, inside_image = bind.split(":")[:2]
        if path.is_relative_to(inside_image):
            return Path(host) / path.relative_to(inside_image)
    return None


def _apptainer(container: Container, needs: Needs) -> list[str]:
    # the environment, the user, the network and /dev/shm are the host's without being asked for
    gpus = ["--nv"] if needs.gpus else []
    binds = _repeated("--bind", _binds(container, needs))
    return ["apptainer", "exec", *gpus, *binds, "--pwd", str(needs.working_directory), *container.options]


def _docker(container: Container, needs: Needs) -> list[str]:
    owner = ["--user", needs.user] if needs.user else []
    exact = [*_PROXIES, *needs.environment]
    names = "|".join([f"({'|'.join(_FAMILIES)})_[A-Z0-9_]*", *dict.fromkeys(exact)])
    gpus = "--gpus" if needs.gpus else ""
    return ["bash", "-c", _DOCKER_RUN, "docker", f"^({names})=", gpus, *owner, *_isolated(container, needs)]


def _podman(container: Container, needs: Needs) -> list[str]:
    gpus = ["--device=nvidia.com/gpu=all"] if needs.gpus else []
    names = [*(f"{family}_*" for family in _FAMILIES), *_PROXIES, *needs.environment]
    environment = _repeated("--env", dict.fromkeys(names))
    return ["podman", "run", "--userns=keep-id", *gpus, *environment, *_isolated(container, needs)]


def _isolated(container: Container, needs: Needs) -> list[str]:
    """What docker and podman have in common."""
    return [
        "--rm",
        "--init",  # a first process that hands signals on and reaps workers
        "--label",
        _label(needs.run_dir),
        "--network=host",  # NCCL between nodes
        "--ipc=host",  # loader workers, NCCL within a node
        "--ulimit=memlock=-1",  # RDMA
        "--security-opt=label=disable",  # or SELinux hides the binds
        *_repeated("--volume", _binds(container, needs)),
        "--workdir",
        str(needs.working_directory),
        *container.options,
    ]


def _binds(container: Container, needs: Needs) -> list[str]:
    """A folder inside another one comes after it."""
    return [
        *container.binds,
        *(f"{path}:{path}" for path in needs.writable),
        *(f"{path}:{path}:ro" for path in needs.read_only),
    ]


def _label(run_dir: Path) -> str:
    return f"{_LABEL}={run_dir}"


def _repeated(option: str, values: Iterable[str]) -> list[str]:
    return [part for value in values for part in (option, value)]


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """The paths without those that lie inside another one, in the order given."""
    unique = list(dict.fromkeys(paths))
    return [path for path in unique if not any(other in path.parents for other in unique)]
