"""From decoded samples to the batch that travels to the device: crops, masks and their bookkeeping.

B samples of this rank's batch   G global crops per sample   V local crops per sample   L patches of a global crop
M masked patches. Rows are view-major: crop v of sample b is row v * B + b.
"""

from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from pathfm.augment.apply import apply_plan
from pathfm.augment.config import NUM_GLOBAL_CROPS, AugmentConfig, CropsConfig, patches_per_side, resolve
from pathfm.augment.draw import CropPlans, draw_crops
from pathfm.augment.masks import MaskPlan, draw_masks
from pathfm.batch import Batch
from pathfm.errors import UserError


class Sample(Protocol):
    """One decoded image and where it stands."""

    @property
    def position(self) -> int:
        """Global position in the sample order."""

    @property
    def sample(self) -> int:
        """Row of the data set."""

    @property
    def image(self) -> UInt8[np.ndarray, "H W 3"]:
        """RGB pixels."""


class Assemble:
    """Makes one rank's `Batch` of a step out of decoded samples. Small and picklable: loader workers hold a copy.

    What comes out depends on the seed, the step, the samples and the global batch size, not on who computes it:
    the rows of two ranks' halves are the rows of the whole.
    """

    def __init__(
        self,
        crops: CropsConfig,
        augment: AugmentConfig,
        masks: MaskPlan,
        patch_size: int,
        seed: int,
        global_batch_size: int,
    ) -> None:
        """Raises `UserError` when a crop's size is no multiple of the patch size or the masks' grid is another."""
        patches_per_side(crops.local_crops_size, patch_size, "crops.local_crops_size")
        side = patches_per_side(crops.global_crops_size, patch_size, "crops.global_crops_size")
        if (masks.height, masks.width) != (side, side):
            raise UserError(
                f"masks for {masks.height} x {masks.width} patches do not fit global crops of {side} x {side} "
                f"(crops.global_crops_size={crops.global_crops_size}, patch size {patch_size})"
            )
        self._crops = crops
        self._augmentation = resolve(augment)
        self._masks = masks
        self._seed = seed
        self._global_batch_size = global_batch_size

    def __call__(self, samples: Sequence[Sample], step: int) -> Batch:
        """The batch of these samples, whose positions must lie within the global batch of `step`."""
        global_crops, local_crops = self._crops_of(samples)
        positions = [sample.position for sample in samples]
        masks = torch.from_numpy(draw_masks(self._masks, self._seed, step, positions, self._global_batch_size))
        return Batch(
            global_crops=global_crops,
            local_crops=local_crops,
            masks=masks,
            mask_indices=masks.flatten().nonzero().flatten(),
            mask_weights=mask_weights(masks),
            positions=torch.tensor(positions, dtype=torch.int64),
            samples=torch.tensor([sample.sample for sample in samples], dtype=torch.int64),
        )

    def _crops_of(self, samples: Sequence[Sample]) -> tuple[UInt8[Tensor, "GB 3 H W"], UInt8[Tensor, "VB 3 h w"]]:
        global_crops = _room_for(NUM_GLOBAL_CROPS, len(samples), self._crops.global_crops_size)
        local_crops = _room_for(self._crops.local_crops_number, len(samples), self._crops.local_crops_size)
        rooms = [*global_crops.numpy(), *local_crops.numpy()]  # of each view
        plans = self._plans_of(samples)
        for b, sample in enumerate(samples):
            image = np.require(sample.image, requirements="W")
            for plan, room in zip(plans.of_sample(b), rooms, strict=True):
                cv2.split(apply_plan(plan, image), list(room[b]))  # writes the three planes where they belong
        return global_crops.flatten(0, 1), local_crops.flatten(0, 1)

    def _plans_of(self, samples: Sequence[Sample]) -> CropPlans:
        sizes = [sample.image.shape[:2] for sample in samples]
        positions = [sample.position for sample in samples]
        return draw_crops(self._augmentation, self._crops, sizes, self._seed, positions)


def mask_weights(masks: Bool[Tensor, "GB L"]) -> Float[Tensor, " M"]:
    """1 / (number of masked patches of the same crop) for every masked patch, so that each masked crop counts once."""
    per_crop: Int[Tensor, "GB 1"] = masks.sum(dim=1, keepdim=True)
    return per_crop.clamp(min=1).float().reciprocal().expand_as(masks)[masks]


def _room_for(views: int, num_samples: int, size: int) -> UInt8[Tensor, "views B 3 size size"]:
    return torch.empty((views, num_samples, 3, size, size), dtype=torch.uint8)
