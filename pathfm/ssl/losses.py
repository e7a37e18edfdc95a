"""The three losses of DINOv2: DINO on class tokens, iBOT on masked patches, KoLeo against collapse.

B samples   S student views   T teacher views   M masked patches   K prototypes   D width   N rows
Logits may come in half precision; all arithmetic here is in fp32.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

STUDENT_TEMP = 0.1  # DINO, arXiv 2104.14294, appendix C


def dino_cross_entropy(
    student_logits: Float[Tensor, "S B K"],
    teacher_probs: Float[Tensor, "T B K"],
    *,
    same_views: bool,
    student_temp: float = STUDENT_TEMP,
) -> Float[Tensor, ""]:
    """Cross-entropy of student views against teacher views of the same sample (DINO, arXiv 2104.14294, eq. 3).

    for each sample b, student view s, teacher view t:  loss += H(teacher[t, b], softmax(student[s, b] / temp))
    `same_views` says that view s of the student and view s of the teacher are the same crop: such pairs are left out.
    Returns the mean over the pairs that were counted, and over samples; no pairs (no student views) give 0.
    """
    total = student_logits[:0].float().sum()
    for view, logits in enumerate(student_logits):
        counted = torch.cat([teacher_probs[:view], teacher_probs[view + 1 :]]) if same_views else teacher_probs
        log_probs = functional.log_softmax(logits.float() / student_temp, dim=-1)
        # Cross-entropy is linear in the target, so the targets of all pairs of this view are added up first.
        total = total - (counted.sum(0) * log_probs).sum(-1).mean()
    pairs = len(student_logits) * (len(teacher_probs) - same_views)
    return total / max(pairs, 1)


def ibot_cross_entropy(
    student_logits: Float[Tensor, "M K"],
    teacher_probs: Float[Tensor, "M K"],
    weights: Float[Tensor, " M"],
    num_crops: int,
    student_temp: float = STUDENT_TEMP,
) -> Float[Tensor, ""]:
    """Cross-entropy at masked patches, student (masked) against teacher (not masked) (iBOT, arXiv 2111.07832, eq. 2).

    for each crop, mean over its masked patches:  H(teacher[m], softmax(student[m] / temp))
    `weights` are 1 / (masked patches of the same crop). Returns the sum divided by `num_crops`, the number of all
    crops whether masked or not, as in DINOv2: ranks with equal numbers of crops may average their losses. M may be 0.
    """
    log_probs = functional.log_softmax(student_logits.float() / student_temp, dim=-1)
    cross_entropy = -(teacher_probs * log_probs).sum(-1)
    return (cross_entropy * weights).sum() / num_crops


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
