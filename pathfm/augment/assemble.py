"""From decoded samples to the batch that travels to the device: crops, masks and their bookkeeping.

B samples of this rank's batch   G global crops per sample   V local crops per sample   L patches of a global crop
M masked patches. Rows are view-major: crop v of sample b is row v * B + b.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from pathfm.augment.apply import apply_plan
from pathfm.augment.config import NUM_GLOBAL_CROPS, AugmentConfig, CropsConfig, patches_per_side, resolve
from pathfm.augment.draw import CropPlans, draw_crops
from pathfm.augment.masks import MaskPlan, draw_masks
from pathfm.batch import Batch, Uncropped
from pathfm.errors import UserError

_MOST_ROOM = 4  # for images in one tensor, as a multiple of their own pixels


class Sample(Protocol):
    """What was decoded, and where it stands."""

    @property
    def position(self) -> int:
        """Global position in the sample order."""

    @property
    def sample(self) -> int:
        """Row of the data set."""

    @property
    def image(self) -> np.ndarray:
        """RGB pixels, uint8 [H, W, 3]; or a feature for each patch of a region's grid, float [h, w, D]."""


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
        crops_on_device: bool = False,
    ) -> None:
        """With `crops_on_device` batches hold images and plans, of which `crop_on_device` makes the crops; but
        crops where one image is so large that the others' room in one tensor would be mostly empty.

        Raises `UserError` when a crop's size is no multiple of the patch size or the masks' grid is another.
        """
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
        self._crops_on_device = crops_on_device

    def __call__(self, samples: Sequence[Sample], step: int) -> Batch:
        """The batch of these samples, whose positions must lie within the global batch of `step`."""
        positions = [sample.position for sample in samples]
        images = [sample.image for sample in samples]
        sizes = [image.shape[:2] for image in images]
        plans = draw_crops(self._augmentation, self._crops, sizes, self._seed, positions)
        masks = torch.from_numpy(draw_masks(self._masks, self._seed, step, positions, self._global_batch_size))
        on_device = self._crops_on_device and not _is_mostly_empty(sizes)
        global_crops, local_crops = self._crops_of([] if on_device else images, plans)
        return batch_of(samples, global_crops, local_crops, masks, uncropped(images, plans) if on_device else None)

    def _crops_of(
        self, images: Sequence[UInt8[np.ndarray, "H W 3"]], plans: CropPlans
    ) -> tuple[UInt8[Tensor, "GB 3 H W"], UInt8[Tensor, "VB 3 h w"]]:
        global_crops = _room_for(NUM_GLOBAL_CROPS, len(images), self._crops.global_crops_size)
        local_crops = _room_for(self._crops.local_crops_number, len(images), self._crops.local_crops_size)
        rooms = [*global_crops.numpy(), *local_crops.numpy()]  # of each view
        for b, image in enumerate(images):
            image = np.require(image, requirements="W")  # torch warns about read-only memory, as Pillow's is
            for plan, room in zip(plans.of_sample(b), rooms, strict=True):
                room[b] = apply_plan(plan, image)
        return _as_channels_first(global_crops), _as_channels_first(local_crops)


def batch_of(
    samples: Sequence[Sample],
    global_crops: Tensor,
    local_crops: Tensor,
    masks: Bool[Tensor, "GB L"],
    uncropped: Uncropped | None = None,
) -> Batch:
    """The crops and masks of these samples, with what follows from them."""
    return Batch(
        global_crops=global_crops,
        local_crops=local_crops,
        masks=masks,
        mask_indices=masks.flatten().nonzero().flatten(),
        mask_weights=mask_weights(masks),
        positions=torch.tensor([sample.position for sample in samples], dtype=torch.int64),
        samples=torch.tensor([sample.sample for sample in samples], dtype=torch.int64),
        uncropped=uncropped,
    )


def uncropped(images: Sequence[UInt8[np.ndarray, "H W 3"]], plans: CropPlans) -> Uncropped:
    """Images of any sizes in one tensor, and their plans as tensors."""
    height, width, channels = np.max([image.shape for image in images], axis=0)
    together = np.zeros((len(images), height, width, channels), dtype=np.uint8)
    for image, room in zip(images, together, strict=True):
        room[: image.shape[0], : image.shape[1]] = image
    return Uncropped(torch.from_numpy(together), {name: torch.from_numpy(v) for name, v in vars(plans).items()})


def mask_weights(masks: Bool[Tensor, "GB L"]) -> Float[Tensor, " M"]:
    """1 / (number of masked patches of the same crop) for every masked patch, so that each masked crop counts once."""
    per_crop: Int[Tensor, "GB 1"] = masks.sum(dim=1, keepdim=True)
    return per_crop.clamp(min=1).float().reciprocal().expand_as(masks)[masks]


def _is_mostly_empty(sizes: Sequence[tuple[int, int]]) -> bool:
    """Whether the room for images of these (height, width), as large for each as for the largest, holds little."""
    heights, widths = np.array(sizes).T
    return bool(len(sizes) * heights.max() * widths.max() > _MOST_ROOM * (heights * widths).sum())


def _room_for(views: int, num_samples: int, size: int) -> UInt8[Tensor, "V B S S 3"]:
    return torch.empty((views, num_samples, size, size, 3), dtype=torch.uint8)


def _as_channels_first(room: UInt8[Tensor, "V B S S 3"]) -> UInt8[Tensor, "VB 3 S S"]:
    """A view: a pixel's channels stay together in memory, as they were decoded (torch's channels_last)."""
    return room.permute(0, 1, 4, 2, 3).flatten(0, 1)
