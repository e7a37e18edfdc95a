"""What ranks tell each other between two steps, so that all act at the same one: a few small numbers, their maximum.

Asked at step k and read at step k + 1: the message travels while the step is computed, and costs next to nothing.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class Agreement:
    """Over a group of CPU ranks, not NCCL: the agreement must still work when a GPU is stuck."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """`group`: None for a process that is alone, which agrees with itself at once."""
        self._group = group
        self._numbers: Tensor | None = None
        self._under_way: dist.Work | None = None

    def exchange(self, mine: list[int]) -> list[int]:
        """Say this rank's numbers; hear the maximum, over all ranks, of those said at the call before (zeros at first).

        All ranks call this together, with as many numbers. Raises what the group raises when a rank is lost.
        """
        if self._group is None:
            return mine
        heard = self._heard(len(mine))
        self._numbers = torch.tensor(mine, dtype=torch.int64)
        self._under_way = dist.all_reduce(self._numbers, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return heard

    def _heard(self, how_many: int) -> list[int]:
        if self._under_way is None or self._numbers is None:
            return [0] * how_many
        self._under_way.wait()
        heard: list[int] = self._numbers.tolist()
        return heard
