"""The factor that keeps small gradients of fp16 above zero (arXiv 1710.03740), the same on every rank.

torch's own scaler judges the gradients that a rank holds; with sharded ones ranks would come to differ. Here ranks
have agreed already, and the host is not asked. fp32 and bf16 have the range they need: their factor is 1 for ever.
"""

import torch
from torch import Tensor

_INITIAL = 65536.0  # as torch.amp.GradScaler begins
_GROWTH_INTERVAL = 2000  # finite steps in a row after which the factor doubles; as torch.amp.GradScaler


class LossScale:
    """`value` multiplies the loss and divides the gradients."""

    def __init__(self, device: torch.device, *, dynamic: bool) -> None:
        self.dynamic = dynamic
        self.value = torch.full((), _INITIAL if dynamic else 1.0, device=device)
        self.finite_steps = torch.zeros((), device=device)  # since the factor last changed

    def update(self, finite: Tensor) -> None:
        """After a step whose gradients were finite on all ranks, or not."""
        if not self.dynamic:
            return
        count = torch.where(finite, self.finite_steps + 1, 0)
        grows = count >= _GROWTH_INTERVAL
        self.value.mul_(torch.where(finite, torch.where(grows, 2.0, 1.0), 0.5))
        self.finite_steps.copy_(torch.where(grows, 0, count))

    def can_shrink(self) -> Tensor:
        """Whether gradients that are not finite may be no more than too large a factor: then it is halved, no harm."""
        return self.value > 1.0

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {"value": self.value, "finite_steps": self.finite_steps} if self.dynamic else {}
