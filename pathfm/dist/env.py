"""Which rank this process is: told by torch.distributed.run, by Slurm, or alone."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    ranks_per_node: int = 1

    @property
    def is_first(self) -> bool:
        """Rank 0 writes files and speaks; it never computes alone what others wait for."""
        return self.rank == 0


ALONE = Ranks()


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
    """torchrun's variables win over Slurm's, because torchrun may itself have been started by srun."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_STEP_ID" in environment and environment.get("SLURM_STEP_ID", "").isdigit():
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        return Ranks()
    rank, world_size, local_rank, per_node = (_first_number(environment.get(name, "0")) for name in names)
    return Ranks(rank, max(world_size, 1), local_rank, max(per_node, 1))


def _first_number(text: str) -> int:
    """Slurm writes the tasks of equal nodes as `4(x2)`, of unequal ones as `4,2`."""
    match = re.match(r"\d+", text)
    if match is None:
        raise ValueError(f"{text!r} in the environment of this rank is no number")
    return int(match[0])
