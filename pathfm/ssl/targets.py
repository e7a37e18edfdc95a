"""How teacher logits become the distributions that the student is asked for: centring or Sinkhorn-Knopp.

N rows (crops or masked patches of this rank)   n some of them   K prototypes
`total` sums a tensor over all ranks; with it every rank computes with the numbers of the whole global batch.
Only logits lie there whole, in the precision that they came in; distributions are made of a few rows at once, in fp32.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pathfm.ssl.config import Centering
from pathfm.ssl.cross_entropy import rows_at_once, slices_of

Total = Callable[[Tensor], Tensor]
Gather = Callable[[Tensor], Tensor]

CENTER_MOMENTUM = 0.9  # DINO, arXiv 2104.14294, section 5.1
SINKHORN_ITERATIONS = 3  # SwAV, arXiv 2006.09882, section 4


def alone(tensor: Tensor) -> Tensor:
    """The sum over ranks, or the rows of all ranks, when there is only one."""
    return tensor


def biased_softmax(
    logits: Float[Tensor, "n K"], inverse_temp: Float[Tensor, " 1"], bias: Float[Tensor, " K"]
) -> Float[Tensor, "n K"]:
    """softmax(logits * inverse_temp + bias), in fp32."""
    return torch.softmax(torch.addcmul(bias, logits, inverse_temp), dim=-1)


SoftmaxOf = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Asked:
    """Distributions over prototypes, softmax(logits / temp + bias), made when somebody wants to see some of them."""

    logits: Float[Tensor, "N K"]
    inverse_temp: Float[Tensor, " 1"]  # a tensor, so that what is compiled holds for every temperature
    bias: Float[Tensor, " K"]
    softmax_of: SoftmaxOf

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def num_prototypes(self) -> int:
        return self.logits.shape[1]

    def rows(self, which: Int[Tensor, " n"] | slice) -> Float[Tensor, "n K"]:
        """Some of them, in fp32."""
        return self.softmax_of(self.logits[which], self.inverse_temp, self.bias)

    def all(self) -> Float[Tensor, "N K"]:
        return self.rows(slice(None))


@torch.no_grad()
def sinkhorn_knopp(
    parts: Sequence[Float[Tensor, "_ K"]],
    temp: float,
    iterations: int = SINKHORN_ITERATIONS,
    total: Total = alone,
    softmax_of: SoftmaxOf = biased_softmax,
) -> list[Asked]:
    """Soft assignments that use all prototypes equally (SwAV, arXiv 2006.09882, section 3; DINOv2 section 4).

    exp(logits / temp), then in turn: every prototype's sum over the samples of all ranks made equal, every sample's
    sum over prototypes made 1. `parts` are balanced together. N may be 0 on a rank and differ between ranks. All ranks
    call this together.

    Rows that sum to 1 are a softmax, and what columns were multiplied with is its bias: that is all that is kept.
    """
    num_prototypes, device = parts[0].shape[1], parts[0].device
    inverse_temp, bias = torch.full((1,), 1 / temp, device=device), torch.zeros(num_prototypes, device=device)
    for iteration in range(iterations):
        of_columns = torch.zeros_like(bias)
        for asked in (Asked(logits, inverse_temp, bias, softmax_of) for logits in parts):
            for rows in slices_of(len(asked), rows_at_once(num_prototypes, device)):
                # It begins with columns: the rows have not been made equal yet.
                assigned = asked.rows(rows) if iteration else torch.exp(asked.logits[rows].float() / temp)
                of_columns += assigned.sum(0)
        bias = bias - total(of_columns).clamp(min=torch.finfo(torch.float32).tiny).log()
    return [Asked(logits, inverse_temp, bias, softmax_of) for logits in parts]


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
        self.softmax_of: SoftmaxOf = biased_softmax
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        self.register_buffer("seen_sum", torch.zeros(num_prototypes), persistent=False)
        self.register_buffer("seen_rows", torch.zeros(1), persistent=False)

    @torch.no_grad()
    def targets(self, parts: Sequence[Float[Tensor, "_ K"]], temp: float) -> list[Asked]:
        """softmax((logits - center) / temp) (DINO, arXiv 2104.14294, section 3.1).

        In training the logits count for the next centre.
        """
        for logits in parts if self.training else ():
            self.seen_sum += logits.sum(0, dtype=torch.float32)
            self.seen_rows += len(logits)
        inverse_temp = torch.full((1,), 1 / temp, device=self.center.device)
        bias = -self.center[0] * inverse_temp
        return [Asked(logits, inverse_temp, bias, self.softmax_of) for logits in parts]

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
        self.softmax_of: SoftmaxOf = biased_softmax

    @torch.no_grad()
    def targets(self, parts: Sequence[Float[Tensor, "_ K"]], temp: float) -> list[Asked]:
        """Distributions over prototypes. All ranks call this together."""
        return sinkhorn_knopp(parts, temp, total=self.total, softmax_of=self.softmax_of)

    def finish_step(self) -> None:
        pass


def build_targets(centering: Centering, num_prototypes: int, total: Total = alone) -> Centring | SinkhornKnopp:
    """The target maker of one head, by its name in the recipe (`train.centering`)."""
    return Centring(num_prototypes, total) if centering == "centering" else SinkhornKnopp(total)
