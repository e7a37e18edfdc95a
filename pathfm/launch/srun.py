"""The command that puts the payload on every task of a Slurm job. Pure."""

from collections.abc import Sequence


def srun_command(
    nodes: int,
    tasks_per_node: int,
    cpus_per_task: int,
    payload: Sequence[str],
    *,
    output: str,
    options: Sequence[str] = (),
) -> list[str]:
    """`nodes` x `tasks_per_node` copies of `payload`; when one of them fails, Slurm ends the others at once.

    `output`: the log of a task, with %t in the place of its rank. `options`: further ones, from the profile.
    """
    return [
        "srun",
        "--kill-on-bad-exit=1",
        f"--nodes={nodes}",
        f"--ntasks={nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        f"--cpus-per-task={cpus_per_task}",  # srun of Slurm 22.05 and later does not take it over from sbatch
        f"--output={output}",
        *options,
        *payload,
    ]
