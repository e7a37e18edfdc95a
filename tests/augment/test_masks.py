"""Block-wise masks, stratified over the global batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfm.augment.masks import MaskPlan, block_mask, draw_masks
from pathfm.random_streams import stream

PLAN = MaskPlan(height=16, width=16)


def global_batch(step, size):
    return range(step * size, (step + 1) * size)


def draw(plan=PLAN, seed=1, step=3, size=32):
    return draw_masks(plan, seed, step, global_batch(step, size), size)


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), share=st.floats(0, 1), position=st.integers(0, 10**6))
def test_a_block_mask_never_hides_more_patches_than_asked(height, width, share, position):
    num_masked = int(share * height * width)
    mask = block_mask(height, width, num_masked, stream(0, position, "test"))
    assert mask.shape == (height, width)
    assert mask.sum() <= num_masked


def test_a_block_mask_hides_nearly_all_that_was_asked():
    hidden = [block_mask(16, 16, 100, stream(0, position, "test")).sum() for position in range(200)]
    assert np.mean(hidden) > 98


def test_a_mask_is_made_of_blocks_and_not_of_single_patches():
    masks = np.stack([block_mask(16, 16, 76, stream(0, position, "test")) for position in range(200)])
    also_below = (masks[:, :-1] & masks[:, 1:]).sum() / masks[:, :-1].sum()
    assert also_below > 0.7  # single patches drawn at random would say 0.3


@pytest.mark.parametrize(("probability", "size"), [(0.5, 32), (0.5, 7), (0.3, 11), (1.0, 8), (0.0, 8)])
def test_exactly_the_stated_share_of_the_global_batch_is_masked(probability, size):
    masks = draw(MaskPlan(16, 16, probability), size=size)
    assert masks.shape == (2 * size, 256)
    assert masks.dtype == bool
    assert (masks.any(axis=1)).sum() == int(2 * size * probability)


def test_each_masked_crop_has_its_own_stratum_of_the_ratios():
    size = 20
    edges = np.linspace(0.1, 0.5, size + 1) * 256
    for step in range(20):
        counts = np.sort(draw(step=step, size=size).sum(axis=1))[size:]
        # Sorted counts lie in their strata from above; the generator may stop short of a target, never beyond it.
        assert (counts <= edges[1:]).all()
        assert (counts >= np.floor(edges[:-1])).mean() > 0.9


def test_which_crops_are_masked_changes_from_step_to_step_and_reaches_both_views():
    masked = np.stack([draw(step=step).any(axis=1) for step in range(50)])
    assert len(np.unique(masked, axis=0)) == 50
    share_of_each_crop = masked.mean(axis=0)
    assert share_of_each_crop.min() > 0.2
    assert share_of_each_crop.max() < 0.8


@pytest.mark.parametrize("ranks", [2, 4, 32])
def test_the_shares_of_the_ranks_are_the_rows_of_the_whole(ranks):
    step, size = 5, 32
    whole = draw(step=step, size=size).reshape(2, size, -1)
    positions = np.split(np.array(global_batch(step, size)), ranks)
    shares = [draw_masks(PLAN, 1, step, share, size).reshape(2, size // ranks, -1) for share in positions]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)


def test_the_order_of_the_positions_is_the_order_of_the_rows_and_nothing_else():
    whole = draw(step=0, size=8).reshape(2, 8, -1)
    shuffled = draw_masks(PLAN, 1, 0, [5, 2, 7], 8).reshape(2, 3, -1)
    np.testing.assert_array_equal(shuffled, whole[:, [5, 2, 7]])


def test_the_same_seed_and_step_give_the_same_masks_and_another_seed_others():
    np.testing.assert_array_equal(draw(), draw())
    assert (draw() != draw(seed=2)).any()


def test_a_position_outside_the_steps_batch_is_refused():
    with pytest.raises(AssertionError):
        draw_masks(PLAN, 1, 3, [32], 8)
