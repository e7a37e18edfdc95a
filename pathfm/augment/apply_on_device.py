"""Applying plans to a whole batch of images at once, on any device: what `apply` does crop by crop, within rounding.

B samples   V crops of each, all of one size S   H W pixels of the largest image   N = B * V
Crops are float [N, 3, S, S] between operations, rounded and clipped to 0..255 after each, as bytes would be.
Nothing here waits for the device, and no shape depends on what was drawn: an operation that leaves a crop as it is
is applied to it all the same, with numbers that leave it. Sums are taken in another order than on the CPU, and in
another again for another number of samples: crops may differ by a grey level here and there.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, UInt8
from torch import Tensor

from pathfm.augment.apply import BLUR_REACH, DENSITY_OF_STAINS, LUMA, STAINS_OF_DENSITY
from pathfm.augment.config import NUM_GLOBAL_CROPS, CropsConfig
from pathfm.augment.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, UNCHANGED_FACTORS
from pathfm.batch import Batch

_BLUR_OFFSETS = np.arange(-BLUR_REACH, BLUR_REACH + 1)

Crops = Float32[Tensor, "N 3 S S"]
Plans = dict[str, Tensor]  # the fields of `CropPlans`: [B, C, ...], or [N, ...] once flattened


def crop_on_device(batch: Batch, crops: CropsConfig) -> Batch:
    """The batch with its crops made from `batch.uncropped`, on the device where that is.

    For tiles: the images stand there as floats, 12 bytes a pixel, and every crop weighs all lines of its image.
    """
    assert batch.uncropped is not None
    images, plans = batch.uncropped.images, batch.uncropped.plans
    first_local = NUM_GLOBAL_CROPS
    return replace(
        batch,
        global_crops=apply_plans({k: v[:, :first_local] for k, v in plans.items()}, images, crops.global_crops_size),
        local_crops=apply_plans({k: v[:, first_local:] for k, v in plans.items()}, images, crops.local_crops_size),
        uncropped=None,
    )


def apply_plans(plans: Plans, images: UInt8[Tensor, "B H W 3"], size: int) -> UInt8[Tensor, "V*B 3 S S"]:
    """The finished crops, all `size` pixels wide and high, view-major: crop v of sample b is row v * B + b.

    `plans` [B, V, ...]: boxes lie within the images' own pixels, which are in the upper left corner of `images`.
    """
    num_samples, num_views = plans["box"].shape[:2]
    if not num_views:
        return images.new_empty(0, 3, size, size)
    flat = {name: numbers.flatten(0, 1) for name, numbers in plans.items()}
    crops = _resized(flat, images, size)
    crops = _stain_jittered(crops, flat["stain_factor"], flat["stain_shift"])
    crops = _colour_jittered(crops, flat["jitter_order"].long(), flat["jitter_factor"])
    crops = torch.where(_per_crop(flat["grayscale"]), _as_bytes(_luma(crops)), crops)
    crops = _blurred(crops, flat["blur_sigma"])
    crops = torch.where(crops >= _per_crop(flat["solarise_threshold"]), 255 - crops, crops)
    crops = torch.where(_per_crop(flat["quarter_turns"] % 2 == 1), crops.transpose(-1, -2), crops)
    return crops.to(torch.uint8).unflatten(0, (num_samples, num_views)).transpose(0, 1).flatten(0, 1)


def _resized(plans: Plans, images: UInt8[Tensor, "B H W 3"], size: int) -> Crops:
    """Boxes at `size` pixels, already flipped; of an odd number of quarter turns the transposition is still to come."""
    horizontal_flip, vertical_flip = _flips_before_transposing(plans)
    x, y, width, height = plans["box"].unbind(1)
    num_samples, image_height, image_width = images.shape[:3]
    pixels = images.permute(0, 3, 1, 2).float()
    columns = _line_weights(x, width, size, image_width, horizontal_flip).view(num_samples, 1, -1, image_width)
    narrow = _as_bytes(pixels @ columns.transpose(-1, -2)).unflatten(-1, (-1, size))  # [B, 3, H, V, S]
    rows = _line_weights(y, height, size, image_height, vertical_flip).view(num_samples, -1, 1, size, image_height)
    return _as_bytes(rows @ narrow.permute(0, 3, 1, 2, 4)).flatten(0, 1)


def _flips_before_transposing(plans: Plans) -> tuple[Bool[Tensor, " N"], Bool[Tensor, " N"]]:
    """Left-right and top-bottom flips that, then transposed where turns are odd, do what the plan's flips and turns do.

    With T transposition: one turn counter-clockwise is a left-right flip, then T; two are both flips; three T after a
    top-bottom one.
    """
    turns = plans["quarter_turns"]
    horizontal = plans["horizontal_flip"] ^ (turns == 1) ^ (turns == 2)
    return horizontal, plans["vertical_flip"] ^ (turns == 2) ^ (turns == 3)


def _line_weights(
    start: Int[Tensor, " N"], length: Int[Tensor, " N"], size: int, line: int, flipped: Bool[Tensor, " N"]
) -> Float[Tensor, "N S line"]:
    """How much each pixel of an image's line gives to each pixel of the crop's: bicubic, a = -0.5, antialiased.

    The kernel is stretched where the crop is smaller than its box; weights end at the box, as in Pillow's `resize`.
    """
    scale = length[:, None, None] / size
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    pixel = torch.arange(line, device=start.device) + 0.5 - start[:, None, None]
    weights = _cubic((pixel - centre) / scale.clamp(min=1))
    weights = torch.where((pixel > 0) & (pixel < length[:, None, None]), weights, 0)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return torch.where(flipped[:, None, None], weights.flip(1), weights)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = -0.5, in pixels (IEEE Transactions on Acoustics, Speech and Signal Processing 29, 1981)."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def _stain_jittered(crops: Crops, factor: Float32[Tensor, "N 3"], shift: Float32[Tensor, "N 3"]) -> Crops:
    fixed = _constants(crops.device)
    matrix = (fixed.density_of_stains * factor[:, None]) @ fixed.stains_of_density
    offset = -math.log(10) * (shift @ fixed.density_of_stains.T)
    jittered = 255 * _affine((crops.clamp(min=1) / 255).log(), matrix, offset).exp()
    changed = ((factor != 1) | (shift != 0)).any(dim=1)
    return torch.where(_per_crop(changed), _as_bytes(jittered), crops)


def _colour_jittered(crops: Crops, order: Int[Tensor, "N 4"], factor: Float32[Tensor, "N 4"]) -> Crops:
    """The four operations in each crop's own order: the affine ones before hue, hue, the affine ones after it.

    So the costly one, hue, is computed once for all crops and not at each of the four places that it may have.
    """
    hue_place = (order == HUE).int().argmax(dim=1)
    for place in range(3):
        crops = _affine_jittered(crops, order[:, place], factor, hue_place > place)
    crops = _hue_turned(crops, factor[:, HUE])
    for place in range(1, 4):
        crops = _affine_jittered(crops, order[:, place], factor, hue_place < place)
    return crops


def _affine_jittered(
    crops: Crops, operation: Int[Tensor, " N"], factors: Float32[Tensor, "N 4"], applies: Bool[Tensor, " N"]
) -> Crops:
    """Brightness, contrast or saturation, where it applies."""
    factor = factors.gather(1, operation[:, None]).squeeze(1)
    factor = torch.where(applies, factor, UNCHANGED_FACTORS[BRIGHTNESS])
    to_own_grey = (1 - factor) * (operation == SATURATION)
    to_mean_grey = (1 - factor) * (operation == CONTRAST) * _luma(crops).mean(dim=(1, 2, 3))
    fixed = _constants(crops.device)
    matrix = factor[:, None, None] * fixed.identity + to_own_grey[:, None, None] * fixed.to_grey
    return _as_bytes(_affine(crops, matrix, to_mean_grey[:, None].expand(-1, 3)))


def _hue_turned(crops: Crops, turns: Float32[Tensor, " N"]) -> Crops:
    """Hue turned in HSV. A channel lacks chroma * c of the value; c is 0, 1, 1, 1, 0, 0 at the circle's corners."""
    red, green, blue = crops.unbind(1)
    value = crops.amax(dim=1)
    chroma = value - crops.amin(dim=1)
    near_red, near_green, near_blue = green - blue, blue - red + 2 * chroma, red - green + 4 * chroma
    sixths = torch.where(value == red, near_red, torch.where(value == green, near_green, near_blue))
    sixths = sixths / chroma.clamp(min=1) + 6 * turns[:, None, None]
    from_corner = [(corner + sixths) % 6 for corner in (5, 3, 1)]
    missing = torch.stack([torch.minimum(k, 4 - k).clamp(0, 1) for k in from_corner], dim=1)
    turned = _as_bytes(value[:, None] - chroma[:, None] * missing)
    return torch.where(_per_crop(turns != UNCHANGED_FACTORS[HUE]), turned, crops)


