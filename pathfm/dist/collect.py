"""What all ranks do together. Every function has a meaning for one process alone: it gives its input back."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


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
        torch._foreach_copy_(group, [part.view_as(tensor) for part, tensor in zip(parts, group, strict=True)])


def agree_any(flag: bool) -> bool:
    """True on every rank as soon as it is true on one."""
    if not _several():
        return flag
    votes = torch.tensor([int(flag)])
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def same_on_all_ranks(value: object) -> object:
    """Rank 0's value on every rank."""
    if not _several():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def wait_for_all_ranks() -> None:
    if _several():
        dist.barrier()


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
