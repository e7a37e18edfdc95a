"""Where a run is trained: one cluster's partition, limits, container and set-up (`launchers/profiles/NAME.yaml`)."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pathfm.config import Layer, Section, build, read_layer
from pathfm.errors import UserError

# sbatch options that the launcher decides itself; a profile that set them too would be overruled or break a restart.
_OURS = [
    "account",
    "array",
    "chdir",
    "constraint",
    "cpus-per-task",
    "error",
    "gpus",
    "gpus-per-node",
    "gpus-per-task",
    "gres",
    "job-name",
    "mem",
    "mem-per-cpu",
    "mem-per-gpu",
    "no-requeue",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "partition",
    "qos",
    "requeue",
    "signal",
    "time",
]
_SLURM_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d\d))?(?::(\d\d))?")  # days, hours, minutes, seconds


class Container(Section):
    """The image in which every task runs; the launcher itself stays outside."""

    runtime: Literal["none", "apptainer", "docker", "podman", "pyxis"] = "none"
    image: str = (
        ""  # a .sif file or sandbox folder for apptainer, else a name with a digest (or a .sqsh file for pyxis)
    )
    binds: tuple[str, ...] = ()  # HOST:INSIDE[:ro]; the run, its recipe and the working directory are always bound
    python: str = "python"  # the interpreter inside the image
    code: Literal["snapshot", "baked"] = "snapshot"  # what runs: the copy made at submission, or the image's package
    options: tuple[str, ...] = ()  # further ones of the runtime, e.g. --device=/dev/infiniband for docker

    @property
    def has_the_code(self) -> bool:
        """The package is the image's own."""
        return self.runtime != "none" and self.code == "baked"

    @field_validator("binds")
    @classmethod
    def _binds_are_absolute(cls, binds: tuple[str, ...]) -> tuple[str, ...]:
        for bind in binds:
            parts = bind.split(":")
            if len(parts) not in (2, 3) or not all(part.startswith("/") for part in parts[:2]):
                raise ValueError(f"'{bind}' is not /HOST/PATH:/INSIDE/PATH or /HOST/PATH:/INSIDE/PATH:ro")
        return binds

    @model_validator(mode="after")
    def _a_runtime_has_an_image(self) -> "Container":
        if self.runtime != "none" and not self.image:
            raise ValueError(f"runtime {self.runtime} needs an image")
        return self


class Profile(Section):
    """One cluster as the launcher asks for it. Empty or None: the site's own default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # a node feature, e.g. a100
    time_limit_hours: float = Field(24.0, gt=0.1)
    signal_lead_s: int = Field(120, ge=30)  # USR2 comes this long before the limit: the time for a checkpoint
    gpus_per_node: int = Field(4, ge=0)  # one task per GPU; 0: a CPU cluster, one task per node
    gpu_type: str | None = None  # as in --gres=gpu:TYPE:N
    cpus_per_task: int = Field(8, ge=1)
    memory_per_node: str | None = Field(None, pattern=r"^\d+[KMGT]?$")  # e.g. 480G; "0" is the whole node
    container: Container = Container()
    setup: tuple[str, ...] = ()  # shell lines before the job, e.g. module load apptainer
    environment: dict[str, str] = Field({})  # variables of every task; secrets do not belong here
    srun: tuple[str, ...] = ()  # further options of srun, e.g. --cpu-bind=cores, --mpi=none
    sbatch: dict[str, str | int | bool] = Field({})  # further sbatch options by their long names, e.g. exclusive: true

    @property
    def tasks_per_node(self) -> int:
        return max(1, self.gpus_per_node)

    @model_validator(mode="after")
    def _the_warning_comes_within_the_limit(self) -> "Profile":
        limit_s = self.time_limit_hours * 3600
        if self.signal_lead_s >= limit_s:
            raise ValueError(
                f"signal_lead_s {self.signal_lead_s} is not within time_limit_hours {self.time_limit_hours:g} "
                f"({limit_s:g} s); set it below that"
            )
        return self

    @field_validator("sbatch")
    @classmethod
    def _options_are_not_ours(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        options = {name.lstrip("-").replace("_", "-"): value for name, value in options.items()}
        if taken := [name for name in _OURS if name in options]:
            raise ValueError(f"'{taken[0]}' is set by the launcher or by the profile's own keys, not under 'sbatch'")
        return options

    @field_validator("environment")
    @classmethod
    def _names_are_names(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            if not name.isidentifier():
                raise ValueError(f"'{name}' cannot be the name of an environment variable")
        return environment


def read_profile(path: Path, changes: Mapping[str, Any] | None = None) -> Profile:
    """The file, with `changes` from the command line. Raises `UserError`, one line, for whatever is wrong in them."""
    defaults = Layer("the defaults", Profile().model_dump(mode="json"))
    return build(Profile, [defaults, read_layer(path), Layer("the command line", dict(changes or {}))])


def hours(text: str) -> float:
    """`48`, `0.5`, or Slurm's `48:00:00`, `2-00:00:00`, `2-00`. Raises `UserError` for anything else."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    match = _SLURM_TIME.fullmatch(text)
    if not match or not (match[1] or match[4]):  # 10:00 could be minutes as well as hours
        raise UserError(f"'{text}' is no time limit; give hours, as in 48 or 0.5, or D-HH:MM:SS")
    days, whole_hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 24 + whole_hours + minutes / 60 + seconds / 3600
