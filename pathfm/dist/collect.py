"""What all ranks do together. Every function has a meaning for one process alone: it gives its input back."""

from collections.abc import Callable, Sequence
from typing import TypeVar, cast

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


def average_over_ranks_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all ranks, in place, in one message per dtype."""
    if not _several():
        return
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def gather_rows(own: Tensor) -> Tensor:
    """The rows [B, ...] of all ranks as [ranks * B, ...] in rank order; only this rank's own rows carry a gradient."""
    if not _several():
        return own
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own.detach().contiguous())
    parts[dist.get_rank()] = own
    return torch.cat(parts)


def agree_any(flag: bool) -> bool:
    """True on every rank as soon as it is true on one."""
    if not _several():
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def decided_by_first(decide: Callable[[], Item]) -> Item:
    """Rank 0 decides, all ranks get the answer; its exception too is raised on all, so that none waits for ever."""
    if not _several():
        return decide()
    holder: list[Item | Exception | None] = [None]
    if dist.get_rank() == 0:
        try:
            holder = [decide()]
        except Exception as error:
            holder = [error]
    dist.broadcast_object_list(holder, src=0)
    if isinstance(answer := holder[0], Exception):
        raise answer
    return cast(Item, answer)


def gather_lists(items: list[Item]) -> list[Item]:
    """The lists of all ranks joined in rank order, on every rank."""
    if not _several():
        return list(items)
    lists: list[list[Item]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
