"""The teacher: a moving average of the student (mean teacher, arXiv 1703.01780), never trained itself."""

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pathfm.parallel.tensors import local


@torch.no_grad()
def start_as_copy(teacher: nn.Module, student: nn.Module) -> None:
    """Give the teacher the student's weights, and no gradients."""
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    teacher.eval()


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, for every parameter, fused over all of them.

    Each rank averages the weights (or shards) it holds; nothing is communicated.
    """
    average = get_ema_multi_avg_fn(momentum)
    average([local(weight) for weight in teacher.parameters()], [local(weight) for weight in student.parameters()], 0)
