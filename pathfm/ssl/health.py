"""Whether a representation is alive: entropies, rank and distances of what a step saw. Measured, never trained on.

B samples   G global crops per sample   K prototypes   D width   N rows of all ranks
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from pathfm.ssl.cross_entropy import STUDENT_TEMP
from pathfm.ssl.targets import Gather, Total, alone

_MOST_ROWS = 4096  # of features, of all ranks together: more would tell no more


@dataclass(frozen=True)
class Seen:
    """One part of a batch at the class tokens' head, nothing of it with a gradient."""

    targets: Float[Tensor, "G B K"]  # what the teacher asks for
    teacher_cls: Float[Tensor, "GB D"]
    student_logits: Float[Tensor, "G B K"]


Look = Callable[[Seen], None]


@dataclass
class Probe:
    """Adds up what the parts of a step show. `total` sums over ranks, `gather` joins the rows of all ranks."""

    total: Total = alone
    gather: Gather = alone
    world_size: int = 1
    _sums: Tensor | None = None  # rows, teacher's entropy, student's entropy, agreements, use of every prototype
    _features: list[Float[Tensor, "B D"]] = field(default_factory=list)
    _first_views: list[Float[Tensor, "B D"]] = field(default_factory=list)

    @torch.no_grad()
    def look(self, seen: Seen) -> None:
        with torch.autocast(seen.targets.device.type, enabled=False):
            sums = _sums(seen)
        self._sums = sums if self._sums is None else self._sums + sums
        room = _MOST_ROWS // self.world_size - sum(map(len, self._features))
        cls = seen.teacher_cls.detach().float()
        self._features.append(cls[: max(room, 0)].clone())
        self._first_views.append(cls[: min(seen.targets.shape[1], max(room, 0))].clone())

    @torch.no_grad()
    def read(self) -> dict[str, Tensor]:
        """Scalars by name, on the device, the same on every rank. All ranks call this together.

        Entropies are in nats: of a crop's distribution over prototypes, and, `prototype_entropy`, of how often each is
        asked for in the whole batch (log K: equally often; 0: one alone, a collapse).
        """
        assert self._sums is not None, "nothing was seen"
        sums = self.total(self._sums)
        rows, teacher, student, agreements = sums[:4]
        use = sums[4:] / rows
        features, first_views = (self.gather(torch.cat(parts)) for parts in (self._features, self._first_views))
        return {
            "health/teacher_entropy": teacher / rows,
            "health/student_entropy": student / rows,
            "health/prototype_entropy": -torch.xlogy(use, use).sum(),
            "health/agreement": agreements / rows,
            "health/effective_rank": effective_rank(features),
            "health/nearest_distance": nearest_distance(first_views),
        }


@torch.no_grad()
def effective_rank(features: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """exp of the entropy of the singular values' shares (RankMe, arXiv 2210.02885, eq. 1): 1 to min(N, D).

    Features that are not finite have no rank: nan.
    """
    # float64: from a Gram matrix in float32, values that are zero would come out large enough to count.
    rows = features.double()
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    if not torch.isfinite(gram).all():
        return torch.full((), float("nan"), device=features.device)
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return torch.exp(-torch.xlogy(shares, shares).sum()).float()


@torch.no_grad()
def nearest_distance(features: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """The mean distance of unit vectors to their nearest neighbour, 0 to 2: what KoLeo makes large. One alone: 0."""
    if len(features) < 2:
        return torch.zeros((), device=features.device)
    unit = functional.normalize(features.float(), dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-1)
    return (2 - 2 * similarity.amax(1)).clamp(min=0).sqrt().mean()


def _sums(seen: Seen) -> Float[Tensor, " numbers"]:
    targets, log_student = seen.targets.float(), functional.log_softmax(seen.student_logits.float() / STUDENT_TEMP, -1)
    teacher_entropy = -torch.xlogy(targets, targets).sum()
    student_entropy = -(log_student.exp() * log_student).sum()
    # A student's view against another of the teacher's, never the same crop.
    named_by_teacher = targets.argmax(-1).roll(1, 0)
    agreements = (log_student.argmax(-1) == named_by_teacher).sum()
    rows = targets.new_full((), float(targets[..., 0].numel()))
    numbers = torch.stack([rows, teacher_entropy, student_entropy, agreements.float()])
    return torch.cat([numbers, targets.sum((0, 1))])
