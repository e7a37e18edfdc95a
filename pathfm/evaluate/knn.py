"""k nearest neighbours weighted by similarity, as DINO and DINOv2 score frozen features (arXiv 2104.14294, appendix F).

N query samples, whose labels are known   T test samples, t at once   D width   C classes   K the largest k
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from pathfm.errors import UserError
from pathfm.random_streams import stream

_MOST_SIMILARITIES = 2**25  # at once: 256 MiB in float64


@torch.no_grad()
def knn_probabilities(
    query_features: Float[Tensor, "N D"],
    query_labels: Int[Tensor, " N"],
    test_features: Float[Tensor, "T D"],
    num_classes: int,
    ks: Sequence[int],
    temperature: float = 0.07,
    chunk: int = 1024,
) -> dict[int, Float[Tensor, "T C"]]:
    """Of every k: each neighbour votes for its class with exp(cosine / temperature); rows sum to 1.

    Of equally similar query samples the earlier row is nearer. Features that are 0 or not finite have cosine 0 to all.
    Never more than `chunk` x N similarities are held. Raises `UserError` when a k exceeds N.
    """
    for k in ks:
        if not 1 <= k <= len(query_features):
            raise UserError(f"k={k} neighbours are asked of {len(query_features)} query samples; choose a smaller k")
    query = _directions(query_features)
    rows = min(chunk, max(1, _MOST_SIMILARITIES // len(query)))
    parts: dict[int, list[Tensor]] = {k: [] for k in ks}
    for test in test_features.split(rows):
        # float64, then rounded: copies of an image tie, on every device, in every chunk, with or without TF32.
        similarity, neighbour = _nearest((_directions(test) @ query.T).float(), max(ks))
        for k, probabilities in _votes(similarity / temperature, query_labels[neighbour], num_classes, ks).items():
            parts[k].append(probabilities)
    return {k: torch.cat(of_k) for k, of_k in parts.items()}


def _directions(features: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
    return normalize(features.double(), dim=1).nan_to_num_(nan=0.0)  # one inf or nan makes the whole row nan and 0


def _nearest(similarity: Float[Tensor, "t N"], k: int) -> tuple[Float[Tensor, "t K"], Int[Tensor, "t K"]]:
    """The k most similar, nearest first. `topk` finds the right values, but of equal ones it takes just any rows."""
    values = similarity.topk(k, dim=1).values
    least = values[:, -1:]
    room = (values == least).sum(1, keepdim=True)
    equal = similarity == least
    taken = (similarity > least) | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
    row = taken.nonzero()[:, 1].view(len(similarity), k)
    ordered, place = similarity.gather(1, row).sort(dim=1, descending=True, stable=True)
    return ordered, row.gather(1, place)


def _votes(
    logits: Float[Tensor, "t K"], labels: Int[Tensor, "t K"], num_classes: int, ks: Sequence[int]
) -> dict[int, Float[Tensor, "t C"]]:
    """For every k the first k of the neighbours vote.

    One place after the other, the neighbour at it adds to one class of every test sample. No number is added to twice
    in one call, so sums have one order on CUDA too, where adding by index has none; and they serve every k on the way.
    """
    weights = (logits.double() - logits[:, :1]).exp()
    votes = weights.new_zeros((len(logits), num_classes))
    test = torch.arange(len(logits), device=logits.device)
    found = {}
    for place in range(max(ks)):
        votes[test, labels[:, place]] += weights[:, place]
        if place + 1 in ks:
            found[place + 1] = (votes / votes.sum(1, keepdim=True)).float()
    return found


def few_shot_rows(labels: Int[Tensor, " N"], n_per_class: int, tries: int, seed: int) -> list[Int[Tensor, " n"]]:
    """For each try the rows, ascending, of `n_per_class` samples of each class, or of all that a smaller class has.

    They follow from (seed, try, class) and the class's rows alone; a larger number has a smaller one's samples too.
    """
    assert n_per_class >= 1, n_per_class
    rows_of = {label: (labels == label).nonzero()[:, 0].cpu() for label in labels.unique().tolist()}
    drawings = []
    for drawing in range(tries):
        drawn = [
            rows[stream(seed, drawing, f"few shots of class {label}").permutation(len(rows))[:n_per_class]]
            for label, rows in rows_of.items()
        ]
        drawings.append(torch.cat(drawn).sort().values.to(labels.device))
    return drawings
