"""Centring and Sinkhorn-Knopp against DINOv2's recorded values, and the same numbers on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pathfm.ssl.targets import Centring, SinkhornKnopp, build_targets, sinkhorn_knopp
from tests.ssl.lockstep import Total, on_ranks
from tests.ssl.small import Recorded

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def recorded(golden_dir: Path) -> Recorded:
    return Recorded(golden_dir / "dinov2_losses.npz")


def balanced(logits: Tensor, temp: float, **options: Any) -> Tensor:
    (asked,) = sinkhorn_knopp([logits], temp, **options)
    return asked.all()


def written_out(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """SwAV's algorithm on the whole matrix, in double precision."""
    assignments = (logits.double() / temp).exp()
    for _ in range(iterations):
        assignments = assignments / assignments.sum(0)
        assignments = assignments / assignments.sum(1, keepdim=True)
    return assignments.float()


def test_three_steps_of_centring_equal_the_recorded_ones(recorded: Recorded) -> None:
    centring = Centring(96)
    for step in range(3):
        name = f"center_step{step}"
        torch.testing.assert_close(centring.center, recorded[f"{name}/center_before"], **TOLERANCE)
        (asked,) = centring.targets([recorded["teacher_logits"] * (step + 1)], recorded[f"{name}/temp"].item())
        torch.testing.assert_close(asked.all(), recorded[f"{name}/teacher_probs"], **TOLERANCE)
        centring.finish_step()
    torch.testing.assert_close(centring.center, recorded["center_final"], **TOLERANCE)


def test_centring_of_masked_patches_equals_the_recorded_one(recorded: Recorded) -> None:
    centring = Centring(96)
    (asked,) = centring.targets([recorded["ibot/teacher_logits"]], 0.07)
    torch.testing.assert_close(asked.all(), recorded["ibot/centered_teacher_probs"], **TOLERANCE)
    centring.finish_step()
    torch.testing.assert_close(centring.center, recorded["ibot/center_after"][0], **TOLERANCE)


def test_sinkhorn_knopp_equals_the_recorded_targets(recorded: Recorded) -> None:
    for logits, probs in (
        ("teacher_logits", "sinkhorn/teacher_probs"),
        ("ibot/teacher_logits", "ibot/sinkhorn_teacher_probs"),
    ):
        (asked,) = sinkhorn_knopp([recorded[logits]], 0.07)
        torch.testing.assert_close(asked.all(), recorded[probs], **TOLERANCE)


@pytest.mark.parametrize("share", [5, 0], ids=["uneven", "one rank has nothing"])
def test_sinkhorn_knopp_on_two_ranks_equals_one(share: int) -> None:
    logits = torch.randn(12, 9)
    parts = on_ranks(
        [lambda total, rows=rows: balanced(rows, 0.1, total=total) for rows in (logits[:share], logits[share:])]
    )
    torch.testing.assert_close(torch.cat(parts), written_out(logits, 0.1))


def test_sinkhorn_knopp_uses_all_prototypes_about_equally_and_gives_distributions() -> None:
    probs = balanced(torch.randn(200, 10) + torch.arange(10.0), 1.0, iterations=50)
    torch.testing.assert_close(probs.sum(1), torch.ones(200))
    torch.testing.assert_close(probs.mean(0), torch.full((10,), 0.1), atol=1e-4, rtol=1e-3)


def test_sinkhorn_knopp_is_the_same_in_parts_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(23, 9, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("pathfm.ssl.targets.rows_at_once", lambda num_prototypes, device: 4)
    parts = sinkhorn_knopp(logits.split(9), 0.05)
    assert [len(part) for part in parts] == [9, 9, 5]
    torch.testing.assert_close(torch.cat([part.all() for part in parts]), written_out(logits, 0.05))


def test_sinkhorn_knopp_stands_a_prototype_that_nobody_is_near():
    logits = torch.randn(6, 4)
    logits[:, 2] = -60
    assert torch.isfinite(balanced(logits, 0.3)).all()


def test_sinkhorn_knopp_computes_in_fp32_under_autocast() -> None:
    logits = torch.randn(12, 9)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(balanced(logits, 0.1), written_out(logits, 0.1))


def test_some_rows_are_those_rows_of_all() -> None:
    (asked,) = Centring(5).targets([torch.randn(7, 5)], 0.1)
    which = torch.tensor([4, 0])
    assert torch.equal(asked.rows(which), asked.all()[which])


@pytest.mark.parametrize("share", [5, 0], ids=["uneven", "one rank has nothing"])
def test_the_centre_on_two_ranks_equals_one(share: int) -> None:
    logits = torch.randn(12, 9)

    def centre(rows: Tensor, total: Total) -> Tensor:
        centring = Centring(9, total)
        centring.targets([rows], 0.1)
        centring.finish_step()
        return centring.center

    ranks = on_ranks([lambda total, rows=rows: centre(rows, total) for rows in (logits[:share], logits[share:])])
    for center in ranks:
        torch.testing.assert_close(center, 0.1 * logits.mean(0, keepdim=True))


def test_the_centre_moves_once_per_step_however_many_batches_the_step_has() -> None:
    logits = torch.randn(12, 9)
    centring = Centring(9)
    for part in logits.split(4):
        centring.targets([part], 0.1)
    assert not centring.center.any()
    centring.finish_step()
    torch.testing.assert_close(centring.center, 0.1 * logits.mean(0, keepdim=True))


def test_the_centre_stays_when_nothing_was_seen_or_a_logit_was_not_finite() -> None:
    centring = Centring(3)
    centring.targets([torch.ones(2, 3)], 0.1)
    centring.finish_step()
    center = centring.center.clone()
    for rows in (torch.zeros(0, 3), torch.tensor([[0.0, torch.nan, 1.0]]), torch.tensor([[0.0, torch.inf, 1.0]])):
        centring.targets([rows], 0.1)
        centring.finish_step()
        assert torch.equal(centring.center, center)
    centring.targets([torch.ones(2, 3)], 0.1)
    centring.finish_step()
    torch.testing.assert_close(centring.center, torch.full((1, 3), 0.19))


def test_evaluation_does_not_move_the_centre() -> None:
    centring = Centring(3).eval()
    centring.targets([torch.ones(2, 3)], 0.1)
    centring.finish_step()
    assert not centring.center.any()


def test_the_centre_and_nothing_else_is_resumed() -> None:
    assert list(Centring(3).state_dict()) == ["center"]
    assert not SinkhornKnopp().state_dict()


def test_recipes_name_the_target_makers() -> None:
    assert isinstance(build_targets("centering", 3), Centring)
    assert isinstance(build_targets("sinkhorn_knopp", 3), SinkhornKnopp)
