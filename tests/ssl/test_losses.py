"""The losses against DINOv2's recorded values and against loops written out."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pathfm.ssl.losses import dino_cross_entropy, ibot_cross_entropy, koleo
from tests.ssl.small import Recorded

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def recorded(golden_dir: Path) -> Recorded:
    return Recorded(golden_dir / "dinov2_losses.npz")


def cross_entropy_written_out(student: Tensor, teacher: Tensor, temp: float = 0.1) -> Tensor:
    return -(teacher * torch.log(torch.softmax(student / temp, -1))).sum(-1)


def test_dino_loss_of_local_crops_equals_the_recorded_sum_over_pairs(recorded: Recorded) -> None:
    teacher = recorded["sinkhorn/teacher_probs"].unflatten(0, (2, -1))
    student = recorded["student_local_logits"].unflatten(0, (3, -1))
    loss = dino_cross_entropy(student, teacher, same_views=False)
    torch.testing.assert_close(loss * 6, recorded["dino_local_loss"], **TOLERANCE)


def test_dino_loss_of_global_crops_equals_the_recorded_one(recorded: Recorded) -> None:
    # The recording pairs row i of the student with row i of the targets, so the targets were swapped before.
    teacher = recorded["sinkhorn/teacher_probs"].unflatten(0, (2, -1)).flip(0)
    student = recorded["student_global_logits"].unflatten(0, (2, -1))
    loss = dino_cross_entropy(student, teacher, same_views=True)
    torch.testing.assert_close(loss, recorded["dino_global_loss"], **TOLERANCE)


@pytest.mark.parametrize("same_views", [False, True])
def test_dino_loss_is_the_mean_over_the_pairs_that_count(same_views: bool) -> None:
    student, teacher = torch.randn(3, 5, 7), torch.rand(3, 5, 7)
    pairs = [(s, t) for s in range(3) for t in range(3) if not (same_views and s == t)]
    expected = torch.stack([cross_entropy_written_out(student[s], teacher[t]).mean() for s, t in pairs]).mean()
    torch.testing.assert_close(dino_cross_entropy(student, teacher, same_views=same_views), expected)


def test_dino_loss_without_student_views_is_zero_and_keeps_its_gradient() -> None:
    student = torch.zeros(0, 5, 7, requires_grad=True)
    loss = dino_cross_entropy(student, torch.rand(2, 5, 7), same_views=False)
    loss.backward()
    assert loss == 0
    assert student.grad is not None


def test_ibot_loss_and_its_gradient_equal_the_recorded_ones(recorded: Recorded) -> None:
    student = recorded["ibot/student_logits"].requires_grad_()
    masks, weights = recorded["ibot/masks"], recorded["ibot/masks_weight"]
    loss = ibot_cross_entropy(student, recorded["ibot/centered_teacher_probs"], weights, num_crops=len(masks))
    loss.backward()
    torch.testing.assert_close(loss.detach(), recorded["ibot/loss"], **TOLERANCE)
    torch.testing.assert_close(student.grad, recorded["ibot/student_grad"], **TOLERANCE)


def test_ibot_loss_is_the_mean_over_crops_of_the_mean_over_their_masked_patches() -> None:
    masked = [3, 0, 1, 4]
    student, teacher = torch.randn(8, 7), torch.rand(8, 7)
    weights = torch.cat([torch.full((n,), 1 / n) for n in masked if n])
    rows = cross_entropy_written_out(student, teacher).split(masked)
    expected = torch.stack([row.mean() if len(row) else torch.tensor(0.0) for row in rows]).mean()
    torch.testing.assert_close(ibot_cross_entropy(student, teacher, weights, num_crops=4), expected)


def test_koleo_and_its_gradient_equal_the_recorded_ones(recorded: Recorded) -> None:
    cls = recorded["koleo/x"].requires_grad_()
    loss = koleo(cls)
    loss.backward()
    torch.testing.assert_close(loss.detach(), recorded["koleo/loss"], **TOLERANCE)
    torch.testing.assert_close(cls.grad, recorded["koleo/grad"], **TOLERANCE)


def test_koleo_looks_for_neighbours_within_a_group_only() -> None:
    cls = torch.randn(12, 5)
    expected = torch.stack([koleo(group) for group in cls.split(4)]).mean()
    torch.testing.assert_close(koleo(cls, 4), expected)


def test_koleo_of_one_sample_is_zero() -> None:
    assert koleo(torch.randn(1, 5)) == 0


def test_koleo_stays_finite_and_exact_under_autocast_with_equal_features() -> None:
    cls = torch.randn(4, 5).repeat(2, 1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo(cls)
    loss.backward()
    assert torch.equal(loss, koleo(cls))
    assert torch.isfinite(cls.grad).all()


def test_losses_of_half_precision_logits_are_computed_in_fp32() -> None:
    student, teacher = torch.randn(2, 3, 50).bfloat16(), torch.rand(2, 3, 50).softmax(-1)
    assert dino_cross_entropy(student, teacher, same_views=True).dtype == torch.float32
    torch.testing.assert_close(
        dino_cross_entropy(student, teacher, same_views=True),
        dino_cross_entropy(student.float(), teacher, same_views=True),
    )
