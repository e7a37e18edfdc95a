"""Settings of what is reported where: recipe group `wandb`."""

from typing import Literal

from pydantic import Field

from pathfm.config import Section


class WandbConfig(Section):
    """Weights & Biases. `WANDB_MODE` in the environment wins over `enable` and `mode`."""

    enable: bool = False
    mode: Literal["online", "offline"] = "online"
    project: str = "pathfm"
    username: str | None = None  # the entity: a person or a team
    exp_name: str | None = None  # None: the run's name
    group: str | None = None
    tags: tuple[str, ...] = ()
    resume_id: str | None = None  # None: drawn at the first start and kept in the run
    log_teacher: bool = False  # every export as an artifact that says where it lies; nothing is uploaded
    finish_within_s: float = Field(30.0, gt=0)  # that a run's end may wait; the rest is sent by 'pathfm wandb-sync'
