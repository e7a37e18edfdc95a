"""Losses over the pixels that count.

n pictures   C classes   H, W size in px   N pixels that count
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

IGNORED = 255  # a class index that is no class: such pixels count nowhere
_FAR_FROM_ZERO = 1e-8  # the square root has no slope at 0


def pixel_cross_entropy(logits: Float[Tensor, "n C H W"], target: Int[Tensor, "n H W"]) -> Float[Tensor, ""]:
    """The mean of -log p(class of the pixel) over pixels that are not `IGNORED`; 0 when there are none."""
    total = functional.cross_entropy(logits.float(), target.long(), ignore_index=IGNORED, reduction="sum")
    return total / (target != IGNORED).sum().clamp(min=1)


def scale_invariant_log_loss(
    predicted: Float[Tensor, "n H W"], target: Float[Tensor, "n H W"], invariance: float = 0.85
) -> Float[Tensor, ""]:
    """SigLoss (Eigen et al., arXiv 1406.2283, eq. 4, as a square root; AdaBins and DINOv2's depth heads).

    With g = log predicted - log target of every pixel:  loss = sqrt(mean(g^2) - invariance * mean(g)^2).
    With invariance 1 a common factor costs nothing; with 0 it is the root mean square of g.
    Pixels whose target is not a positive number do not count; 0 when none does.
    """
    counts = is_known(target)
    # A log of what does not count would make the gradient nan, though it is multiplied by 0.
    pairs = predicted.float().clamp(min=_FAR_FROM_ZERO)[counts].log() - target.float()[counts].log()
    if not len(pairs):
        return predicted.sum() * 0
    spread = pairs.square().mean() - invariance * pairs.mean().square()
    return torch.sqrt(spread.clamp(min=0) + _FAR_FROM_ZERO)


def is_known(target: Tensor) -> Tensor:
    """Where a measured value is: a finite number above 0."""
    return torch.isfinite(target) & (target > 0)
