"""Applying plans to an image on the CPU, crop by crop.

H W image pixels, S side of a crop. Crops are uint8 RGB, height-width-channel, and stay uint8 between operations,
rounded and clipped after each, as torchvision does on the images that DINOv2 hands it (Pillow truncates; we round).
Where OpenCV or torch could do an operation in several ways, benchmarks/loader.py chose.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from jaxtyping import Float64, UInt8

from pathfm.augment.draw import BRIGHTNESS, CONTRAST, HUE, NOT_SOLARISED, SATURATION, UNCHANGED_FACTORS, CropPlan

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601: the weights of red, green and blue in grey

# Affine colour maps, [3, 4]: matrix @ (red, green, blue) + last column.
_IDENTITY = np.eye(3, 4)
_TO_GREY = np.column_stack([np.tile(LUMA, (3, 1)), np.zeros(3)])
_ONE_LEVEL = np.tile([0.0, 0.0, 0.0, 1.0], (3, 1))  # adds 1 to every channel

BLUR_REACH = 4  # pixels to each side: a kernel of 9, DINOv2's
_NEGLIGIBLE_FROM = 4.3  # sigmas: a pixel there has a ten-thousandth of the middle one's weight

# Optical density (red, green, blue) of one unit of haematoxylin, eosin and a residual stain (DAB).
# Ruifrok and Johnston, Analytical and Quantitative Cytology and Histology 23 (2001).
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
DENSITY_OF_STAINS = _STAINS.T  # columns are stains
STAINS_OF_DENSITY = np.linalg.inv(DENSITY_OF_STAINS)

_FLIP_CODE = {(True, False): 1, (False, True): 0, (True, True): -1}  # (left-right, top-bottom): OpenCV's number for it
_ROTATE_CODE = {1: cv2.ROTATE_90_COUNTERCLOCKWISE, 2: cv2.ROTATE_180, 3: cv2.ROTATE_90_CLOCKWISE}

_MINUS_DENSITY = np.log(np.maximum(np.arange(256), 1) / 255).astype(np.float32)  # natural; level 0 counts as 1


def apply_plan(plan: CropPlan, image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "S S 3"]:
    """The finished crop. `image` may be strided, but must be writable, or torch warns."""
    crop = resized_crop(image, plan.box, plan.size)
    crop = jitter_stain(crop, plan.stain_factor, plan.stain_shift)
    for operation in plan.jitter_order:
        crop = jitter_colour(crop, operation, plan.jitter_factor[operation])
    if plan.grayscale:
        crop = grayscale(crop)
    crop = blur(crop, plan.blur_sigma)
    crop = solarise(crop, plan.solarise_threshold)
    return orient(crop, plan.horizontal_flip, plan.vertical_flip, plan.quarter_turns)


def resized_crop(image: UInt8[np.ndarray, "H W 3"], box: Sequence[int], size: int) -> UInt8[np.ndarray, "S S 3"]:
    """A box (x, y, width, height) of the image at size x size pixels: bicubic (a = -0.5) with antialiasing.

    torch's uint8 kernel gives what Pillow's `crop` and `resize` give but for rounding, and is the faster of the two.
    """
    x, y, width, height = box
    inside = torch.from_numpy(image[y : y + height, x : x + width]).unsqueeze(0)
    channels_last = inside.permute(0, 3, 1, 2)  # only the view: this memory order is the fast one
    resized = torch.nn.functional.interpolate(channels_last, size=(size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).squeeze(0).numpy())


def jitter_stain(
    crop: UInt8[np.ndarray, "S S 3"], factor: Sequence[float], shift: Sequence[float]
) -> UInt8[np.ndarray, "S S 3"]:
    """More or less of each stain: amounts c of haematoxylin, eosin and residual become factor * c + shift.

    Optical density is linear in the amounts (Beer and Lambert), so unmixing, change and mixing are one affine map of
    it. Base 10, so that a shift of 1 is a tenfold darkening. Source: Tellez et al., arXiv 1902.06543.
    """
    if list(factor) == [1, 1, 1] and list(shift) == [0, 0, 0]:
        return crop
    matrix = DENSITY_OF_STAINS @ np.diag(factor) @ STAINS_OF_DENSITY
    offset = -np.log(10) * (DENSITY_OF_STAINS @ shift)
    minus_density = cv2.transform(cv2.LUT(crop, _MINUS_DENSITY), np.column_stack([matrix, offset]))
    return cv2.convertScaleAbs(cv2.exp(minus_density), alpha=255)


def jitter_colour(crop: UInt8[np.ndarray, "S S 3"], operation: int, factor: float) -> UInt8[np.ndarray, "S S 3"]:
    """One of the four operations of torchvision's ColorJitter.

    brightness: factor * pixel             contrast: towards (< 1) or away from (> 1) the crop's mean grey
    hue: turned by `factor` turns in HSV   saturation: towards or away from the pixel's own grey
    """
    if factor == UNCHANGED_FACTORS[operation]:
        return crop
    if operation == HUE:
        return _turn_hue(crop, factor)
    return cv2.transform(crop, _affine_jitter(crop, operation, factor))


def grayscale(crop: UInt8[np.ndarray, "S S 3"]) -> UInt8[np.ndarray, "S S 3"]:
    """Three equal channels of ITU-R BT.601 luma."""
    return cv2.transform(crop, _TO_GREY)


def blur(crop: UInt8[np.ndarray, "S S 3"], sigma: float) -> UInt8[np.ndarray, "S S 3"]:
    """Gaussian blur with a 9 x 9 kernel, sigma in pixels, mirrored at the border; sigma 0 leaves the crop."""
    reach = min(BLUR_REACH, int(_NEGLIGIBLE_FROM * sigma))
    if reach == 0:
        return crop
    kernel = cv2.getGaussianKernel(2 * reach + 1, sigma, cv2.CV_32F)
    # Not cv2.GaussianBlur, whose bit-exact integer arithmetic for bytes is slower and no closer to the formula.
    return cv2.sepFilter2D(crop, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def solarise(crop: UInt8[np.ndarray, "S S 3"], threshold: int) -> UInt8[np.ndarray, "S S 3"]:
    """Values at or above the threshold become 255 - value."""
    if threshold >= NOT_SOLARISED:
        return crop
    _, all_ones_there = cv2.threshold(crop, threshold - 1, 255, cv2.THRESH_BINARY)
    return cv2.bitwise_xor(crop, all_ones_there)


def orient(
    crop: UInt8[np.ndarray, "S S 3"], horizontal_flip: bool, vertical_flip: bool, quarter_turns: int
) -> UInt8[np.ndarray, "S S 3"]:
    """Flips left-right and top-bottom, then counter-clockwise quarter turns."""
    if horizontal_flip or vertical_flip:
        crop = cv2.flip(crop, _FLIP_CODE[horizontal_flip, vertical_flip])
    return cv2.rotate(crop, _ROTATE_CODE[quarter_turns]) if quarter_turns else crop


def _affine_jitter(crop: UInt8[np.ndarray, "S S 3"], operation: int, factor: float) -> Float64[np.ndarray, "3 4"]:
    if operation == BRIGHTNESS:
        return factor * _IDENTITY
    if operation == CONTRAST:
        mean_grey = float(LUMA @ cv2.mean(crop)[:3])
        return factor * _IDENTITY + (1 - factor) * mean_grey * _ONE_LEVEL
    assert operation == SATURATION, operation
    return factor * _IDENTITY + (1 - factor) * _TO_GREY


def _turn_hue(crop: UInt8[np.ndarray, "S S 3"], turns: float) -> UInt8[np.ndarray, "S S 3"]:
    # In float, where hue is in degrees: 8 bits of hue would be steps of 1.4 degrees. OpenCV takes hues from 360 on
    # back into the circle, but not negative ones, so a turn to the left is a longer one to the right.
    hsv = cv2.cvtColor(crop.astype(np.float32), cv2.COLOR_RGB2HSV)
    hsv[..., 0] += 360 * (turns % 1)
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB, dst=hsv))
