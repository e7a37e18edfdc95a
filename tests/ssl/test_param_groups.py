"""Parameter groups against DINOv2's recorded ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pathfm.schedule import StepValues
from pathfm.ssl.dinov2 import DINOv2
from pathfm.ssl.param_groups import apply_schedule, parameter_groups, rules
from tests.ssl.small import FILES, small_dinov2

DECAY = {"layerwise_decay": 0.9, "patch_embed_lr_mult": 0.2}


@pytest.fixture
def method() -> DINOv2:
    return small_dinov2()


@pytest.mark.parametrize("file", FILES)
def test_every_parameter_has_its_recorded_rule(file: str, golden_dir: Path) -> None:
    arrays = np.load(golden_dir / file)
    recorded = {}
    for line in str(arrays["param_groups"]).splitlines():
        name, lr, weight_decay, last = line.split("\t")
        recorded[name] = (lr, float(weight_decay), last == "1")
    method = small_dinov2(separate_head="separate" in file)
    ours = {
        name: (f"{rule.lr_multiplier:.8f}", rule.weight_decay_multiplier, rule.is_last_layer)
        for name, rule in rules(method.student, **DECAY).items()
    }
    assert ours == recorded


def test_groups_are_few_and_hold_every_parameter_once(method: DINOv2) -> None:
    groups = parameter_groups(method.student, **DECAY)
    inputs, patch_embedding, blocks, norm, heads, last_layer = 1, 2, 2 * 2, 1, 2, 1
    assert len(groups) == inputs + patch_embedding + blocks + norm + heads + last_layer
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(method.student.parameters()))


def test_schedules_are_multiplied_by_each_groups_factors(method: DINOv2) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(method.student, **DECAY))
    values = StepValues(lr=2.0, last_layer_lr=0.0, weight_decay=0.4, momentum=0.99, teacher_temp=0.07)
    apply_schedule(optimizer, values)
    of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    backbone, head = method.student.backbone, method.student.dino_head
    assert of[backbone.patch_embed.proj.weight]["lr"] == pytest.approx(2.0 * 0.9**3 * 0.2)
    assert of[backbone.patch_embed.proj.weight]["weight_decay"] == 0.4
    assert of[backbone.blocks[1].norm1.weight]["lr"] == pytest.approx(2.0 * 0.9)
    assert of[backbone.blocks[1].norm1.weight]["weight_decay"] == 0
    assert of[head.last_layer.weight_v]["lr"] == 0
    assert of[head.mlp[0].weight]["lr"] == 2.0


def test_a_parameter_that_is_not_trained_is_in_no_group(method: DINOv2) -> None:
    frozen = method.student.dino_head.last_layer.weight_g.requires_grad_(False)
    groups = parameter_groups(method.student, **DECAY)
    assert not any(parameter is frozen for group in groups for parameter in group["params"])


def test_a_parameter_of_unknown_place_is_refused(method: DINOv2) -> None:
    method.student.adapter = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"parameter 'adapter\.weight'"):
        rules(method.student, **DECAY)


def test_registers_learn_at_the_rate_of_the_input() -> None:
    of = rules(small_dinov2(num_register_tokens=3).student, **DECAY)
    assert of["backbone.register_tokens"] == of["backbone.cls_token"]
