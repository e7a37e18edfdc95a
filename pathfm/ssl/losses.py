"""The three losses of DINOv2: DINO on class tokens, iBOT on masked patches, KoLeo against collapse.

B samples   G teacher views   S student views, of which the first G are the teacher's   M masked patches
E bottleneck width   K prototypes   D width   n samples of a chunk
Rows are view-major: view v of sample b is row v * B + b.
"""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from pathfm.models.head import Projection
from pathfm.ssl.cross_entropy import (
    STUDENT_TEMP,
    Chunk,
    ErrorsOf,
    cross_entropy,
    errors_of_chunk,
    rows_at_once,
    slices_of,
)
from pathfm.ssl.targets import Asked


class DinoLoss(NamedTuple):
    """`total` is to be backpropagated; of the others, which carry no gradient, it is the sum."""

    total: Float[Tensor, ""]
    of_global_views: Float[Tensor, ""]
    of_local_views: Float[Tensor, ""]


def dino_loss(
    student: Projection,
    asked: Asked,
    num_samples: int,
    errors_of: ErrorsOf = errors_of_chunk,
    student_temp: float = STUDENT_TEMP,
) -> DinoLoss:
    """Cross-entropy of student views against teacher views of the same sample (DINO, arXiv 2104.14294, eq. 3).

    for each sample b, student view s, teacher view t != s:  loss += H(asked[t, b], softmax(student[s, b] / temp))
    Returns the mean over the pairs that were counted, and over samples. `student` has S * B rows, `asked` G * B.
    """
    views, teacher_views = len(student.bottleneck) // num_samples, len(asked) // num_samples
    pairs = views * teacher_views - teacher_views  # a view is not asked for what the teacher says of that same view
    weights = student.bottleneck.new_full((views * num_samples,), 1 / (pairs * num_samples))
    chunks = _chunks_of_samples(asked, num_samples, views, student.bottleneck.device)
    total, of_rows = cross_entropy(student, weights, chunks, errors_of, student_temp)
    of_views = of_rows.unflatten(0, (views, num_samples)).sum(1) / (pairs * num_samples)
    return DinoLoss(total, of_views[:teacher_views].sum(), of_views[teacher_views:].sum())


def _chunks_of_samples(asked: Asked, num_samples: int, views: int, device: torch.device) -> Iterator[Chunk]:
    """All views of a few samples at a time: what the teacher says of them is made once for all."""
    teacher_views = len(asked) // num_samples
    first_of_views = num_samples * torch.arange(views, device=device)[:, None]
    for samples in slices_of(num_samples, max(1, rows_at_once(asked.num_prototypes, device) // views)):
        rows = first_of_views + torch.arange(samples.start, samples.stop, device=device)
        yield Chunk(rows.flatten(), partial(_asked_of_views, asked, rows[:teacher_views], views))


def _asked_of_views(asked: Asked, rows: Int[Tensor, "G n"], views: int) -> Float[Tensor, "Sn K"]:
    """For every student view the sum over the teacher views of other crops: cross-entropy is linear in its target."""
    of_teacher = asked.rows(rows.flatten()).unflatten(0, rows.shape)
    others = [torch.cat([of_teacher[:view], of_teacher[view + 1 :]]).sum(0) for view in range(len(rows))]
    return torch.cat([*others, *[of_teacher.sum(0)] * (views - len(rows))])


def ibot_loss(
    student: Projection,
    asked: Asked,
    mask_weights: Float[Tensor, " M"],
    num_crops: int,
    errors_of: ErrorsOf = errors_of_chunk,
    student_temp: float = STUDENT_TEMP,
) -> Float[Tensor, ""]:
    """Cross-entropy at masked patches, student (masked) against teacher (not masked) (iBOT, arXiv 2111.07832, eq. 2).

    for each crop, mean over its masked patches:  H(asked[m], softmax(student[m] / temp))
    `mask_weights` are 1 / (masked patches of the same crop). Returns the sum divided by `num_crops`, the number of all
    crops whether masked or not, as in DINOv2: ranks with equal numbers of crops may average their losses. M may be 0.
    """
    device = student.bottleneck.device
    at_once = rows_at_once(asked.num_prototypes, device)
    chunks = (
        Chunk(torch.arange(part.start, part.stop, device=device), partial(asked.rows, part))
        for part in slices_of(len(asked), at_once)
    )
    return cross_entropy(student, mask_weights / num_crops, chunks, errors_of, student_temp).total


def koleo(cls: Float[Tensor, "B D"], group_size: int | None = None, *, eps: float = 1e-8) -> Float[Tensor, ""]:
    """Kozachenko-Leonenko estimate of the entropy, which spreads features over the sphere (arXiv 1806.03198, eq. 3).

    loss = -mean_b log |x_b - x_nearest(b)|,  x normalised, the nearest by cosine and only within b's group.
    Groups are consecutive rows; None takes all rows as one group. Alone in a group there is no neighbour: 0.
    Returns the mean over samples.
    """
    # DINOv2 looks for neighbours among one GPU's samples; groups of a fixed size make the world size irrelevant.
    group_size = len(cls) if group_size is None else group_size
    assert len(cls) % group_size == 0, (len(cls), group_size)
    if group_size < 2:
        return cls.float().sum() * 0
    with torch.autocast(cls.device.type, enabled=False):  # half precision loses eps and then gives infinities
        unit = functional.normalize(cls.float(), dim=-1, eps=eps)
        # Indexing, not gather: its gradient is deterministic on CUDA although neighbours repeat.
        neighbours = unit[_nearest_in_group(unit.detach(), group_size)]
        distances = functional.pairwise_distance(unit, neighbours, p=2, eps=eps)
        return -torch.log(distances + eps).mean()


def _nearest_in_group(unit: Float[Tensor, "B D"], group_size: int) -> Int[Tensor, " B"]:
    """The row of every row's most similar other row of the same group."""
    groups = unit.unflatten(0, (-1, group_size))
    similarity = groups @ groups.mT
    similarity.diagonal(dim1=1, dim2=2).fill_(-1)  # nobody is their own neighbour
    first_rows = torch.arange(0, len(unit), group_size, device=unit.device)
    return (similarity.argmax(dim=-1) + first_rows[:, None]).flatten()
