"""iBOT's block-wise masks: which patches of a global crop the student does not see.

B samples of the ranks' share, N of the global batch   G global crops per sample   L = height * width patches.
Rows are view-major: crop v of sample b is row v * B + b.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from pathfm.augment.config import NUM_GLOBAL_CROPS
from pathfm.random_streams import stream

_MIN_BLOCK_PATCHES = 4  # DINOv2 masking (BEiT's is 16)
_MAX_BLOCK_SHARE = 0.5  # of the patches, in one block; DINOv2 train
_MIN_BLOCK_ASPECT = 0.3  # and at most 1 / 0.3; DINOv2 masking
_BLOCK_TRIES = 10  # DINOv2 masking


@dataclass(frozen=True)
class MaskPlan:
    """The grid of a global crop's patches and how much of it is masked."""

    height: int  # patches
    width: int  # patches
    sample_probability: float = 0.5  # share of the global batch's crops that are masked at all; DINOv2 ibot
    ratio_min: float = 0.1  # share of a masked crop's patches; DINOv2 ibot
    ratio_max: float = 0.5

    def __post_init__(self) -> None:
        assert min(self.height, self.width) > 0, self
        assert 0 <= self.sample_probability <= 1, self
        assert 0 <= self.ratio_min <= self.ratio_max <= 1, self

    @property
    def num_patches(self) -> int:
        return self.height * self.width


def draw_masks(
    plan: MaskPlan, seed: int, step: int, positions: Sequence[int], global_batch_size: int
) -> Bool[np.ndarray, "G*B L"]:
    """The masks of the samples at these positions of the order, which belong to the batch of `step`.

    floor(G * N * probability) crops of the global batch are masked; their ratios are stratified, so that every step
    masks about as much as the next: the r-th of n masked crops draws from the r-th of n equal parts of [min, max].
    """
    # DINOv2 stratifies mask ratios over a rank's batch; we do so over the global batch, so world size changes nothing.
    strata = _strata(plan, seed, step, global_batch_size)
    slots = [position - step * global_batch_size for position in positions]
    assert all(0 <= slot < global_batch_size for slot in slots), (step, global_batch_size, list(positions))
    masks = np.zeros((NUM_GLOBAL_CROPS, len(slots), plan.num_patches), dtype=bool)
    for view in range(NUM_GLOBAL_CROPS):
        for row, (position, slot) in enumerate(zip(positions, slots, strict=True)):
            lowest, highest = strata[view * global_batch_size + slot]
            if highest == 0:
                continue
            rng = stream(seed, position, f"mask {view}")
            num_masked = int(plan.num_patches * (lowest + (highest - lowest) * rng.random()))
            masks[view, row] = block_mask(plan.height, plan.width, num_masked, rng).ravel()
    return masks.reshape(-1, plan.num_patches)


def block_mask(height: int, width: int, num_masked: int, rng: np.random.Generator) -> Bool[np.ndarray, "height width"]:
    """Rectangles added until `num_masked` patches are masked or no further one fits; never more than `num_masked`.

    Source: the block-wise masking of BEiT (arXiv 2106.08254, algorithm 1) with DINOv2's numbers.
    """
    mask = np.zeros((height, width), dtype=bool)
    largest_block = _MAX_BLOCK_SHARE * height * width
    missing = num_masked
    while missing > 0:
        added = _add_block(mask, min(missing, largest_block), rng)
        if added == 0:
            break
        missing -= added
    return mask


def _strata(plan: MaskPlan, seed: int, step: int, global_batch_size: int) -> np.ndarray:
    """[G * N, 2] lowest and highest ratio of every global crop of the batch, view-major; zeros where unmasked."""
    num_crops = NUM_GLOBAL_CROPS * global_batch_size
    num_masked = int(num_crops * plan.sample_probability)
    edges = np.linspace(plan.ratio_min, plan.ratio_max, num_masked + 1)
    strata = np.zeros((num_crops, 2))
    strata[:num_masked, 0], strata[:num_masked, 1] = edges[:-1], edges[1:]
    return stream(seed, step, "mask strata").permutation(strata)


def _add_block(mask: Bool[np.ndarray, "height width"], most: float, rng: np.random.Generator) -> int:
    """Mask one rectangle that adds between 1 and `most` patches; returns how many it added, 0 after ten tries."""
    height, width = mask.shape
    for area_draw, aspect_draw, top_draw, left_draw in rng.random((_BLOCK_TRIES, 4)).tolist():
        # With fewer than the smallest block's patches to go the range is turned round, as in DINOv2: it ends at 4.
        area = _MIN_BLOCK_PATCHES + area_draw * (most - _MIN_BLOCK_PATCHES)
        aspect = _MIN_BLOCK_ASPECT ** (1 - 2 * aspect_draw)
        block_height, block_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if block_height >= height or block_width >= width:
            continue
        top = int(top_draw * (height - block_height + 1))
        left = int(left_draw * (width - block_width + 1))
        block = mask[top : top + block_height, left : left + block_width]
        added = block.size - int(np.count_nonzero(block))
        if 0 < added <= most:
            block[:] = True
            return added
    return 0
