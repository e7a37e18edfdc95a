"""Where the ranks of a Slurm step meet. torch.distributed.run sets this by itself."""

import os
import socket
from collections.abc import Callable, Mapping

from pathfm.dist.env import Ranks

_FIRST_PORT, _PORTS = 20000, 20000  # below the range from which Linux hands out ports by itself


def rendezvous_url(
    ranks: Ranks,
    environment: Mapping[str, str] = os.environ,
    resolves: Callable[[str], bool] | None = None,
) -> str:
    """`env://` where MASTER_ADDR is set; in a Slurm step the first node's name, or its address if no name resolves.

    The port follows from the job id and the restart count, so that a requeued job never meets its own past.
    """
    if "MASTER_ADDR" in environment:
        return "env://"
    node = _first_node()
    if not (resolves or _resolves)(node):
        node = environment["SLURM_LAUNCH_NODE_IPADDR"]
    restart = int(environment.get("SLURM_RESTART_COUNT", "0"))
    port = _FIRST_PORT + (int(environment["SLURM_JOB_ID"]) * 7 + restart) % _PORTS
    return f"tcp://{node}:{port}"


def _first_node() -> str:
    from submitit.slurm.slurm import SlurmJobEnvironment  # its parser of node lists, not one of ours

    return SlurmJobEnvironment().hostnames[0]


def _resolves(node: str) -> bool:
    try:
        socket.getaddrinfo(node, None)
    except OSError:
        return False
    return True
