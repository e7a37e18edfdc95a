"""A command, wrapped so that it runs inside the profile's image. Pure."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from pathfm.launch.profile import Container

# docker hands over no variable that is not named; these tell a task its rank, its GPUs and how to report.
_PASSED_TO_DOCKER = [
    "CUDA_VISIBLE_DEVICES",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
    "SLURM_STEP_ID",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
    "SLURM_NODEID",
    "SLURM_NNODES",
    "SLURM_STEP_NODELIST",
    "SLURM_LAUNCH_NODE_IPADDR",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "WANDB_MODE",
]


def inside(
    container: Container,
    command: Sequence[str],
    *,
    working_directory: Path,
    needs: Iterable[Path],
    with_gpus: bool,
    environment: Iterable[str] = (),
    user: str = "",
) -> list[str]:
    """`command` in the image. `needs`: folders that must be seen there at the same path, beside the profile's binds.

    For docker, which takes nothing over from the host: `environment` names the variables that the tasks read beyond
    rank and GPUs, `user` (as UID:GID) is who will own the files of the run.
    """
    if container.runtime == "none":
        return list(command)
    binds = [*container.binds, *(f"{path}:{path}" for path in _outermost([working_directory, *needs]))]
    if container.runtime == "apptainer":
        start = [*_apptainer(binds, with_gpus), "--pwd", str(working_directory)]
    else:
        names = dict.fromkeys([*_PASSED_TO_DOCKER, *environment])
        start = [*_docker(binds, with_gpus, names, user), "--workdir", str(working_directory)]
    return [*start, container.image, *command]


def host_path(container: Container, path: Path) -> Path | None:
    """Where the host has what lies at `path` in the image, as the profile binds it; None: the profile does not."""
    for bind in sorted(container.binds, key=lambda bind: -len(bind.split(":")[1])):  # the innermost wins
        host, inside_image = bind.split(":")[:2]
        if path.is_relative_to(inside_image):
            return Path(host) / path.relative_to(inside_image)
    return None


def _apptainer(binds: Sequence[str], with_gpus: bool) -> list[str]:
    # the environment, the user, the network and /dev/shm are the host's without being asked for
    gpus = ["--nv"] if with_gpus else []
    return ["apptainer", "exec", *gpus, *_repeated("--bind", binds)]


def _docker(binds: Sequence[str], with_gpus: bool, environment: Iterable[str], user: str) -> list[str]:
    # --init: a first process that hands signals on and reaps workers
    start = ["docker", "run", "--rm", "--init"]
    owner = ["--user", user] if user else []
    # what NCCL between nodes and loader workers need
    shared = ["--network=host", "--ipc=host", "--ulimit=memlock=-1"]
    gpus = ["--gpus=all"] if with_gpus else []
    return [*start, *owner, *shared, *gpus, *_repeated("--env", environment), *_repeated("--volume", binds)]


def _repeated(option: str, values: Iterable[str]) -> list[str]:
    return [part for value in values for part in (option, value)]


def _outermost(paths: Iterable[Path]) -> list[Path]:
    """The paths without those that lie inside another one, in the order given."""
    unique = list(dict.fromkeys(paths))
    return [path for path in unique if not any(other in path.parents for other in unique)]
