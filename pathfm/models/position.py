"""Learned position embeddings, resized to the grid of a crop.

N rows (and columns) of the learned grid   D width   h, w rows and columns of the crop's patch grid
"""

from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def resized_positions(
    positions: Float[Tensor, "L D"], grid: tuple[int, int], *, antialias: bool, offset: float
) -> Float[Tensor, "hw D"]:
    """Bicubic resampling of a square grid of position embeddings, as DINOv2 does it.

    With an offset the scale is (size + offset) / N, as DINOv2's models without registers were trained; with
    offset 0 it is size / N. A crop of the learned grid's own shape gets the embeddings unchanged.
    """
    learned = round(len(positions) ** 0.5)
    if grid == (learned, learned):
        return positions
    # Bicubic resampling is separable, so it is two small matrix products. Their gradient is deterministic on CUDA,
    # which that of torch's own interpolation is not, and a resumed run must repeat its steps bit for bit.
    vertical = _resampling_matrix(learned, grid[0], antialias, offset, positions.device)
    horizontal = _resampling_matrix(learned, grid[1], antialias, offset, positions.device)
    with torch.autocast(positions.device.type, enabled=False):
        square = positions.float().unflatten(0, (learned, learned))
        resized = torch.einsum("hm,mnd,wn->hwd", vertical, square, horizontal)
    return resized.flatten(0, 1).to(positions.dtype)


@lru_cache(maxsize=64)
def _resampling_matrix(
    learned: int, size: int, antialias: bool, offset: float, device: torch.device
) -> Float[Tensor, "size learned"]:
    """Row i holds the weights with which the learned grid's lines make line i: the identity matrix, resampled."""
    with torch.inference_mode(False), torch.no_grad():
        identity = torch.eye(learned, device="cpu")[None, None]
        if offset:
            factors = ((size + offset) / learned, 1.0)
            lines = functional.interpolate(identity, scale_factor=factors, mode="bicubic", antialias=antialias)
        else:
            lines = functional.interpolate(identity, size=(size, learned), mode="bicubic", antialias=antialias)
        assert lines.shape[2:] == (size, learned), (lines.shape, size)
        return lines[0, 0].to(device)
