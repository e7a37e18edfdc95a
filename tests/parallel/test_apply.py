"""However a network is spread over ranks, split into parts or recomputed: the step is that of one process."""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pathfm.dist.collect import gather_rows, sum_over_ranks
from pathfm.dist.env import Ranks
from pathfm.errors import UserError
from pathfm.parallel.apply import mesh_of, parallelise
from pathfm.parallel.config import ParallelConfig, shard_size
from pathfm.parallel.tensors import whole_tensors_from_all
from pathfm.schedule import StepValues
from pathfm.ssl.dinov2 import DINOv2
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.state import TrainingState
from pathfm.training.step import build_loss_scale, build_optimizer, compute_dtype, train_step
from tests.several_ranks import DEVICES, on_ranks, ranks_for
from tests.ssl.small import random_batch, shares_of, small_dinov2, spread_out

BATCH, STEPS = 16, 2
VALUES = StepValues(lr=1e-3, last_layer_lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05)


@dataclass(frozen=True)
class Case:
    """A method, and how it is spread."""

    centering: str = "centering"
    separate_head: bool = False
    koleo_group_size: int = 8  # of 16: across ranks, when there are four
    parts: int = 1
    precision: str = "fp32"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


@dataclass(frozen=True)
class Step:
    """What a training step shows, and what it leaves."""

    metrics: dict[str, list[float]]
    tensors: dict[str, Tensor]


METHODS = [
    Case(centering=centering, separate_head=separate)
    for centering in ("centering", "sinkhorn_knopp")
    for separate in (False, True)
]
SPREADS = {
    2: [ParallelConfig(strategy="ddp"), ParallelConfig(strategy="fsdp")],
    4: [
        ParallelConfig(strategy="ddp"),
        ParallelConfig(strategy="fsdp", reshard_after_forward=False),
        ParallelConfig(strategy="hybrid", shards=2),
    ],
}
MEMORY_SAVERS = [
    ParallelConfig(strategy="fsdp", recompute="blocks"),
    ParallelConfig(strategy="fsdp", recompute="selective"),
    ParallelConfig(strategy="ddp", recompute="blocks", recompute_every=2),
]


def build(case: Case, device: torch.device) -> DINOv2:
    method = small_dinov2(
        separate_head=case.separate_head, centering=case.centering, koleo_group_size=case.koleo_group_size
    )
    spread_out(method)
    method.gather = gather_rows
    for targets in (method.cls_targets, method.patch_targets):
        targets.total = sum_over_ranks
    return method.to(device)


def train(case: Case, device: str = "cpu") -> Step:
    """Two steps on this rank's share; what they leave, whole."""
    several = dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
    place = torch.device(device)
    method, settings = build(case, place), TrainConfig(precision=case.precision)
    mesh = mesh_of(world_size, shard_size(case.parallel, world_size, ranks_per_node=2), place)
    for network, trained in ((method.student, True), (method.teacher, False)):
        parallelise(network, network.layers(), case.parallel, mesh, compute_dtype(settings), trained=trained)
    state = TrainingState(method, build_optimizer(method, OptimConfig()), build_loss_scale(settings, place))
    for step in range(STEPS):
        shares = shares_of(random_batch(BATCH, seed=step), world_size * case.parts)
        parts = [part.to(place) for part in shares[rank * case.parts :][: case.parts]]
        train_step(state, parts, VALUES, settings, OptimConfig(), Ranks(rank, world_size, rank))
    return Step(state.meter.read(), whole_tensors_from_all(state.tensors(), keep=True))


def train_all(cases: list[Case], device: str) -> list[Step]:
    return [train(case, device) for case in cases]


@cache
def one_process(case: Case) -> Step:
    return train(replace(case, parts=1, parallel=ParallelConfig()))


def assert_same_step(found: Step, expected: Step, case: Case) -> None:
    """Losses and gradients (of which the first moment is the mean) within 1e-5 of the largest of their kind."""
    assert found.metrics.keys() == expected.metrics.keys()
    for name, values in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(values, abs=1e-5, rel=1e-5), (case, name)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        if name.endswith((".exp_avg", "center", ".step")):
            torch.testing.assert_close(found.tensors[name], tensor, atol=1e-5, rtol=1e-4, msg=f"{case}: {name}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wanted", [2, 4])
