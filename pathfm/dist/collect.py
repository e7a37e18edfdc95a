"""What all ranks do together. Every function has a meaning for one process alone: it gives its input back."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over all ranks, as a new tensor; not differentiable."""
    if not _several():
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


class _Sum(torch.autograd.Function):
    """What a rank adds reaches the losses of all ranks, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return sum_over_ranks(gradient)


def sum_with_gradient(values: Tensor) -> Tensor:
    """The elementwise sum over all ranks, differentiable: backward all ranks sum their gradients."""
    return cast(Tensor, _Sum.apply(values)) if _several() else values


def gather_rows(own: Tensor) -> Tensor:
    """The rows [B, ...] of all ranks as [ranks * B, ...] in rank order; only this rank's own rows carry a gradient."""
    if not _several():
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def gather_uneven_rows(own: Tensor) -> Tensor:
    """The rows [n, ...] of all ranks in rank order, on every rank; each has its own n >= 0. Not differentiable."""
    if not _several():
        return own
    counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(own)], device=own.device))
    lengths = [int(count) for count in counts]
    sent = own.new_zeros((max(lengths), *own.shape[1:]))  # collectives want equal shapes
    sent[: len(own)] = own.detach()
    parts = [torch.empty_like(sent) for _ in lengths]
    dist.all_gather(parts, sent)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def agree_any(flag: bool) -> bool:
    """True on every rank as soon as it is true on one."""
    if not _several():
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def decided_by_first(decide: Callable[[], Item], group: dist.ProcessGroup | None = None) -> Item:
    """Rank 0 decides, all ranks get the answer; its exception too is raised on all, so that none waits for ever.

    `group`: all ranks too, for threads that must not meet the main ones.
    """
    if not _several():
        return decide()
    holder: list[Item | Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            holder = [decide()]
        except Exception as error:
            holder = [error]
    dist.broadcast_object_list(holder, src=0, group=group)
    if isinstance(answer := holder[0], Exception):
        raise answer
    return cast(Item, answer)


def gather_lists(items: list[Item], group: dist.ProcessGroup | None = None) -> list[Item]:
    """The lists of all ranks joined in rank order, on every rank. `group` as in `decided_by_first`."""
    if not _several():
        return list(items)
    lists: list[list[Item]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items, group=group)
    return [item for part in lists for item in part]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
