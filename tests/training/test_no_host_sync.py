"""Inside a step the host never waits for the device: it would stand still at every step, and could not run ahead."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from pathfm.augment.apply_on_device import crop_on_device
from pathfm.augment.assemble import Assemble
from pathfm.augment.config import AugmentConfig, CropsConfig
from pathfm.augment.masks import MaskPlan
from pathfm.data.loader import Sample
from pathfm.dist.env import ALONE
from pathfm.parallel.apply import parallelise
from pathfm.parallel.config import ParallelConfig
from pathfm.schedule import StepValues
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.prefetch import made_ready
from pathfm.training.state import TrainingState
from pathfm.training.step import build_loss_scale, build_optimizer, compute_dtype, train_step
from tests.host_sync import HostSync, no_host_sync
from tests.several_ranks import DEVICES
from tests.ssl.small import random_batch, shares_of, small_dinov2

BATCH = 8
VALUES = StepValues(lr=1e-3, last_layer_lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05)


@dataclass(frozen=True)
class Case:
    centering: str = "centering"
    precision: str = "bf16"
    separate_head: bool = False
    drop_path_rate: float = 0.4
    num_register_tokens: int = 0
    parts: int = 1
    koleo_group_size: int = 4
    clip_grad_of: str = "part"
    recompute: str = "none"


CASES = [
    Case(),
    Case(precision="fp32", drop_path_rate=0.1, clip_grad_of="parameter"),
    Case(precision="fp16", separate_head=True, num_register_tokens=4),
    Case(parts=2, drop_path_rate=0.1, separate_head=True),
    Case(parts=2, koleo_group_size=8, precision="fp16"),
    Case("sinkhorn_knopp"),
    Case("sinkhorn_knopp", separate_head=True, num_register_tokens=4, drop_path_rate=0.1),
    Case("sinkhorn_knopp", parts=2, precision="fp16", separate_head=True, koleo_group_size=8),
    Case("sinkhorn_knopp", parts=2, precision="fp32", recompute="selective"),
]


def steps_of(case: Case, device: torch.device) -> Callable[[int], None]:
    """A training whose steps are taken one by one, none of them before a report."""
    method = small_dinov2(
        separate_head=case.separate_head,
        centering=case.centering,
        koleo_group_size=case.koleo_group_size,
        num_register_tokens=case.num_register_tokens,
        drop_path_rate=case.drop_path_rate,
    ).to(device)
    train, optim = TrainConfig(precision=case.precision), OptimConfig(clip_grad_of=case.clip_grad_of)
    parallel = ParallelConfig(recompute=case.recompute)
    for network, trained in ((method.student, True), (method.teacher, False)):
        parallelise(network, network.layers(), parallel, None, compute_dtype(train), trained=trained)
    state = TrainingState(method, build_optimizer(method, optim), build_loss_scale(train, device))
    assert train.log_every_steps > 2
    batches = [[part.to(device) for part in shares_of(random_batch(BATCH, seed=s), case.parts)] for s in range(2)]

    def step(number: int) -> None:
        train_step(state, batches[number], VALUES, train, optim, ALONE)

    return step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_never_makes_the_host_wait(case, device):
    step = steps_of(case, torch.device(device))
    step(0)  # what is made once and kept is made here
    with no_host_sync(device):
        step(1)


CROPS = CropsConfig(global_crops_size=56, local_crops_size=28, local_crops_number=4)


@pytest.mark.parametrize("device", DEVICES)
def test_neither_crops_on_the_device_nor_working_ahead_makes_the_host_wait(device):
    place = torch.device(device)
    assemble = Assemble(CROPS, AugmentConfig(preset="pathology"), MaskPlan(4, 4), 14, 3, 4, crops_on_device=True)
    tile = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    batches = [assemble([Sample(4 * step + b, b, tile) for b in range(4)], step) for step in range(4)]
    if device == "cuda":
        batches = [batch.pin_memory() for batch in batches]

    def cropped(parts):
        return [crop_on_device(part.to(place), CROPS) for part in parts]

    steps = made_ready(([batch] for batch in batches), cropped, place)
    (first,) = next(steps)
    first.normalised()
    with no_host_sync(device):
        for (batch,) in steps:
            assert batch.normalised().global_crops.shape == (8, 3, 56, 56)


def by_mask(tensor: Tensor) -> Tensor:
    return tensor[tensor > 0]


def write_by_mask(tensor: Tensor) -> None:
    tensor[tensor > 0] = torch.ones(3, device=tensor.device)


PLANTED: dict[str, Callable[[Tensor], object]] = {
    "item": lambda tensor: tensor.sum().item(),
    "bool": lambda tensor: bool(tensor.sum() > 0),
    "if": lambda tensor: 1 if tensor.isfinite().all() else 0,
    "float": lambda tensor: float(tensor.sum()),
    "int": lambda tensor: range(3)[tensor[0].long()],
    "tolist": lambda tensor: tensor.tolist(),
    "cpu": lambda tensor: tensor.cpu(),
    "numpy": lambda tensor: np.asarray(tensor.cpu()),
    "nonzero": torch.nonzero,
    "where": lambda tensor: torch.where(tensor > 0),
    "mask": by_mask,
    "write by mask": write_by_mask,
    "masked_select": lambda tensor: tensor.masked_select(tensor > 0),
    "unique": torch.unique,
    "equal": lambda tensor: torch.equal(tensor, tensor.clone()),
    "repeat_interleave": lambda tensor: tensor.repeat_interleave(tensor.clamp(min=0).long()),
    "numbers of the host": lambda tensor: tensor + torch.tensor([1.0, 2.0, 3.0], device=tensor.device),
    "backward": lambda tensor: reads_in_backward(tensor).sum().backward(),
}


def reads_in_backward(tensor: Tensor) -> Tensor:
    tensor = tensor.clone().requires_grad_()
    tensor.register_hook(lambda gradient: gradient * gradient.sum().item())
    return tensor * 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_the_trap_catches_what_waits(planted, device):
    tensor = torch.ones(3, device=device)
    planted(tensor)
    with no_host_sync(device), pytest.raises((HostSync, RuntimeError), match=r"wait|synchron"):
        planted(tensor)


@pytest.mark.parametrize("device", DEVICES)
def test_the_trap_lets_pass_what_does_not_wait_and_is_gone_afterwards(device):
    tensor = torch.randn(3, 4, device=device)
    rows = torch.arange(2, device=device)
    with no_host_sync(device):
        result = torch.where(tensor > 0, tensor, 0)[rows].repeat_interleave(2, 0) @ tensor.T
        assert len(result) == 4
    assert result.sum().item() == result.sum().cpu().item()
