import numpy as np
import pytest
import torch

from pathfm.evaluate.dense.heads import FrozenTokens, LinearHead, Regression, Segmentation, Tokens
from tests.evaluate.dense.small import tiny_vit


def _tokens(windows: int = 3, channels: int = 5) -> Tokens:
    drawn = torch.Generator().manual_seed(0)
    return Tokens(
        torch.randn(windows, channels, 2, 4, generator=drawn), torch.randn(windows, channels, generator=drawn)
    )


def test_tokens_are_the_last_blocks_one_after_the_other():
    vit = tiny_vit()
    windows = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(0))
    tokens = FrozenTokens(vit, 2)(windows)
    first, last = vit.intermediate_layers(windows, 2)
    assert tokens.patches.shape == (2, 96, 2, 4)
    assert torch.equal(tokens.patches[1, :48, 1, 2], first.patches[1, 1 * 4 + 2])
    assert torch.equal(tokens.patches[1, 48:, 1, 2], last.patches[1, 1 * 4 + 2])
    assert torch.equal(tokens.cls, torch.cat([first.cls, last.cls], dim=1))
    assert FrozenTokens(vit, 4).channels == 96  # it has two blocks


@pytest.mark.parametrize("use_cls", [False, True])
def test_a_head_is_batch_norm_and_a_linear_layer_for_every_patch(use_cls: bool):
    tokens = _tokens()
    head = LinearHead(5, 2, use_cls=use_cls)
    patches = tokens.patches.permute(0, 2, 3, 1).reshape(-1, 5)
    read = torch.cat([patches, tokens.cls.repeat_interleave(8, 0)], 1) if use_cls else patches
    normed = (read - read.mean(0)) / torch.sqrt(read.var(0, unbiased=False) + 1e-5)
    expected = normed @ head.linear.weight[:, :, 0, 0].T + head.linear.bias
    torch.testing.assert_close(head(tokens).permute(0, 2, 3, 1).reshape(-1, 2), expected)


def test_a_head_begins_as_its_seed_says_and_disturbs_no_other_draws():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, same, other = (LinearHead(5, 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.linear.weight, same.linear.weight)
    assert not torch.equal(one.linear.weight, other.linear.weight)


def test_batch_norm_keeps_the_mean_of_all_steps():
    head = LinearHead(5, 2)
    parts = [_tokens(), _tokens(windows=6)]
    for part in parts:
        head(part)
    means = torch.stack([part.patches.mean((0, 2, 3)) for part in parts])
    torch.testing.assert_close(head.norm.running_mean, means.mean(0))


def test_a_class_map_is_the_logits_at_every_pixel():
    task = Segmentation(("a", "b", "c"))
    logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    maps = task.maps(logits, (8, 8))
    assert torch.equal(maps[..., 0, 0], logits[..., 0, 0])  # half a patch from the edge there is nothing to mix
    torch.testing.assert_close(maps[0, :, 3, 0], 0.625 * logits[0, :, 0, 0] + 0.375 * logits[0, :, 1, 0])
    assert torch.equal(task.answer(task.certain(maps[0])), maps[0].argmax(0))


def test_a_number_is_the_expectation_over_the_bins():
    task = Regression(2.0, 10.0, outputs=5)
    outputs = torch.tensor([-1.0, 0.5, 0.0, 2.0, -3.0]).view(1, 5, 1, 1).expand(1, 5, 2, 3)
    weights = np.array([0.1, 0.6, 0.1, 2.1, 0.1])
    expected = float((weights / weights.sum()) @ np.array([2.0, 4.0, 6.0, 8.0, 10.0]))
    maps = task.maps(outputs, (16, 24))
    assert maps.shape == (1, 1, 16, 24)
    torch.testing.assert_close(maps, torch.full_like(maps, expected))
    certain = torch.full((1, 5, 1, 1), -9.0)
    certain[0, 4] = 1e6
    assert float(task.maps(certain, (8, 8)).mean()) == pytest.approx(10.0, abs=1e-3)
