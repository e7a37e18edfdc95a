"""Options of the launchers that say where on Slurm, and what becomes of them. For login nodes: no torch."""

import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass

from pathfm.config import find_file
from pathfm.errors import UserError
from pathfm.jobs.arguments import CONFIGS
from pathfm.launch.profile import Profile, hours, read_profile

PROFILES = CONFIGS.parent / "launchers" / "profiles"
# Keys of the profile, further options of sbatch, and how to submit: none of them means anything without Slurm.
_OF_PROFILE = ("gpus_per_node", "partition", "account", "qos", "constraint", "time")
_OF_SBATCH = ("exclude", "dependency", "reservation", "comment")
_SLURM_ALONE = ("nodes", "profile", *_OF_PROFILE, *_OF_SBATCH, "parallel", "live", "resubmit")


def for_slurm_alone(arguments: Namespace, parser: ArgumentParser, *further: str) -> list[str]:
    """The options that were given and mean nothing on this machine. `further`: the launcher's own such options."""
    names = (*_SLURM_ALONE, *further)
    return [name for name in names if getattr(arguments, name) != parser.get_default(name)]


@dataclass(frozen=True)
class Place:
    """One cluster, as this submission asks for it."""

    profile: Profile
    nodes: int
    options: Mapping[str, str | int | bool]  # further ones of sbatch, by long names
    parallel: int | None  # how many jobs of an array may run at once
    is_live: bool  # the checkout is run, not a copy
    resubmit: bool

    @property
    def ranks(self) -> int:
        return self.nodes * self.profile.tasks_per_node

    @property
    def size_in_words(self) -> str:
        return f"{self.nodes} x {self.profile.tasks_per_node} tasks"


def add_options(parser: ArgumentParser) -> None:
    where = parser.add_argument_group("on Slurm: where", "The first six overrule the profile; more is said there.")
    where.add_argument("--gpus-per-node", type=int, metavar="N", help="one task each; 0: no GPUs, one task per node")
    where.add_argument("--partition", metavar="NAME")
    where.add_argument("--account", metavar="NAME")
    where.add_argument("--qos", metavar="NAME")
    where.add_argument("--constraint", metavar="FEATURES", help="of the nodes, e.g. a100")
    where.add_argument("--time", metavar="HOURS", help="the limit of the job, or as D-HH:MM:SS")
    where.add_argument("--profile", metavar="NAME", help="in launchers/profiles/, or a path (default: slurm)")
    where.add_argument("--nodes", type=int, default=1, metavar="N", help="(default: 1)")
    where.add_argument("--exclude", metavar="NODES", help="nodes to do without")
    where.add_argument("--reservation", metavar="NAME")
    where.add_argument("--dependency", metavar="SPEC", help="what is waited for, e.g. afterok:1234")
    where.add_argument("--comment", metavar="TEXT")
    how = parser.add_argument_group("on Slurm: how")
    how.add_argument("--parallel", type=int, metavar="N", help="how many jobs of an array may run at once")
    how.add_argument("--resubmit", action="store_true", help="go on with what a job that ended has left")
    how.add_argument("--live", action="store_true", help="run this checkout, not a copy: later changes are in the job")


def place_of(arguments: Namespace, *, is_array: bool, array_by: str) -> Place:
    """`array_by`: what makes several jobs of one. Raises `UserError` for whatever is wrong with it by itself."""
    profile = read_profile(find_file(arguments.profile or "slurm", PROFILES, "profile"), _changes(arguments))
    if arguments.nodes < 1:
        raise UserError(f"--nodes is {arguments.nodes}; a job has at least 1")
    if arguments.parallel is not None and (arguments.parallel < 1 or not is_array):
        raise UserError(f"--parallel N is for several jobs, of which at least one runs: add {array_by}")
    options = {name: value for name in _OF_SBATCH if (value := getattr(arguments, name)) is not None}
    return Place(profile, arguments.nodes, options, arguments.parallel, arguments.live, arguments.resubmit)


def demand_slurm(otherwise: str) -> None:
    """Raises `UserError` with another way when Slurm's programs are not here."""
    if not (shutil.which("sbatch") and shutil.which("srun")):
        raise UserError(
            f"there is no Slurm here (sbatch and srun are not on PATH); {otherwise}, "
            "or see what would be submitted with --dry-run"
        )


def _changes(arguments: Namespace) -> dict[str, str | int | float]:
    """Of the profile, by the command line."""
    given = {name: value for name in _OF_PROFILE if (value := getattr(arguments, name)) is not None}
    if "time" in given:
        given["time_limit_hours"] = hours(given.pop("time"))
    return given
