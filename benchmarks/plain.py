"""A DINOv2 step as one would write it down first: the oracle of the fast one, in its results and in its time.

Each size of crops passes the network by itself, all logits lie there at once, losses go pair by pair, the moving
average and the optimiser go parameter by parameter. With centring; without drop path; the weights are a method's.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW

from pathfm.batch import Batch
from pathfm.ssl.dinov2 import DINOv2
from pathfm.ssl.losses import koleo
from pathfm.ssl.network import Network
from pathfm.ssl.targets import Centring

_STUDENT_TEMP, _CENTER_MOMENTUM = 0.1, 0.9


def plain_step(method: DINOv2, optimizer: AdamW, batch: Batch, temp: float, momentum: float, clip: float) -> Tensor:
    """What `training.step.train_step` does with a batch that is on the device; returns the loss."""
    loss = plain_loss(method, batch.normalised(), temp)
    loss.backward()
    for part in method.student.parts().values():
        nn.utils.clip_grad_norm_(part.parameters(), clip, foreach=False)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for average, weight in zip(method.teacher.parameters(), method.student.parameters(), strict=True):
            average.mul_(momentum).add_(weight, alpha=1 - momentum)
    return loss.detach()


def plain_loss(method: DINOv2, batch: Batch, temp: float) -> Tensor:
    samples = batch.num_samples
    with torch.no_grad():
        _, cls_logits, patch_logits = _say(method.teacher, batch.global_crops, None, batch.mask_indices)
        teacher = _centred(method.cls_targets, cls_logits, temp).split(samples)
        asked = _centred(method.patch_targets, patch_logits, temp)
    cls, global_logits, patch_logits = _say(method.student, batch.global_crops, batch.masks, batch.mask_indices)
    local_cls = method.student.backbone([batch.local_crops])[0].cls
    local_logits = method.student.dino_head(local_cls).logits()
    student = [*global_logits.split(samples), *local_logits.split(samples)]
    pairs = [(s, t) for s in range(len(student)) for t in range(len(teacher)) if s != t]
    dino = torch.stack([_cross_entropy(student[s], teacher[t]).mean() for s, t in pairs]).mean()
    ibot = (_cross_entropy(patch_logits, asked) * batch.mask_weights).sum() / len(batch.global_crops)
    spread = torch.stack([koleo(view) for view in cls.split(samples)]).sum()
    return method.dino.loss_weight * dino + method.ibot.loss_weight * ibot + method.dino.koleo_loss_weight * spread


def _say(network: Network, crops: Tensor, masks: Tensor | None, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class tokens, their logits, and the logits of the patches that are asked for."""
    (features,) = network.backbone([crops], [masks])
    patch_head = getattr(network, "ibot_head", network.dino_head)
    patches = features.patches.flatten(0, 1)[asked]
    return features.cls, network.dino_head(features.cls).logits(), patch_head(patches).logits()


def _centred(targets: nn.Module | None, logits: Tensor, temp: float) -> Tensor:
    assert isinstance(targets, Centring), "the plain step knows centring alone"
    probs = torch.softmax((logits.float() - targets.center) / temp, dim=-1)
    mean = logits.float().mean(0, keepdim=True)
    targets.center.copy_(targets.center * _CENTER_MOMENTUM + mean * (1 - _CENTER_MOMENTUM))
    return probs


def _cross_entropy(logits: Tensor, probs: Tensor) -> Tensor:
    return -(probs * functional.log_softmax(logits.float() / _STUDENT_TEMP, dim=-1)).sum(-1)
