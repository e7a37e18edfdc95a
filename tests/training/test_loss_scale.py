import torch

from pathfm.training.loss_scale import LossScale

CPU = torch.device("cpu")
FINITE, NOT_FINITE = torch.tensor(True), torch.tensor(False)


def test_it_halves_after_a_step_that_was_not_finite_and_doubles_after_many_that_were():
    scale, oracle = LossScale(CPU, dynamic=True), torch.amp.GradScaler("cpu")
    assert scale.value == oracle.get_scale() == 65536
    scale.update(NOT_FINITE)
    assert scale.value == 65536 * oracle.get_backoff_factor()
    for _ in range(oracle.get_growth_interval()):
        assert scale.value == 32768
        scale.update(FINITE)
    assert scale.value == 32768 * oracle.get_growth_factor()
    assert scale.finite_steps == 0


def test_without_fp16_it_stays_one_and_is_not_kept():
    scale = LossScale(CPU, dynamic=False)
    scale.update(NOT_FINITE)
    assert scale.value == 1
    assert not scale.can_shrink()
    assert scale.tensors() == {}
