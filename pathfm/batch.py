"""The tensors that travel between rooms, with their legend.

B samples of this rank's batch   G global crops per sample   V local crops per sample   L patches of a global crop
M masked patches of the batch. Crops are view-major: crop v of sample b is row v * B + b.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be decoded and was replaced by a neighbour; of a position there may be several."""

    position: int
    sample: int
    cohort: str
    file: str
    reason: str


@dataclass(frozen=True)
class Uncropped:
    """Decoded images and what is to happen to them: crops that are still to be made, on the device."""

    images: UInt8[Tensor, "B H W 3"]  # filled up at the bottom and on the right to the largest
    plans: Mapping[str, Tensor]  # [B, C, ...] the fields of `augment.draw.CropPlans`

    def with_every_tensor(self, change: Callable[[Tensor], Tensor]) -> "Uncropped":
        return Uncropped(change(self.images), {name: change(numbers) for name, numbers in self.plans.items()})


@dataclass(frozen=True)
class Batch:
    """One rank's share of a global batch. Crops are uint8 as they leave the loader, float after `normalised`.

    Where crops are made on the device, there are none yet when the batch leaves the loader, but `uncropped`.
    """

    global_crops: UInt8[Tensor, "GB 3 H W"] | Float[Tensor, "GB 3 H W"]
    local_crops: UInt8[Tensor, "VB 3 h w"] | Float[Tensor, "VB 3 h w"]
    masks: Bool[Tensor, "GB L"]
    mask_indices: Int[Tensor, " M"]  # flat positions of the masked patches in masks
    mask_weights: Float[Tensor, " M"]  # 1 / (number of masked patches of the same crop)
    positions: Int[Tensor, " B"]  # global positions in the sample order
    samples: Int[Tensor, " B"]  # rows of the data set that were read
    skipped: tuple[Skipped, ...] = ()
    uncropped: Uncropped | None = None

    @property
    def num_samples(self) -> int:
        return len(self.positions)

    @property
    def num_global_crops(self) -> int:
        """G, global crops per sample."""
        return len(self.global_crops) // self.num_samples

    @property
    def num_local_crops(self) -> int:
        """V, local crops per sample."""
        return len(self.local_crops) // self.num_samples

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds, also of what is still to be cropped."""
        yield from (value for value in vars(self).values() if isinstance(value, Tensor))
        if self.uncropped is not None:
            yield from (self.uncropped.images, *self.uncropped.plans.values())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device (copies from pinned memory do not block)."""
        return self._with_every_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Page-locked copies; called by torch's loader when it pins."""
        return self._with_every_tensor(Tensor.pin_memory)

    def _with_every_tensor(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {name: change(v) for name, v in vars(self).items() if isinstance(v, Tensor)}
        uncropped = self.uncropped and self.uncropped.with_every_tensor(change)
        return replace(self, **changed, uncropped=uncropped)

    def normalised(self, dtype: torch.dtype = torch.float32) -> "Batch":
        """Crops as float, ImageNet mean and standard deviation; float crops pass unchanged but for the dtype."""
        return replace(
            self,
            global_crops=normalise_crops(self.global_crops, dtype),
            local_crops=normalise_crops(self.local_crops, dtype),
        )


def normalise_crops(crops: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [N, 3, H, W] -> float with ImageNet mean and standard deviation; float crops only change dtype."""
    if crops.dtype != torch.uint8:
        return crops.to(dtype)
    mean, std = _statistics(crops.device)
    return ((crops.float() - mean) / std).to(dtype)


@lru_cache  # a tensor made anew at every step would make the host wait for the device
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of bytes, [1, 3, 1, 1] each."""
    with torch.inference_mode(False):
        mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], device=device).mul(255).view(2, 1, 3, 1, 1)
    return mean, std
