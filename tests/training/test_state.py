from dataclasses import replace

import pytest
import torch

from pathfm.checkpoint.store import DamagedCheckpoint, Snapshot
from pathfm.schedule import StepValues
from pathfm.training.config import OptimConfig, TrainConfig
from pathfm.training.state import TrainingState
from pathfm.training.step import build_optimizer, build_scaler, train_step
from tests.ssl.small import random_batch, small_dinov2

CPU = torch.device("cpu")
VALUES = StepValues(lr=1e-3, last_layer_lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05)


def fresh_state() -> TrainingState:
    method = small_dinov2(separate_head=True, drop_path_rate=0.2)
    return TrainingState(method, build_optimizer(method, OptimConfig(), CPU), build_scaler(CPU))


def take_steps(state: TrainingState, number: int, precision: str = "fp32") -> None:
    for _ in range(number):
        batch = random_batch(seed=state.step)
        train_step(state, batch, VALUES, TrainConfig(precision=precision), OptimConfig(), rank=0)


def assert_equal(one: Snapshot, other: Snapshot) -> None:
    assert (one.step, one.values) == (other.step, other.values)
    assert one.tensors.keys() == other.tensors.keys()
    assert [name for name in one.tensors if not torch.equal(one.tensors[name], other.tensors[name])] == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_restored_state_takes_the_very_same_steps(precision):
    undisturbed = fresh_state()
    take_steps(undisturbed, 2, precision)
    kept = undisturbed.snapshot()
    kept = replace(kept, tensors={name: tensor.clone() for name, tensor in kept.tensors.items()})
    take_steps(undisturbed, 3, precision)

    restored = fresh_state()
    torch.manual_seed(12345)  # whatever the new process did before
    restored.restore(kept)
    assert_equal(restored.snapshot(), kept)
    take_steps(restored, 3, precision)
    assert_equal(restored.snapshot(), undisturbed.snapshot())


def test_the_optimisers_moments_are_kept_by_parameter_name():
    state = fresh_state()
    take_steps(state, 1)
    moments = {name for name in state.snapshot().tensors if name.startswith("optimizer.")}
    trained = {name for name, parameter in state.method.student.named_parameters() if parameter.requires_grad}
    assert moments == {f"optimizer.{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda tensors: tensors.pop("optimizer.backbone.cls_token.exp_avg"), "cls_token.exp_avg is missing"),
        (lambda tensors: tensors.update({"method.x": torch.zeros(1)}), "method.x is not part of this run"),
        (lambda tensors: tensors.update({"method.student.backbone.norm.bias": torch.zeros(2)}), "this run has"),
    ],
)
def test_a_checkpoint_with_other_keys_is_refused_by_name(spoil, said):
    state = fresh_state()
    take_steps(state, 1)
    snapshot = state.snapshot()
    tensors = dict(snapshot.tensors)
    spoil(tensors)
    with pytest.raises(DamagedCheckpoint, match=said):
        fresh_state().restore(replace(snapshot, tensors=tensors))


def test_a_step_without_a_finite_gradient_changes_only_what_counts_it():
    state = fresh_state()
    take_steps(state, 1)
    before = {name: tensor.clone() for name, tensor in state.snapshot().tensors.items()}
    poisoned = random_batch(seed=9)
    poisoned.global_crops[0, 0, 0, 0] = torch.nan
    train_step(state, poisoned, VALUES, TrainConfig(precision="fp32"), OptimConfig(), rank=0)
    after = state.snapshot()
    changed = {name for name, tensor in after.tensors.items() if not torch.equal(tensor, before[name])}
    assert {name for name in changed if not name.startswith("method.teacher.")} == set()  # the teacher may follow
    assert all(torch.isfinite(after.tensors[name]).all() for name in after.tensors)
    assert after.step == 2
    assert after.values["meter"]["finite"] == [1.0, 0.0]


def test_two_seeds_of_the_trainer_draw_other_drop_paths():
    ends = []
    for seed in (0, 1):
        state = fresh_state()
        train_step(state, random_batch(), VALUES, TrainConfig(seed=seed, precision="fp32"), OptimConfig(), rank=0)
        ends.append(state.snapshot().tensors["method.student.backbone.norm.bias"])
    assert not torch.equal(*ends)
