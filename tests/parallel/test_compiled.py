"""Compiled blocks: the same steps, nothing compiled anew once a step was seen, and never less than all blocks.

Everything here runs in processes of its own, where shapes in signatures are not checked: that cannot be compiled.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pathfm.dist.env import Ranks
from pathfm.models.vit import ViT
from pathfm.parallel.apply import left_as_found, mesh_of, parallelise
from pathfm.parallel.config import ParallelConfig, shard_size
from pathfm.parallel.tensors import whole_tensors_from_all
from pathfm.schedule import StepValues
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.state import TrainingState
from pathfm.training.step import build_loss_scale, build_optimizer, train_step
from tests.several_ranks import on_ranks
from tests.ssl.small import random_batch, shares_of, small_dinov2, spread_out

CPU = torch.device("cpu")
VALUES = StepValues(lr=1e-3, last_layer_lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05)
COMPILED = ParallelConfig(compile=True)


@dataclass(frozen=True)
class Case:
    parallel: ParallelConfig = COMPILED
    drop_path_rate: float = 0.4
    precision: str = "fp32"
    parts: int = 1
    koleo_group_size: int = 4  # of 8 samples; 8 in two parts: the student sees every part once more, without gradients


class Training:
    """A small network whose steps can be taken, and taken up."""

    def __init__(self, case: Case) -> None:
        self.case, self.train = case, TrainConfig(precision=case.precision)
        method = small_dinov2(drop_path_rate=case.drop_path_rate, koleo_group_size=case.koleo_group_size)
        spread_out(method)
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.ranks = Ranks(dist.get_rank() if world_size > 1 else 0, world_size)
        mesh = mesh_of(world_size, shard_size(case.parallel, world_size, world_size), CPU)
        for network, trained in ((method.student, True), (method.teacher, False)):
            parallelise(network, network.layers(), case.parallel, mesh, torch.float32, trained=trained)
        if case.parallel.compile:
            method.compile_losses()
        self.state = TrainingState(method, build_optimizer(method, OptimConfig()), build_loss_scale(self.train, CPU))

    def step(self) -> None:
        """Its masks, and how many patches they hide, are those of its number."""
        number = self.state.step
        batch = random_batch(8, masked_share=0.2 + 0.1 * number, seed=number)
        share = shares_of(batch, self.ranks.world_size)[self.ranks.rank]
        train_step(self.state, shares_of(share, self.case.parts), VALUES, self.train, OptimConfig(), self.ranks)

    def tensors(self) -> dict[str, Tensor]:
        return whole_tensors_from_all(self.state.tensors(), keep=True)


def three_steps(cases: list[Case], backend: str) -> list[tuple[list[float], dict[str, Tensor]]]:
    """Losses and what is left. From the second step on nothing may be compiled."""
    torch.compile = partial(torch.compile, backend=backend)
    found = []
    for case in cases:
        training = Training(case)
        training.step()
        with torch.compiler.set_stance("fail_on_recompile"):
            training.step()
            training.step()
        found.append((training.state.meter.read()["total_loss"], training.tensors()))
    return found


CASES = [
    Case(),
    Case(drop_path_rate=0.1, parallel=ParallelConfig(compile=True, recompute="selective")),
    Case(parts=2, koleo_group_size=8, parallel=ParallelConfig(compile=True, recompute="blocks", recompute_every=2)),
    Case(precision="bf16"),
]


@pytest.mark.parametrize(
    ("cases", "backend"),
    [(CASES, "aot_eager"), pytest.param(CASES, "inductor", marks=pytest.mark.slow)],
    ids=["its graphs", "inductor"],
)
def test_compiled_blocks_take_the_same_steps_whatever_is_masked_and_dropped_and_compile_once(cases, backend):
    """`aot_eager` makes inductor's graphs and runs them without its compiler, which takes most of a minute each."""
    (compiled,) = on_ranks(1, three_steps, cases, backend)
    for case, (losses, tensors) in zip(cases, compiled, strict=True):
        oracle = Training(replace(case, parallel=ParallelConfig()))
        for _ in range(3):
            oracle.step()
        tolerance = 1e-5 if case.precision == "fp32" else 2e-2
        assert losses == pytest.approx(oracle.state.meter.read()["total_loss"], rel=tolerance), case
        for name, tensor in oracle.tensors().items() if case.precision == "fp32" else ():
            if name.endswith((".exp_avg", "center")):
                torch.testing.assert_close(tensors[name], tensor, atol=1e-5, rtol=1e-3, msg=f"{case}: {name}")


