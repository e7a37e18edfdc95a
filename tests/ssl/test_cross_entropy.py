"""Cross-entropy in chunks: in half precision too it is what autograd makes of all logits at once."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pathfm.models.head import Projection
from pathfm.ssl.cross_entropy import Chunk, cross_entropy, slices_of

ROWS, WIDTH, PROTOTYPES = 50, 32, 4096


def drawn() -> tuple[Projection, Tensor, Tensor]:
    """A student as a head makes it, targets, and weights as small as those of masked patches are."""
    generator = torch.Generator().manual_seed(0)
    bottleneck, prototypes = (
        functional.normalize(torch.randn(number, WIDTH, generator=generator), dim=1) for number in (ROWS, PROTOTYPES)
    )
    targets = torch.softmax(bottleneck.flip(0) @ prototypes.T / 0.04, -1)
    weights = 1e-5 * torch.rand(ROWS, generator=generator)
    return Projection(bottleneck.requires_grad_(), prototypes.requires_grad_()), targets, weights


def chunks(targets: Tensor, at_once: int = 7) -> list[Chunk]:
    rows = [torch.arange(part.start, part.stop) for part in slices_of(len(targets), at_once)]
    return [Chunk(of_chunk, lambda of_chunk=of_chunk: targets[of_chunk]) for of_chunk in rows]


def all_at_once(student: Projection, targets: Tensor, weights: Tensor) -> Tensor:
    return -((targets * functional.log_softmax(student.logits().float() / 0.1, -1)).sum(-1) * weights).sum()


def test_it_is_what_all_logits_at_once_give() -> None:
    student, targets, weights = drawn()
    found, expected = cross_entropy(student, weights, chunks(targets)), all_at_once(student, targets, weights)
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close((found.of_rows * weights).sum(), expected.detach())
    assert not found.of_rows.requires_grad
    torch.testing.assert_close(
        torch.autograd.grad(found.total, list(student)), torch.autograd.grad(expected, list(student))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_in_half_precision_gradients_are_as_near_to_fp32_as_those_of_autocast(dtype: torch.dtype) -> None:
    """Also in fp16 with weights below its range, for which autograd would need a scaled loss."""
    student, targets, weights = drawn()
    exact = torch.autograd.grad(all_at_once(student, targets, weights), list(student))
    with torch.autocast("cpu", dtype):
        ours = torch.autograd.grad(cross_entropy(student, weights, chunks(targets)).total, list(student))
        scale = 2.0**16
        autograds = torch.autograd.grad(scale * all_at_once(student, targets, weights), list(student))
    for name, found, autograd, expected in zip(Projection._fields, ours, autograds, exact, strict=True):
        assert found.dtype == torch.float32, name
        assert distance(found, expected) < 1.1 * distance(autograd / scale, expected) + 1e-3, name
        assert distance(found, expected) < 0.02, name


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_without_gradients_none_are_computed() -> None:
    student, targets, weights = drawn()
    with torch.no_grad():
        found = cross_entropy(student, weights, chunks(targets)).total
    assert not found.requires_grad
    torch.testing.assert_close(found, all_at_once(student, targets, weights).detach())


def test_a_logit_that_is_not_finite_is_not_hidden() -> None:
    student, targets, weights = drawn()
    with torch.no_grad():
        student.bottleneck[3, 0] = torch.nan
    assert cross_entropy(student, weights, chunks(targets)).total.isnan()


@pytest.mark.parametrize(("rows", "at_once"), [(0, 3), (1, 3), (7, 3), (9, 3), (2, 10)])
def test_slices_hold_every_row_once_and_about_equally_many(rows: int, at_once: int) -> None:
    lengths = [part.stop - part.start for part in slices_of(rows, at_once)]
    assert [row for part in slices_of(rows, at_once) for row in range(part.start, part.stop)] == list(range(rows))
    assert all(0 < length <= at_once for length in lengths)
    assert not lengths or max(lengths) - min(lengths) <= 1
