"""Stochastic depth (arXiv 1603.09382) on packed tokens: a residual branch is left out for some of the crops.

T tokens of all crops together   S tokens of the crops that keep the branch   D width
The draws come from torch's default generator of the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pathfm.models.attention import Layout, token_slices

Branch = Callable[[Tensor, Layout], Tensor]

# Above this rate the branch is computed for a subset of the crops only (DINOv2 section 5, "efficient stochastic
# depth"): it saves the time of the others. Below it the subset's rounding would be coarser than the rate.
SUBSET_ABOVE_RATE = 0.1


def add_branch(tokens: Float[Tensor, "T D"], layout: Layout, branch: Branch, rate: float) -> Float[Tensor, "T D"]:
    """`tokens + branch(tokens)`, the branch dropped for a share `rate` of the crops and scaled up for the rest.

    The expectation over the draws equals the sum without dropping. Rate 0 (evaluation) draws nothing.
    """
    if rate == 0:
        return tokens + branch(tokens, layout)
    if rate <= SUBSET_ABOVE_RATE:
        return tokens + branch(tokens, layout) * _kept_or_zero(tokens, layout, rate)
    kept = draw_survivors(layout, rate, tokens.device)
    residual = branch(tokens.index_select(0, kept.rows), kept.layout) * kept.scale
    return tokens.index_add(0, kept.rows, residual.to(tokens.dtype))


@dataclass(frozen=True)
class Survivors:
    """The crops of every group that keep the branch."""

    rows: Int[Tensor, " S"]  # their tokens
    layout: Layout
    scale: Float[Tensor, "S 1"]  # crops of the group / crops that were kept


def draw_survivors(layout: Layout, rate: float, device: torch.device) -> Survivors:
    """Per group a random subset of max(1, floor(crops * (1 - rate))) crops."""
    rows, kept_layout, scales = [], [], []
    for where, crops, tokens in token_slices(layout):
        kept = max(1, int(crops * (1 - rate)))
        chosen = torch.randperm(crops, device=device)[:kept]
        rows.append((where.start + chosen[:, None] * tokens + torch.arange(tokens, device=device)).flatten())
        kept_layout.append((kept, tokens))
        scales.append(torch.full((kept * tokens, 1), crops / kept, device=device))
    return Survivors(torch.cat(rows), tuple(kept_layout), torch.cat(scales))


def _kept_or_zero(tokens: Tensor, layout: Layout, rate: float) -> Float[Tensor, "T 1"]:
    """Per token 1 / (1 - rate) when its crop keeps the branch, else 0."""
    factors = []
    for _, crops, tokens_per_crop in token_slices(layout):
        keeps = torch.rand(crops, device=tokens.device) >= rate
        factors.append(keeps.to(tokens.dtype).div(1 - rate).repeat_interleave(tokens_per_crop))
    return torch.cat(factors)[:, None]
