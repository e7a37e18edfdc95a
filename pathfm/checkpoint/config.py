"""Settings of checkpoints: recipe group `checkpoint`."""

from pydantic import Field

from pathfm.config import Section


class CheckpointConfig(Section):
    """How often a checkpoint is written and which ones stay."""

    every_epochs: float = Field(1.0, gt=0)  # the ancestors' train.save_frequency, a fraction or multiple of an epoch
    every_steps: int | None = Field(None, ge=1)  # in place of every_epochs
    keep_last: int = Field(3, ge=1)
    keep_every_steps: int | None = Field(None, ge=1)  # these stay for ever
    export_every_steps: int | None = Field(None, ge=1)  # the teacher's weights; None: only at the end
