"""Which learning rate and weight decay every parameter gets, and the few optimiser groups that this makes.

As in DINOv2: the rate decays from the last layer to the first, the patch embedding gets a further factor; biases,
norms and LayerScale are not decayed; the prototypes ("last layer") can be held still at first.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pathfm.schedule import StepValues

_BLOCK = re.compile(r"backbone\.blocks\.(\d+)\.")
_INPUT = re.compile(r"backbone\.(cls_token|pos_embed|mask_token|register_tokens$|patch_embed\.|phi\.)")
_AFTER_BLOCKS = re.compile(r"(backbone\.norm|dino_head|ibot_head)\.")
_NOT_DECAYED = re.compile(r"\.bias$|norm|gamma")


@dataclass(frozen=True)
class Rule:
    """How one parameter is optimised, relative to what the schedules say."""

    lr_multiplier: float
    weight_decay_multiplier: float
    is_last_layer: bool
    is_backbone: bool


def rules(student: nn.Module, *, layerwise_decay: float, patch_embed_lr_mult: float) -> dict[str, Rule]:
    """The rule of every parameter that is trained, by name.

    Raises `ValueError` for a parameter whose place in the network is not known from its name: a default would train
    it with the wrong rate in silence.
    """
    names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    depth = 1 + max((int(block[1]) for name in names if (block := _BLOCK.match(name))), default=-1)
    return {name: _rule(name, depth, layerwise_decay, patch_embed_lr_mult) for name in names}


def parameter_groups(student: nn.Module, *, layerwise_decay: float, patch_embed_lr_mult: float) -> list[dict[str, Any]]:
    """The trained parameters as optimiser groups, one per distinct rule, which is written into the group.

    The order follows the network and so is the same at every start. Raises `ValueError` as `rules` does.
    """
    parameters = dict(student.named_parameters())
    members: dict[Rule, list[nn.Parameter]] = defaultdict(list)
    for name, rule in rules(student, layerwise_decay=layerwise_decay, patch_embed_lr_mult=patch_embed_lr_mult).items():
        members[rule].append(parameters[name])
    return [{"params": fused, **vars(rule)} for rule, fused in members.items()]


def apply_schedule(optimizer: Optimizer, values: StepValues) -> None:
    """Set every group's learning rate and weight decay for the step to come."""
    for group in optimizer.param_groups:
        lr = values.last_layer_lr if group["is_last_layer"] else values.lr
        lr = 0.0 if values.backbone_is_frozen and group["is_backbone"] else lr
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = values.weight_decay * group["weight_decay_multiplier"]


def _rule(name: str, depth: int, layerwise_decay: float, patch_embed_lr_mult: float) -> Rule:
    layers_above = depth + 1 - _layer(name, depth)
    return Rule(
        lr_multiplier=layerwise_decay**layers_above * (patch_embed_lr_mult if "patch_embed" in name else 1.0),
        weight_decay_multiplier=0.0 if _NOT_DECAYED.search(name) else 1.0,
        is_last_layer="last_layer" in name,
        is_backbone=name.startswith("backbone."),
    )


def _layer(name: str, depth: int) -> int:
    """0 for what comes before the blocks, N + 1 for block N, depth + 1 for what comes after."""
    if block := _BLOCK.match(name):
        return int(block[1]) + 1
    if _INPUT.match(name):
        return 0
    if _AFTER_BLOCKS.match(name):
        return depth + 1
    raise ValueError(f"no rule for the learning rate of parameter '{name}'")