def test_losses_and_gradients_do_not_depend_on_the_ranks_nor_on_how_they_share_the_weights(wanted, device):
    cases = [replace(method, parallel=spread) for method in METHODS for spread in SPREADS[wanted]]
    cases += [replace(METHODS[3], parts=2, parallel=spread) for spread in SPREADS[wanted]]
    cases += [replace(METHODS[0], parallel=saver) for saver in MEMORY_SAVERS] if wanted == 2 else []
    if device == "cuda":
        cases = [case for case in cases if case.parallel.strategy != "hybrid"]
    for steps in on_ranks(ranks_for(device, wanted), train_all, cases, device, device=device):
        for case, step in zip(cases, steps, strict=True):
            assert_same_step(step, one_process(case), case)


def weights_in_bf16_and_fp32(device: str) -> list[float]:
    """The losses with gathered weights in bf16, and without anything gathered."""
    fsdp = Case(precision="bf16", parallel=ParallelConfig(strategy="fsdp"))
    return [
        train(fsdp, device).metrics["total_loss"][0],
        train(replace(fsdp, parallel=ParallelConfig())).metrics["total_loss"][0],
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_gathered_in_bf16_give_losses_near_those_of_fp32(device):
    exact = one_process(Case()).metrics["total_loss"][0]
    for losses in on_ranks(ranks_for(device, 2), weights_in_bf16_and_fp32, device, device=device):
        assert losses == pytest.approx([exact, exact], rel=2e-2)


def stale_teachers(device: str) -> bool:
    """Whether a sharded teacher goes forward with the weights that it has after its moving average."""
    case = Case(parallel=ParallelConfig(strategy="fsdp", reshard_after_forward=False))
    method, place = build(case, torch.device(device)), torch.device(device)
    mesh = mesh_of(dist.get_world_size(), dist.get_world_size(), place)
    for network, trained in ((method.student, True), (method.teacher, False)):
        parallelise(network, network.layers(), case.parallel, mesh, torch.float32, trained=trained)
    crops = [random_batch(2).global_crops.to(place)]
    with torch.no_grad():
        before = method.teacher(crops).cls
        for parameter in method.student.parameters():
            parameter.mul_(2)
        method.update_teacher(0.5)
        return torch.equal(before, method.teacher(crops).cls)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sharded_teacher_sees_with_its_newest_weights(device):
    assert on_ranks(ranks_for(device, 2), stale_teachers, device, device=device) == [False] * ranks_for(device, 2)


@pytest.mark.parametrize("config", [c.model_copy(update={"strategy": "ddp"}) for c in MEMORY_SAVERS[:2]])
def test_one_process_recomputes_to_the_same_bits(config):
    recomputed, expected = train(Case(parallel=config)), one_process(Case())
    assert recomputed.metrics == expected.metrics
    assert [n for n, tensor in expected.tensors.items() if not torch.equal(tensor, recomputed.tensors[n])] == []


def saved_bytes(config: ParallelConfig) -> int:
    """What the forward pass of a student keeps for the backward pass."""
    method = small_dinov2(drop_path_rate=0.2)
    parallelise(method.student, method.student.layers(), config, None, torch.float32, trained=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    batch = random_batch(8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = method.student([batch.global_crops], heads=False)
    assert output.cls.requires_grad
    return sum(kept.values())


def test_recomputed_blocks_keep_less():
    everything, half, nothing = (
        saved_bytes(ParallelConfig(recompute=how, recompute_every=every))
        for how, every in (("none", 1), ("blocks", 2), ("blocks", 1))
    )
    assert nothing < half < everything


@pytest.mark.parametrize(
    ("settings", "world_size", "expected"),
    [
        ({"strategy": "ddp"}, 8, 1),
        ({"strategy": "fsdp"}, 8, 8),
        ({"strategy": "hybrid"}, 8, 4),
        ({"strategy": "hybrid", "shards": 2}, 8, 2),
        ({"strategy": "hybrid"}, 2, 2),
    ],
)
def test_copies_of_the_weights_are_shared_by_as_many_ranks_as_the_recipe_says(settings: Any, world_size, expected):
    assert shard_size(ParallelConfig(**settings), world_size, ranks_per_node=4) == expected


def test_copies_that_do_not_come_out_even_are_refused_with_a_way_out():
    with pytest.raises(UserError, match=r"hybrid with 3 ranks to a copy .* does not fit 8 ranks; set parallel.shards"):
        shard_size(ParallelConfig(strategy="hybrid", shards=3), 8, ranks_per_node=4)
