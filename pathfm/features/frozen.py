"""A frozen backbone's [CLS] features of a data set, each sample once."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pathfm.batch import normalise_crops


class Backbone(Protocol):
    """Anything that maps normalised images [N, 3, H, W] to features [N, D]."""

    def __call__(self, images: Tensor) -> Tensor: ...


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
