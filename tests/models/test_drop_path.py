"""Stochastic depth on packed tokens: whole crops are dropped, and the expectation stays."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pathfm.models.attention import Layout, token_slices
from pathfm.models.drop_path import Branch, add_branch, draw

LAYOUT: Layout = ((4, 3), (10, 2), (1, 5))
TOKENS = 12 + 20 + 5


def dropped(tokens: Tensor, branch: Branch, rate: float) -> Tensor:
    return add_branch(tokens, LAYOUT, branch, draw(tokens, LAYOUT, rate))


def ones(tokens: Tensor, layout: Layout) -> Tensor:
    assert sum(crops * length for crops, length in layout) == len(tokens)
    return torch.ones_like(tokens)


@settings(max_examples=30, deadline=None)
@given(rate=st.floats(0.11, 0.95), seed=st.integers(0, 2**31))
def test_every_draw_of_a_subset_adds_up_to_the_undropped_sum_in_every_group(rate: float, seed: int) -> None:
    torch.manual_seed(seed)
    added = dropped(torch.zeros(TOKENS, 1), ones, rate)
    for rows, crops, tokens in token_slices(LAYOUT):
        assert added[rows].sum().item() == pytest.approx(crops * tokens, rel=1e-5)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.7])
def test_drop_path_keeps_the_expectation_of_every_token(rate: float) -> None:
    torch.manual_seed(0)
    draws = torch.stack([dropped(torch.zeros(TOKENS, 1), ones, rate) for _ in range(2000)])
    standard_error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - 1).abs() <= 5 * standard_error + 1e-5).all()


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_tokens_of_one_crop_share_their_fate(rate: float) -> None:
    torch.manual_seed(1)
    added = dropped(torch.zeros(TOKENS, 1), ones, rate)
    for rows, crops, tokens in token_slices(LAYOUT):
        per_crop = added[rows].view(crops, tokens)
        assert (per_crop == per_crop[:, :1]).all()


def test_the_branch_sees_only_the_crops_that_keep_it() -> None:
    seen: list[Layout] = []

    def branch(tokens: Tensor, layout: Layout) -> Tensor:
        seen.append(layout)
        return ones(tokens, layout)

    dropped(torch.zeros(TOKENS, 1), branch, 0.3)
    assert seen == [((2, 3), (7, 2), (1, 5))]


def test_gradients_flow_through_the_kept_crops_scaled_as_the_output() -> None:
    torch.manual_seed(2)
    tokens = torch.randn(TOKENS, 2, requires_grad=True)
    torch.manual_seed(3)
    (gradient,) = torch.autograd.grad(dropped(tokens, lambda kept, _: 2 * kept, 0.5).sum(), tokens)
    torch.manual_seed(3)
    added = dropped(torch.zeros(TOKENS, 2), ones, 0.5)
    torch.testing.assert_close(gradient, 1 + 2 * added)


def test_gradients_of_a_subset_are_those_of_adding_its_rows_and_the_residual_is_not_kept() -> None:
    tokens, weight = torch.randn(TOKENS, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    drawn, upstream, kept = draw(tokens, LAYOUT, 0.4), torch.randn(TOKENS, 3), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        added = add_branch(tokens, LAYOUT, lambda rows, _: rows @ weight, drawn)
    written_out = tokens + torch.zeros_like(tokens).index_put((drawn.rows,), tokens[drawn.rows] @ weight * drawn.scale)
    torch.testing.assert_close(added, written_out)
    inputs = [tokens, weight]
    torch.testing.assert_close(
        torch.autograd.grad(added, inputs, upstream), torch.autograd.grad(written_out, inputs, upstream)
    )
    assert kept.count((len(drawn.rows), 3)) == 1, "the branch's input, for the gradient of its weight"
