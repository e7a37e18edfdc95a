import math

import numpy as np
import pytest
import torch

from pathfm.evaluate.dense.losses import IGNORED, pixel_cross_entropy, scale_invariant_log_loss


def _logits_and_target(ignored: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 5, 6, generator=drawn)
    target = torch.randint(0, 4, (2, 5, 6), generator=drawn).to(torch.uint8)
    target[torch.rand(target.shape, generator=drawn) < ignored] = IGNORED
    return logits, target


def test_cross_entropy_is_the_mean_over_the_pixels_that_are_not_ignored():
    logits, target = _logits_and_target()
    losses = [
        math.log(sum(math.exp(value) for value in logits[n, :, y, x].tolist()))
        - float(logits[n, int(target[n, y, x]), y, x])
        for n in range(2)
        for y in range(5)
        for x in range(6)
        if target[n, y, x] != IGNORED
    ]
    assert 0 < len(losses) < target.numel()
    assert float(pixel_cross_entropy(logits, target)) == pytest.approx(np.mean(losses), rel=1e-5)


def test_where_all_is_ignored_the_loss_is_nothing_and_has_no_slope():
    logits, target = _logits_and_target(ignored=1.1)
    logits.requires_grad_()
    loss = pixel_cross_entropy(logits, target)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def _depths() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(1)
    predicted, target = (0.1 + 5 * torch.rand(2, 4, 5, generator=drawn) for _ in range(2))
    target[0, 0] = 0.0
    target[1, 1, 1] = math.nan
    target[1, 2, 2] = math.inf
    target[1, 3, 3] = -1.0
    return predicted, target


@pytest.mark.parametrize("invariance", [0.0, 0.5, 0.85, 1.0])
def test_the_scale_invariant_loss_is_eigens_formula(invariance: float):
    predicted, target = _depths()
    g = [
        math.log(p) - math.log(t)
        for p, t in zip(predicted.flatten().tolist(), target.flatten().tolist(), strict=True)
        if math.isfinite(t) and t > 0
    ]
    assert len(g) == 2 * 20 - 5 - 3
    expected = math.sqrt(sum(x * x for x in g) / len(g) - invariance * (sum(g) / len(g)) ** 2)
    assert float(scale_invariant_log_loss(predicted, target, invariance)) == pytest.approx(expected, abs=1e-4)


def test_a_common_factor_costs_nothing_where_scale_is_wholly_invariant_and_little_by_default():
    _, target = _depths()
    predicted = target.nan_to_num(1.0, 1.0).clamp(min=0.1) * 3
    assert float(scale_invariant_log_loss(predicted, target, invariance=1.0)) < 1e-3
    assert float(scale_invariant_log_loss(predicted, target)) == pytest.approx(math.log(3) * math.sqrt(0.15), abs=1e-3)
    assert float(scale_invariant_log_loss(predicted, target, invariance=0.0)) == pytest.approx(math.log(3), abs=1e-3)


def test_unknown_pixels_and_perfect_answers_leave_finite_slopes():
    predicted, target = _depths()
    for answer in (predicted, target.nan_to_num(1.0, 1.0).clamp(min=0.0)):  # one of them is 0 at an unknown pixel
        answer = answer.clone().requires_grad_()
        scale_invariant_log_loss(answer, target).backward()
        assert torch.isfinite(answer.grad).all()
        assert not answer.grad[0, 0].any()
    nothing = torch.ones(1, 2, 2, requires_grad=True)
    loss = scale_invariant_log_loss(nothing, torch.zeros(1, 2, 2))
    loss.backward()
    assert loss == 0
    assert not nothing.grad.any()
