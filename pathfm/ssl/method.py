"""What the trainer asks of a method of self-supervision, whichever it is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from pathfm.batch import Batch
from pathfm.ssl.health import Look
from pathfm.ssl.network import Network

Redraw = Callable[[int], None]


def drawn_once(part: int) -> None:
    """For networks without drop path, or parts that are seen once: nothing is drawn again."""


@dataclass(frozen=True)
class Losses:
    """Of one part of a batch. The mean of the gradients of `total` over parts and ranks is that of the global batch."""

    total: Float[Tensor, ""]  # to be backpropagated
    terms: Mapping[str, Float[Tensor, ""]]  # detached, on the device, scaled for display: what is logged


class Method(nn.Module, ABC):
    """A student, a teacher that follows it, and a loss between them. Its `state_dict` is what a run resumes."""

    student: Network
    teacher: Network

    @abstractmethod
    def losses_of_parts(
        self, parts: Sequence[Batch], teacher_temp: float, redraw: Redraw = drawn_once, look: Look | None = None
    ) -> Iterator[Losses]:
        """Losses of equal consecutive parts of a rank's batch, one at a time: backpropagate before asking for more.

        They are those of the whole batch, however many parts it comes in. `redraw(part)` is called before the student
        sees a part, maybe twice, and sets the generator of drop path to that part's beginning. `look`, if there is
        one, is shown every part at the class tokens' head.
        All ranks call this together, with as many parts.
        """

    def losses(self, batch: Batch, teacher_temp: float) -> Losses:
        """The same of a rank's batch that is seen at once. All ranks call this together."""
        (losses,) = self.losses_of_parts([batch], teacher_temp)
        return losses

    @abstractmethod
    def update_teacher(self, momentum: float) -> None:
        """Close an optimiser step: teacher and centres move, once. All ranks call this together."""
