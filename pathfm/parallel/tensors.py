"""Tensors that may be spread over ranks: the part that is here, and the whole."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it: a view, not a copy."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_from_all(tensor: Tensor) -> Tensor:
    """All of it, on every rank. All ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole_tensors_from_all(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """All of each, in CPU memory, on the ranks that `keep` them; elsewhere {}. All ranks call this together.

    One after the other, so that no GPU holds more than one whole tensor.
    """
    kept = {}
    for name, tensor in tensors.items():
        whole = whole_from_all(tensor.detach())
        if keep:
            kept[name] = whole.to("cpu", copy=True)
    return kept
