"""The plain step is the fast one's oracle, and the benchmark of both runs anywhere."""

import re
from pathlib import Path

import pytest
import step
import torch
from plain import plain_loss, plain_step
from torch.optim import AdamW

from tests.ssl.small import random_batch, small_dinov2, spread_out


@pytest.mark.parametrize("separate_head", [False, True])
def test_the_plain_loss_and_its_gradients_are_those_of_the_fast_one(separate_head: bool) -> None:
    fast, plain = (small_dinov2(separate_head=separate_head) for _ in range(2))
    for method in (fast, plain):
        spread_out(method)
    batch = random_batch(6)
    expected, found = fast.losses(batch, 0.05).total, plain_loss(plain, batch, 0.05)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    expected.backward()
    found.backward()
    for (name, ours), theirs in zip(plain.student.named_parameters(), fast.student.parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, atol=1e-5, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )
    fast.update_teacher(1.0)
    torch.testing.assert_close(plain.cls_targets.center, fast.cls_targets.center)


def test_the_plain_step_trains_and_its_teacher_follows() -> None:
    method, batch = small_dinov2(), random_batch(6)
    optimizer = AdamW(method.student.parameters(), lr=1e-3, foreach=False)
    before = method.teacher.backbone.norm.weight.clone()
    losses = [plain_step(method, optimizer, batch, 0.05, 0.9, 3.0).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert not torch.equal(method.teacher.backbone.norm.weight, before)


def test_the_benchmark_names_the_machine_and_says_where_the_time_goes(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiles = tmp_path / "tiles"
    tiles.mkdir()
    for tile in sorted((shared_data / "osteosarcoma3" / "images").iterdir())[:8]:
        (tiles / tile.name).symlink_to(tile)
    small = ["dino.head_n_prototypes=64", "crops.local_crops_number=2", "train.batch_size_per_gpu=4"]
    words = ["vittiny14", *small, "train.num_workers=0", "train.precision=fp32", "--plain"]
    options = ["--data", str(tiles), "--work", str(tmp_path / "work"), "--repeats", "2", "--steps", "1"]
    assert step.main([*words, *options, "--warm-up", "1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"cores of .+, torch [\d.]+", printed)
    assert all(f"| {row} |" in printed for row in ("samples/s", "a step, s", "plain / ours", *step.PHASES))
    shares = [float(share) for share in re.findall(r"\| ([\d.]+)% \|$", printed, re.MULTILINE)[-len(step.PHASES) :]]
    assert sum(shares) == pytest.approx(100, abs=1)
