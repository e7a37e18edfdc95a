"""Work that could go to a cluster, done on this machine instead, one after the other. No torch."""

import shlex
import sys
from collections.abc import Sequence

from pathfm.errors import UserError
from pathfm.jobs.before_queue import stop_at
from pathfm.jobs.slurm_order import Work
from pathfm.launch.local import gpus_of_this_machine, run_local
from pathfm.launch.payload import one_process_per_gpu


def run_here(
    works: Sequence[Work], problems: Sequence[str], of_slurm: Sequence[str], *, does: str, dry_run: bool
) -> int:
    """On all GPUs of this machine; `dry_run` prints the commands. Returns the first exit status that is not 0.

    `of_slurm`: options that were given and are for Slurm alone, which is a mistake. `does`: the verb for messages.
    """
    if of_slurm:
        option = f"--{of_slurm[0].replace('_', '-')}"
        raise UserError(f"{option} is for --cluster slurm; --cluster local {does} on this machine alone")
    several = gpus_of_this_machine() > 1
    for work in works:
        command = [sys.executable, *work.arguments]
        command = one_process_per_gpu(command) if several else command
        if dry_run:
            print(shlex.join(command))
            continue
        stop_at(problems)
        if status := run_local(command, work.run_dir / "logs" / "submitit"):
            return status
    return 0