def _blurred(crops: Crops, sigma: Float32[Tensor, " N"]) -> Crops:
    """Both directions as products with a banded matrix, which is the identity where sigma is 0."""
    offsets = _constants(crops.device).blur_offsets
    weights = torch.exp(-0.5 * (offsets / sigma[:, None].clamp(min=0.05)) ** 2)  # at 0.05 pixels no neighbour counts
    weights = weights / weights.sum(dim=1, keepdim=True)
    size = crops.shape[-1]
    matrix = (weights @ _taps(size, crops.device).flatten(1)).view(-1, 1, size, size)
    return _as_bytes(matrix @ crops @ matrix.transpose(-1, -2))


@lru_cache
def _taps(size: int, device: torch.device) -> Float32[Tensor, "K S S"]:
    """For each offset of the blur the matrix that shifts a line by it, mirrored at the border."""
    period = max(2 * (size - 1), 1)
    place = (np.arange(size) + _BLUR_OFFSETS[:, None]) % period
    mirrored = np.minimum(place, period - place) if size > 1 else place
    return torch.from_numpy(np.eye(size, dtype=np.float32)[mirrored]).to(device)


class _Constants(NamedTuple):
    luma: Float32[Tensor, "3 1 1"]
    identity: Float32[Tensor, "3 3"]
    to_grey: Float32[Tensor, "3 3"]
    density_of_stains: Float32[Tensor, "3 3"]
    stains_of_density: Float32[Tensor, "3 3"]
    blur_offsets: Float32[Tensor, " K"]


@lru_cache
def _constants(device: torch.device) -> _Constants:
    """Copied to the device once: a copy at every step would make the host wait."""
    grey = np.tile(LUMA, (3, 1))
    arrays = LUMA[:, None, None], np.eye(3), grey, DENSITY_OF_STAINS, STAINS_OF_DENSITY, _BLUR_OFFSETS
    return _Constants(*(torch.from_numpy(array.astype(np.float32)).to(device) for array in arrays))


def _affine(crops: Crops, matrix: Float32[Tensor, "N 3 3"], offset: Float32[Tensor, "N 3"]) -> Crops:
    return torch.baddbmm(offset[..., None], matrix, crops.flatten(2)).view_as(crops)


def _luma(crops: Crops) -> Float32[Tensor, "N 1 S S"]:
    return (crops * _constants(crops.device).luma).sum(dim=1, keepdim=True)


def _per_crop(numbers: Tensor) -> Tensor:
    return numbers[:, None, None, None]


def _as_bytes(levels: Tensor) -> Tensor:
    return levels.round().clamp(0, 255)
