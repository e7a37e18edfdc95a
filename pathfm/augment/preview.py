"""A picture of a batch for a person to look at: what the network is about to see."""

import math
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor

from pathfm.batch import Batch
from pathfm.sheets import captioned, in_columns, stacked

_PATCH_PX = 12  # of a patch whose features are shown
_VEIL, _VEIL_OPACITY = np.array([0, 128, 136]), 0.85  # a teal that neither tissue nor a solarised crop has


def crops_picture(batch: Batch, patch_size: int, num_samples: int = 8) -> Image.Image:
    """One row per sample: its global crops, the same with the masked patches veiled, then its local crops.

    `batch` holds uint8 crops on the CPU, as `Assemble` makes them; `patch_size` is in pixels. Or it holds windows of
    patch features: their three main components in this batch are shown as red, green and blue.
    """
    if batch.global_crops.is_floating_point():
        batch, patch_size = _coloured(batch), _PATCH_PX
    rows = [_sample_row(batch, patch_size, sample) for sample in range(min(num_samples, batch.num_samples))]
    return stacked(rows)


def _coloured(batch: Batch) -> Batch:
    """Windows of features as crops to look at, a square of `_PATCH_PX` for each patch."""
    features = batch.global_crops.permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = features.mean(0)
    _, axes = torch.linalg.eigh((features - mean).T @ (features - mean))
    axes = axes[:, -3:].flip(1)
    lengths = ((features - mean) @ axes).std(0).clamp(min=1e-12)

    def as_pixels(windows: Float[Tensor, "rows D s s"]) -> UInt8[Tensor, "rows 3 S S"]:
        components = (windows.permute(0, 2, 3, 1).double() - mean) @ axes / lengths
        colours = (components / 4 + 0.5).clamp(0, 1).mul(255).byte().permute(0, 3, 1, 2)  # two deviations each way
        return colours.repeat_interleave(_PATCH_PX, 2).repeat_interleave(_PATCH_PX, 3)

    return replace(batch, global_crops=as_pixels(batch.global_crops), local_crops=as_pixels(batch.local_crops))


def _sample_row(batch: Batch, patch_size: int, sample: int) -> Image.Image:
    global_crops = _crops_of(batch.global_crops, batch, sample)
    masks = list(batch.masks[sample :: batch.num_samples].numpy())
    veiled = [_veiled(crop, mask, patch_size) for crop, mask in zip(global_crops, masks, strict=True)]
    local_crops = _crops_of(batch.local_crops, batch, sample)

    groups = [
        (f"position {batch.positions[sample]}, sample {batch.samples[sample]}: global crops", _in_a_row(global_crops)),
        ("masked: " + ", ".join(f"{mask.mean():.0%}" if mask.any() else "none" for mask in masks), _in_a_row(veiled)),
    ]
    if local_crops:
        groups.append((f"{len(local_crops)} local crops", _in_two_rows(local_crops)))
    return captioned(groups)


def _crops_of(crops: UInt8[Tensor, "rows 3 H W"], batch: Batch, sample: int) -> list[UInt8[np.ndarray, "H W 3"]]:
    return list(crops[sample :: batch.num_samples].permute(0, 2, 3, 1).numpy())


def _veiled(
    crop: UInt8[np.ndarray, "H W 3"], mask: Bool[np.ndarray, " L"], patch_size: int
) -> UInt8[np.ndarray, "H W 3"]:
    grid = mask.reshape(crop.shape[0] // patch_size, crop.shape[1] // patch_size)
    hidden = grid.repeat(patch_size, axis=0).repeat(patch_size, axis=1)[..., None]
    veil = (1 - _VEIL_OPACITY) * crop + _VEIL_OPACITY * _VEIL
    return np.where(hidden, veil, crop).astype(np.uint8)


def _in_a_row(crops: list[UInt8[np.ndarray, "H W 3"]]) -> Image.Image:
    return _in_columns(crops, len(crops))


def _in_two_rows(crops: list[UInt8[np.ndarray, "H W 3"]]) -> Image.Image:
    return _in_columns(crops, math.ceil(len(crops) / 2))


def _in_columns(crops: list[UInt8[np.ndarray, "H W 3"]], columns: int) -> Image.Image:
    return in_columns([Image.fromarray(crop) for crop in crops], columns)
