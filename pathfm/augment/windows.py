"""Crops of a region: windows of its grid of patch features, turned and flipped. Drawn first, cut afterwards.

B samples of this rank's batch   C crops of a sample, global ones first   G, V global and local crops per sample
D width of the features   h, w rows and columns of a region's grid. Rows are view-major, as in `assemble`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pathfm.augment.assemble import Sample, batch_of
from pathfm.augment.config import NUM_GLOBAL_CROPS, Augmentation, AugmentConfig, CropsConfig, resolve
from pathfm.augment.masks import MaskPlan, draw_masks
from pathfm.batch import Batch
from pathfm.random_streams import stream

# Columns of a crop's uniform numbers.
_TOP, _LEFT, _HORIZONTAL_FLIP, _VERTICAL_FLIP, _IS_TURNED, _TURNS = range(6)
_NUM_UNIFORMS = 6


@dataclass(frozen=True)
class WindowPlans:
    """What is cut out of each region's grid for each of its crops."""

    size: Int[np.ndarray, " C"]  # side of the window, patches
    top: Int[np.ndarray, "B C"]
    left: Int[np.ndarray, "B C"]
    horizontal_flip: Bool[np.ndarray, "B C"]
    vertical_flip: Bool[np.ndarray, "B C"]
    quarter_turns: Int[np.ndarray, "B C"]  # counter-clockwise, after the flips

    def cut(self, b: int, crop: int, grid: Float[np.ndarray, "h w D"]) -> Float[np.ndarray, "s s D"]:
        """A crop of sample `b`, whose grid this is. A view."""
        size, top, left = self.size[crop], self.top[b, crop], self.left[b, crop]
        window = grid[top : top + size, left : left + size]
        window = window[:, ::-1] if self.horizontal_flip[b, crop] else window
        window = window[::-1] if self.vertical_flip[b, crop] else window
        return np.rot90(window, self.quarter_turns[b, crop])


def draw_windows(
    augmentation: Augmentation,
    crops: CropsConfig,
    grids: Sequence[tuple[int, int]],
    seed: int,
    positions: Sequence[int],
) -> WindowPlans:
    """The plans of the samples at these positions of the order, whose grids have these (rows, columns).

    Every place of a window is equally likely, as in HIPT (arXiv 2206.02647). Of `augmentation` flips and right angles
    are read; colours have no meaning here.
    """
    shape = NUM_GLOBAL_CROPS + crops.local_crops_number, _NUM_UNIFORMS
    uniforms = np.stack([stream(seed, position, "windows").random(shape) for position in positions])
    size = np.array([crops.global_crops_size] * NUM_GLOBAL_CROPS + [crops.local_crops_size] * crops.local_crops_number)
    rows, columns = np.array(grids).T[:, :, None]
    is_turned = uniforms[..., _IS_TURNED] < augmentation.right_angle_rotation_probability
    return WindowPlans(
        size=size,
        top=(uniforms[..., _TOP] * (rows - size + 1)).astype(np.int64),
        left=(uniforms[..., _LEFT] * (columns - size + 1)).astype(np.int64),
        horizontal_flip=uniforms[..., _HORIZONTAL_FLIP] < augmentation.horizontal_flip_probability,
        vertical_flip=uniforms[..., _VERTICAL_FLIP] < augmentation.vertical_flip_probability,
        quarter_turns=np.where(is_turned, (uniforms[..., _TURNS] * 4).astype(np.int64), 0),
    )


class AssembleWindows:
    """Makes one rank's `Batch` of a step out of regions' features, as `Assemble` does out of images."""

    def __init__(
        self, crops: CropsConfig, augment: AugmentConfig, masks: MaskPlan, seed: int, global_batch_size: int
    ) -> None:
        self._crops = crops
        self._augmentation = resolve(augment)
        self._masks = masks
        self._seed = seed
        self._global_batch_size = global_batch_size

    def __call__(self, samples: Sequence[Sample], step: int) -> Batch:
        """The batch of these samples, whose positions must lie within the global batch of `step`."""
        positions = [sample.position for sample in samples]
        grids = [sample.image for sample in samples]
        plans = draw_windows(self._augmentation, self._crops, [grid.shape[:2] for grid in grids], self._seed, positions)
        masks = torch.from_numpy(draw_masks(self._masks, self._seed, step, positions, self._global_batch_size))
        views = range(len(plans.size))
        global_crops = _stacked(plans, grids, views[:NUM_GLOBAL_CROPS], self._crops.global_crops_size)
        local_crops = _stacked(plans, grids, views[NUM_GLOBAL_CROPS:], self._crops.local_crops_size)
        return batch_of(samples, global_crops, local_crops, masks)


def _stacked(
    plans: WindowPlans, grids: Sequence[Float[np.ndarray, "h w D"]], views: range, size: int
) -> Float[Tensor, "VB D s s"]:
    """The crops of these views, view-major; a patch's numbers stay together in memory (torch's channels_last)."""
    room = torch.empty((len(views), len(grids), size, size, grids[0].shape[-1]))
    for row, view in zip(room.numpy(), views, strict=True):
        for b, grid in enumerate(grids):
            row[b] = plans.cut(b, view, grid)
    return room.permute(0, 1, 4, 2, 3).flatten(0, 1)