def test_compiled_blocks_whose_weights_are_gathered_take_the_same_steps():
    sharded = Case(ParallelConfig(strategy="fsdp", compile=True), drop_path_rate=0.0)
    eager = replace(sharded, parallel=ParallelConfig(strategy="fsdp"))
    both, _ = on_ranks(2, three_steps, [sharded, eager], "aot_eager")
    (losses, tensors), (expected, wanted) = both
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(tensors, wanted, atol=1e-5, rtol=1e-3)


def four_steps_and_two(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    training = Training(case)
    training.step()
    with torch.compiler.set_stance("fail_on_recompile"):
        training.step()
        halfway = training.tensors()
        training.step()
        training.step()
    return halfway, training.tensors()


def two_more_steps(case: Case, halfway: dict[str, Tensor]) -> dict[str, Tensor]:
    training = Training(case)
    for name, tensor in training.state.tensors().items():
        tensor.data.copy_(halfway[name])
    training.state.step = 2
    training.step()
    training.step()
    return training.tensors()


def test_a_compiled_run_that_is_taken_up_by_another_process_has_the_same_bits():
    ((halfway, expected),) = on_ranks(1, four_steps_and_two, Case())
    (resumed,) = on_ranks(1, two_more_steps, Case(), halfway)
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, resumed[name])] == []


def graphs_and_calls(depth: int, rate: float, *, uniform: bool, no_grad_too: bool) -> list[int]:
    """Of a deep student and its teacher: graphs made, then graphs called in the step after, and outside of training."""
    made, called = [], []

    def backend(graph: Any, _: Any) -> Any:
        made.append(graph)
        return lambda *inputs: (called.append(1), graph.forward(*inputs))[1]

    torch.compile = partial(torch.compile, backend=backend)  # not inductor: its compiler would take minutes
    rates = [rate if uniform else rate * number / (depth - 1) for number in range(depth)]
    student, teacher = (
        ViT(image_size=28, patch_size=14, width=8, num_heads=2, drop_path_rates=drops, attention="sdpa")
        for drops in (rates, [0.0] * depth)
    )
    teacher.eval()
    for network, trained in ((student, True), (teacher, False)):
        parallelise(network, list(network.blocks), COMPILED, None, torch.float32, trained=trained)
    crops, masks = [torch.randn(32, 3, 28, 28), torch.randn(128, 3, 14, 14)], [torch.rand(32, 4) < 0.3, None]

    def step() -> None:
        with torch.no_grad():
            teacher(crops[:1])
            if no_grad_too:
                student(crops, masks)
        sum(features.cls.sum() for features in student(crops, masks)).backward()

    step()
    graphs = len(made)
    called.clear()
    step()
    in_step = len(called)
    with torch.no_grad(), left_as_found(student):
        student([torch.randn(3, 3, 28, 28)])
    return [graphs, len(made), in_step, len(called)]


def test_in_a_network_of_equal_blocks_there_are_two_graphs_however_deep():
    ((graphs, later, in_step, after),) = on_ranks(
        1, partial(graphs_and_calls, uniform=True, no_grad_too=False), 40, 0.4
    )
    assert (graphs, later, in_step, after) == (2, 2, 80, 80)


@pytest.mark.parametrize("depth", [12, pytest.param(40, marks=pytest.mark.slow)])
def test_no_block_is_left_uncompiled_where_every_one_has_its_own_rate(depth):
    """torch's limit is eight graphs of one function; beyond it, it runs the function as it is."""
    deep = partial(graphs_and_calls, uniform=False, no_grad_too=True)
    ((graphs, later, in_step, after),) = on_ranks(1, deep, depth, 0.4)
    assert 8 < graphs <= 2 * depth + 1
    assert (later, in_step, after) == (graphs, 3 * depth, 3 * depth)
