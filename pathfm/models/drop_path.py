"""Stochastic depth (arXiv 1603.09382) on packed tokens: a residual branch is left out for some of the crops.

T tokens of all crops together   S tokens of the crops that keep the branch   D width
The draws come from torch's default generator of the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pathfm.models.attention import Layout, token_slices

Branch = Callable[[Tensor, Layout], Tensor]

# Above this rate the branch is computed for a subset of the crops only (DINOv2 section 5, "efficient stochastic
# depth"): it saves the time of the others. Below it the subset's rounding would be coarser than the rate.
SUBSET_ABOVE_RATE = 0.1


def share_computed(rate: float) -> float:
    """Of the crops, those for which a branch is computed in training at a rate, but for rounding."""
    return 1 - rate if rate > SUBSET_ABOVE_RATE else 1.0


@dataclass(frozen=True)
class Survivors:
    """The crops of every group that keep the branch."""

    rows: Int[Tensor, " S"]  # their tokens
    layout: Layout
    scale: Float[Tensor, "S 1"]  # crops of the group / crops that were kept


Drawn = Survivors | Float[Tensor, "T 1"] | None  # who keeps the branch; or every token's factor; or nothing is dropped


def draw(tokens: Float[Tensor, "T D"], layout: Layout, rate: float) -> Drawn:
    """Drop a branch of these tokens for a share `rate` of the crops. Rate 0 (evaluation) draws nothing.

    Drawing is apart from adding, so that what is added is the same arithmetic at every step, compiled or not.
    """
    if rate == 0:
        return None
    return _kept_or_zero(tokens, layout, rate) if rate <= SUBSET_ABOVE_RATE else _survivors(tokens, layout, rate)


def add_branch(tokens: Float[Tensor, "T D"], layout: Layout, branch: Branch, drawn: Drawn) -> Float[Tensor, "T D"]:
    """`tokens + branch(tokens)`, the branch dropped for some of the crops and scaled up for the rest.

    The expectation over the draws equals the sum without dropping.
    """
    if drawn is None:
        return tokens + branch(tokens, layout)
    if isinstance(drawn, Tensor):
        return torch.addcmul(tokens, branch(tokens, layout), drawn)
    residual = branch(tokens.index_select(0, drawn.rows), drawn.layout) * drawn.scale
    return _AddedToRows.apply(tokens, residual.to(tokens.dtype), drawn.rows)


class _AddedToRows(torch.autograd.Function):
    """`tokens.index_add(0, rows, residual)`, which by itself keeps the residual for its gradient's shape: a fifth of
    what a block keeps."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, residual: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return tokens.index_add(0, rows, residual)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (rows,) = ctx.saved_tensors
        return gradient, gradient.index_select(0, rows), None


def _survivors(tokens: Tensor, layout: Layout, rate: float) -> Survivors:
    """Per group a random subset of max(1, floor(crops * (1 - rate))) crops."""
    rows, kept_layout, scales = [], [], []
    device = tokens.device
    for where, crops, length in token_slices(layout):
        kept = max(1, int(crops * (1 - rate)))
        chosen = torch.randperm(crops, device=device)[:kept]
        rows.append((where.start + chosen[:, None] * length + torch.arange(length, device=device)).flatten())
        kept_layout.append((kept, length))
        scales.append(torch.full((kept * length, 1), crops / kept, device=device))
    return Survivors(torch.cat(rows), tuple(kept_layout), torch.cat(scales))


def _kept_or_zero(tokens: Tensor, layout: Layout, rate: float) -> Float[Tensor, "T 1"]:
    """Per token 1 / (1 - rate) when its crop keeps the branch, else 0."""
    factors = []
    for _, crops, length in token_slices(layout):
        keeps = torch.rand(crops, device=tokens.device) >= rate
        factors.append(keeps.to(tokens.dtype).div(1 - rate).repeat_interleave(length))
    return torch.cat(factors)[:, None]
