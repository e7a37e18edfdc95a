import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pathfm.data.order import BatchRange
from pathfm.dist.env import ALONE
from pathfm.schedule import StepValues
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.state import TrainingState
from pathfm.training.step import build_loss_scale, build_optimizer, train_step
from tests.ssl.small import random_batch, shares_of, small_dinov2, spread_out

CPU = torch.device("cpu")
VALUES = StepValues(lr=1e-3, last_layer_lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05)


Kept = tuple[int, dict[str, Tensor], dict[str, Any]]


def fresh_state(precision: str = "fp32") -> TrainingState:
    method = small_dinov2(separate_head=True, drop_path_rate=0.2)
    loss_scale = build_loss_scale(TrainConfig(precision=precision), CPU)
    return TrainingState(method, build_optimizer(method, OptimConfig()), loss_scale)


def take_steps(state: TrainingState, number: int, precision: str = "fp32") -> None:
    for _ in range(number):
        batch = random_batch(seed=state.step)
        train_step(state, [batch], VALUES, TrainConfig(precision=precision), OptimConfig(), ALONE)


def kept(state: TrainingState) -> Kept:
    """A copy of all that a checkpoint would hold."""
    state.steps_judged = state.step  # as the loop does before it saves
    return state.step, {name: tensor.clone() for name, tensor in state.tensors().items()}, copy.deepcopy(state.values())


def take_up(state: TrainingState, checkpoint: Kept) -> None:
    step, tensors, values = checkpoint
    for name, tensor in state.tensors().items():
        tensor.copy_(tensors[name])
    state.take_up(step, values)


def assert_equal(one: Kept, other: Kept) -> None:
    assert (one[0], repr(one[2])) == (other[0], repr(other[2]))  # by repr: a NaN is equal to a NaN
    assert one[1].keys() == other[1].keys()
    assert [name for name in one[1] if not torch.equal(one[1][name], other[1][name])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_state_that_is_taken_up_takes_the_very_same_steps(precision):
    undisturbed = fresh_state(precision)
    take_steps(undisturbed, 2, precision)
    checkpoint = kept(undisturbed)
    take_steps(undisturbed, 3, precision)

    restored = fresh_state(precision)
    torch.manual_seed(12345)  # whatever the new process did before
    take_up(restored, checkpoint)
    assert_equal(kept(restored), checkpoint)
    take_steps(restored, 3, precision)
    assert_equal(kept(restored), kept(undisturbed))


def test_the_optimisers_moments_are_there_by_parameter_name_also_while_gradients_are():
    state = fresh_state()
    take_steps(state, 1)
    trained = {name for name, parameter in state.method.student.named_parameters() if parameter.requires_grad}
    expected = {f"optimizer.{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}
    for gradients_exist in (False, True):
        if gradients_exist:
            state.method.losses(random_batch(), 0.05).total.backward()
        assert {name for name in state.tensors() if name.startswith("optimizer.")} == expected


def test_batches_that_are_left_out_are_part_of_the_state():
    state, ranges = fresh_state(), [(3, 8), (20, 25)]
    state.passed_over = list[BatchRange](ranges)
    state.times_gone_back = 2
    restored = fresh_state()
    take_up(restored, kept(state))
    assert (restored.passed_over, restored.times_gone_back) == (ranges, 2)


def poisoned_batch():
    batch = random_batch(seed=9)
    batch.global_crops[0, 0, 0, 0] = torch.nan
    return batch


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_without_a_finite_loss_changes_only_what_counts_it(precision):
    state = fresh_state(precision)
    take_steps(state, 1, precision)
    before = kept(state)[1]
    train_step(state, [poisoned_batch()], VALUES, TrainConfig(precision=precision), OptimConfig(), ALONE)
    step, after, values = kept(state)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    may_change = ("method.teacher.", "loss_scale.")  # the teacher may follow
    assert {name for name in changed if not name.startswith(may_change)} == set()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    assert step == 2
    assert values["meter"]["finite"][-1] == 0.0
    assert values["meter"]["accident"] == [0.0, 1.0]


def test_gradients_that_a_large_loss_scale_made_infinite_are_no_accident_and_halve_it():
    state = fresh_state("fp16")
    state.loss_scale.value.fill_(2.0**126)
    take_steps(state, 1, "fp16")
    assert state.meter.read()["finite"] == [0.0]
    assert state.meter.read()["accident"] == [0.0]
    assert state.loss_scale.value == 2.0**125


def test_two_seeds_of_the_trainer_draw_other_drop_paths():
    ends = []
    for seed in (0, 1):
        state = fresh_state()
        train_step(state, [random_batch()], VALUES, TrainConfig(seed=seed, precision="fp32"), OptimConfig(), ALONE)
        ends.append(state.tensors()["method.student.backbone.norm.bias"])
    assert not torch.equal(*ends)


@pytest.mark.parametrize("koleo_group_size", [2, 8], ids=["KoLeo within a part", "KoLeo across parts"])
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_a_batch_in_four_parts_takes_the_step_of_the_whole(centering, koleo_group_size):
    ends = []
    for num_parts in (1, 4):
        method = small_dinov2(centering=centering, koleo_group_size=koleo_group_size)
        spread_out(method)
        state = TrainingState(method, build_optimizer(method, OptimConfig()), build_loss_scale(TrainConfig(), CPU))
        for step in range(2):
            parts = shares_of(random_batch(16, seed=step), num_parts)
            train_step(state, parts, VALUES, TrainConfig(precision="fp32"), OptimConfig(), ALONE)
        ends.append((state.meter.read(), state.tensors()))
    (whole, whole_tensors), (in_parts, tensors) = ends
    assert whole.keys() == in_parts.keys()
    for name in whole:
        assert in_parts[name] == pytest.approx(whole[name], abs=1e-5, rel=1e-5), name
    moments = [name for name in tensors if name.endswith("exp_avg")]
    assert moments
    for name in moments:
        torch.testing.assert_close(tensors[name], whole_tensors[name], atol=1e-6, rtol=1e-4)


def test_drop_path_is_the_same_when_a_part_is_seen_twice():
    """KoLeo's first look at a part must see the network that the second one trains."""
    method = small_dinov2(koleo_group_size=8, drop_path_rate=0.4)
    parts = shares_of(random_batch(8), 2)
    seen = []
    method.student.backbone.register_forward_hook(lambda _, __, groups: seen.append(groups[0].cls.detach()))
    list(method.losses_of_parts(parts, 0.05, lambda part: torch.manual_seed(part)))
    first_look, second_look = seen[:2], seen[2:]
    assert [torch.equal(*pair) for pair in zip(first_look, second_look, strict=True)] == [True, True]
    assert not torch.equal(*first_look)
