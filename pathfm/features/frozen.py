"""A frozen backbone's [CLS] features of a data set, each sample once."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from pathfm.batch import normalise_crops
from pathfm.models.config import StudentConfig
from pathfm.models.vit import ViT

_NOT_FEATURES = {  # of a student's settings
    *("attention", "block_chunks", "drop_path_rate", "drop_path_uniform"),
    *("pretrained_weights", "pretrained_allow", "freeze_blocks"),
}


def architecture_of(student: StudentConfig) -> dict[str, Any]:
    """The settings that change features, as JSON has them."""
    return student.model_dump(mode="json", exclude=_NOT_FEATURES)


class Backbone(Protocol):
    """Anything that maps normalised images [N, 3, H, W] to features [N, D]."""

    def __call__(self, images: Tensor) -> Tensor: ...


class FrozenBackbone:
    """[CLS] of a vision transformer, in its own precision or under autocast.

    Images are read at the size they have, positions being resampled, or resized to `input_size` px first.
    """

    def __init__(self, vit: ViT, input_size: int | None = None, autocast: torch.dtype | None = None) -> None:
        self._vit, self._input_size, self._autocast = vit.eval(), input_size, autocast

    def __call__(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
        if self._input_size and images.shape[-2:] != (self._input_size, self._input_size):
            images = functional.interpolate(images, (self._input_size,) * 2, mode="bicubic", antialias=True)
        with torch.autocast(images.device.type, self._autocast, enabled=self._autocast is not None):
            (features,) = self._vit([images])
        return features.cls


@torch.inference_mode()
def class_token_features(
    backbone: Backbone, images: Iterable[UInt8[np.ndarray, "H W 3"]], device: torch.device, batch_size: int = 64
) -> Float[Tensor, "N D"]:
    """Features of all images, in order, on the CPU. Images must have one size."""
    parts = []
    for chunk in _chunks(images, batch_size):
        pixels = torch.from_numpy(np.stack(chunk)).permute(0, 3, 1, 2).to(device)
        parts.append(backbone(normalise_crops(pixels)).float().cpu())
    return torch.cat(parts)


def _chunks(images: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    chunk: list[np.ndarray] = []
    for image in images:
        chunk.append(image)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
