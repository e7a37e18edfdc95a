"""What the trainer asks of a method of self-supervision, whichever it is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from pathfm.batch import Batch


@dataclass(frozen=True)
class Losses:
    """One batch's losses. The mean over ranks of the gradients of `total` is the gradient of the global batch."""

    total: Float[Tensor, ""]  # to be backpropagated
    terms: Mapping[str, Float[Tensor, ""]]  # detached, on the device, scaled for display: what is logged


class Method(nn.Module, ABC):
    """A student, a teacher that follows it, and a loss between them. Its `state_dict` is what a run resumes."""

    student: nn.ModuleDict
    teacher: nn.ModuleDict

    @abstractmethod
    def losses(self, batch: Batch, teacher_temp: float) -> Losses:
        """Losses of a rank's batch (float crops). All ranks call this together."""

    @abstractmethod
    def update_teacher(self, momentum: float) -> None:
        """Close an optimiser step: teacher and centres move, once. All ranks call this together."""
