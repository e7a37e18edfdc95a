"""The losses against DINOv2's recorded values and against loops written out."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pathfm.models.head import Projection
from pathfm.ssl.losses import dino_loss, ibot_loss, koleo
from pathfm.ssl.targets import Asked, biased_softmax
from tests.ssl.small import Recorded

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def recorded(golden_dir: Path) -> Recorded:
    return Recorded(golden_dir / "dinov2_losses.npz")


def cross_entropy_written_out(student: Tensor, teacher: Tensor, temp: float = 0.1) -> Tensor:
    return -(teacher * torch.log(torch.softmax(student / temp, -1))).sum(-1)


def saying(logits: Tensor) -> Projection:
    """A student whose prototypes are the axes: the bottleneck is its logits."""
    return Projection(logits, torch.eye(logits.shape[1]))


def asking(probs: Tensor) -> Asked:
    return Asked(probs.log(), torch.ones(1), torch.zeros(probs.shape[1]), biased_softmax)


def drawn_projection(rows: int, width: int = 5, prototypes: int = 7, seed: int = 0) -> Projection:
    generator = torch.Generator().manual_seed(seed)
    bottleneck, matrix = (torch.randn(number, width, generator=generator) / 5 for number in (rows, prototypes))
    return Projection(bottleneck.requires_grad_(), matrix.requires_grad_())


def drawn_asked(rows: int, prototypes: int = 7, seed: int = 1) -> Asked:
    return asking(torch.rand(rows, prototypes, generator=torch.Generator().manual_seed(seed)).softmax(-1))


def gradients(loss: Tensor, student: Projection) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(student))


def dino_written_out(student: Projection, asked: Asked, num_samples: int) -> Tensor:
    said = student.logits().unflatten(0, (-1, num_samples))
    teacher = asked.all().unflatten(0, (-1, num_samples))
    pairs = [(s, t) for s in range(len(said)) for t in range(len(teacher)) if s != t]
    return torch.stack([cross_entropy_written_out(said[s], teacher[t]).mean() for s, t in pairs]).mean()


def test_dino_loss_equals_the_recorded_ones(recorded: Recorded) -> None:
    student = torch.cat([recorded["student_global_logits"], recorded["student_local_logits"]])
    teacher = recorded["sinkhorn/teacher_probs"]
    # The recording pairs row i of the student's global views with row i of the targets: there they are swapped.
    swapped = teacher.unflatten(0, (2, -1)).flip(0).flatten(0, 1)
    global_pairs, all_pairs = 2, 8
    of_local = dino_loss(saying(student), asking(teacher), len(teacher) // 2).of_local_views
    torch.testing.assert_close(of_local * all_pairs, recorded["dino_local_loss"], **TOLERANCE)
    of_global = dino_loss(saying(student), asking(swapped), len(teacher) // 2).of_global_views
    torch.testing.assert_close(of_global * all_pairs / global_pairs, recorded["dino_global_loss"], **TOLERANCE)


@pytest.mark.parametrize("views", [2, 3, 6])
def test_dino_loss_is_the_mean_over_pairs_of_different_views(views: int) -> None:
    student, asked = drawn_projection(views * 5), drawn_asked(10)
    loss, expected = dino_loss(student, asked, 5), dino_written_out(student, asked, 5)
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.of_global_views + loss.of_local_views, loss.total.detach())
    torch.testing.assert_close(gradients(loss.total, student), gradients(expected, student))


def test_dino_loss_without_local_views_has_none_of_theirs() -> None:
    loss = dino_loss(drawn_projection(10), drawn_asked(10), 5)
    assert loss.of_local_views == 0
    torch.testing.assert_close(loss.of_global_views, loss.total.detach())


def test_ibot_loss_and_its_gradient_equal_the_recorded_ones(recorded: Recorded) -> None:
    student = recorded["ibot/student_logits"].requires_grad_()
    masks, weights = recorded["ibot/masks"], recorded["ibot/masks_weight"]
    loss = ibot_loss(saying(student), asking(recorded["ibot/centered_teacher_probs"]), weights, num_crops=len(masks))
    loss.backward()
    torch.testing.assert_close(loss.detach(), recorded["ibot/loss"], **TOLERANCE)
    torch.testing.assert_close(student.grad, recorded["ibot/student_grad"], **TOLERANCE)


def ibot_written_out(student: Projection, asked: Asked, masked: list[int]) -> Tensor:
    rows = cross_entropy_written_out(student.logits(), asked.all()).split(masked)
    return torch.stack([row.mean() if len(row) else torch.tensor(0.0) for row in rows]).mean()


@settings(max_examples=30, deadline=None)
@given(masked=st.lists(st.integers(0, 6), min_size=1, max_size=5), at_once=st.integers(1, 40))
def test_ibot_loss_is_the_mean_over_crops_of_the_mean_over_their_masked_patches(
    masked: list[int], at_once: int
) -> None:
    """However many rows are seen at once, and when there are none."""
    student, asked = drawn_projection(sum(masked)), drawn_asked(sum(masked))
    weights = torch.cat([torch.full((n,), 1 / max(n, 1)) for n in masked])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathfm.ssl.losses.rows_at_once", lambda prototypes, device: at_once)
        loss = ibot_loss(student, asked, weights, num_crops=len(masked))
    expected = ibot_written_out(student, asked, masked)
    torch.testing.assert_close(loss, expected.detach() if sum(masked) else torch.tensor(0.0))
    ours = gradients(3 * loss, student)
    if sum(masked):
        torch.testing.assert_close(ours, gradients(3 * expected, student))
    else:
        assert not any(gradient.any() for gradient in ours)


@settings(max_examples=20, deadline=None)
@given(num_samples=st.integers(1, 7), views=st.integers(2, 5), at_once=st.integers(1, 40))
def test_dino_loss_is_the_same_in_chunks(num_samples: int, views: int, at_once: int) -> None:
    student, asked = drawn_projection(views * num_samples), drawn_asked(2 * num_samples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pathfm.ssl.losses.rows_at_once", lambda prototypes, device: at_once)
        loss = dino_loss(student, asked, num_samples).total
    expected = dino_written_out(student, asked, num_samples)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, student), gradients(expected, student))


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
