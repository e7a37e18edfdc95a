"""Settings of checkpoints: recipe group `checkpoint`. None of them changes what is trained."""

from pydantic import Field

from pathfm.config import Section


class CheckpointConfig(Section):
    """How often a checkpoint is written, which ones stay, and what happens when the disk or the time runs out."""

    every_epochs: float = Field(1.0, gt=0)  # the ancestors' train.save_frequency, a fraction or multiple of an epoch
    every_steps: int | None = Field(None, ge=1)  # in place of every_epochs
    keep_last: int = Field(3, ge=1)
    keep_every_steps: int | None = Field(None, ge=1)  # these stay for ever
    export_every_steps: int | None = Field(None, ge=1)  # the teacher's weights; None: only at the end
    in_background: bool = True  # training goes on while a checkpoint is written, for the price of a copy in memory
    leave_within_s: float = Field(90.0, gt=0)  # after a signal: then this process is gone, saved or not
    retry_after_s: float = Field(30.0, ge=0)  # after a failed write
    alarm_after_failures: int = Field(3, ge=1)  # in a row
