"""How teacher logits become the distributions that the student is asked for: centring or Sinkhorn-Knopp.

N rows (crops or masked patches of this rank)   K prototypes
`total` sums a tensor over all ranks; with it every rank computes with the numbers of the whole global batch.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pathfm.ssl.config import Centering

Total = Callable[[Tensor], Tensor]
Gather = Callable[[Tensor], Tensor]

CENTER_MOMENTUM = 0.9  # DINO, arXiv 2104.14294, section 5.1
SINKHORN_ITERATIONS = 3  # SwAV, arXiv 2006.09882, section 4


def alone(tensor: Tensor) -> Tensor:
    """The sum over ranks, or the rows of all ranks, when there is only one."""
    return tensor


def centred_softmax(logits: Float[Tensor, "N K"], center: Float[Tensor, "1 K"], temp: float) -> Float[Tensor, "N K"]:
    """softmax((logits - center) / temp) (DINO, arXiv 2104.14294, section 3.1)."""
    return torch.softmax((logits.float() - center) / temp, dim=-1)


@torch.no_grad()
def sinkhorn_knopp(
    logits: Float[Tensor, "N K"], temp: float, iterations: int = SINKHORN_ITERATIONS, total: Total = alone
) -> Float[Tensor, "N K"]:
    """Soft assignments that use all prototypes equally (SwAV, arXiv 2006.09882, section 3; DINOv2 section 4).

    exp(logits / temp), then in turn: every prototype's sum over the samples of all ranks made equal, every sample's
    sum over prototypes made 1. N may be 0 on a rank and differ between ranks. All ranks call this together.
    """
    # In place: with many masked patches and prototypes one copy takes gigabytes.
    assignments = (logits.float() / temp).exp_()
    num_prototypes = assignments.shape[1]
    num_samples = total(torch.full((), float(len(assignments)), device=assignments.device))
    assignments /= total(assignments.sum())
    for _ in range(iterations):
        assignments /= total(assignments.sum(0, keepdim=True)) * num_prototypes
        assignments /= assignments.sum(1, keepdim=True) * num_samples
    return assignments.mul_(num_samples)


class Centring(nn.Module):
    """Targets by centring, and the centre: a moving average of the teacher's mean logits.

    `targets` uses the centre of the steps before and remembers the logits it saw; `finish_step` moves the centre by
    all that was seen since, once per optimiser step. The state is the centre.
    """

    needs_whole_batch = False

    center: Tensor
    seen_sum: Tensor
    seen_rows: Tensor

    def __init__(self, num_prototypes: int, total: Total = alone, momentum: float = CENTER_MOMENTUM) -> None:
        super().__init__()
        self.total = total
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self.register_buffer("seen_sum", torch.zeros(num_prototypes), persistent=False)
        self.register_buffer("seen_rows", torch.zeros(1), persistent=False)

    @torch.no_grad()
    def targets(self, logits: Float[Tensor, "N K"], temp: float) -> Float[Tensor, "N K"]:
        """Distributions over prototypes; in training the logits count for the next centre."""
        if self.training:
            self.seen_sum += logits.sum(0, dtype=torch.float32)
            self.seen_rows += len(logits)
        return centred_softmax(logits, self.center, temp)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Move the centre. All ranks call this together.

        Without any row on any rank the centre stays, and so it does when a logit was not finite: a step that is passed
        over must leave no trace.
        """
        seen = self.total(torch.cat([self.seen_sum, self.seen_rows]))
        # DINOv2 averages the means of the ranks; the mean over all rows is the same however ranks share the masks.
        mean, rows = seen[:-1] / seen[-1].clamp(min=1), seen[-1]
        moved = self.center * self.momentum + mean * (1 - self.momentum)
        may_move = (rows > 0) & torch.isfinite(seen).all()
        self.center.copy_(torch.where(may_move, moved, self.center))
        self.seen_sum.zero_()
        self.seen_rows.zero_()


class SinkhornKnopp(nn.Module):
    """Targets by Sinkhorn-Knopp; nothing is remembered between steps."""

    needs_whole_batch = True  # of the rank; `total` brings in the other ranks

    def __init__(self, total: Total = alone) -> None:
        super().__init__()
        self.total = total

    @torch.no_grad()
    def targets(self, logits: Float[Tensor, "N K"], temp: float) -> Float[Tensor, "N K"]:
        """Distributions over prototypes. All ranks call this together."""
        return sinkhorn_knopp(logits, temp, total=self.total)

    def finish_step(self) -> None:
        pass


def build_targets(centering: Centering, num_prototypes: int, total: Total = alone) -> Centring | SinkhornKnopp:
    """The target maker of one head, by its name in the recipe (`train.centering`)."""
    return Centring(num_prototypes, total) if centering == "centering" else SinkhornKnopp(total)
