"""Drawing: every random number of a sample's crops, decided before any pixel is touched.

B samples   C crops of a sample, global ones first. All parameters are arrays over samples and crops, of a shape and
type that does not depend on what was drawn: they are drawn for a whole batch at once, and applied so on a device.
A sample's uniform numbers come from its own stream, a fixed amount per crop and crop by crop, and each operation has
its columns among them: altering one operation, or adding local crops, leaves all other draws as they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int, Int8, Int16, Int32

from pathfm.augment.config import NUM_GLOBAL_CROPS, Augmentation, CropsConfig
from pathfm.random_streams import stream

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of the jitter arrays
UNCHANGED_FACTORS = (1.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation are factors, hue is a shift in turns
NOT_SOLARISED = 256  # a threshold no grey level reaches
_BOX_TRIES = 10  # torchvision's RandomResizedCrop

# Columns of a crop's uniform numbers. A new operation goes to the end; that changes what every seed draws.
_BOX = slice(0, 4 * _BOX_TRIES)
_STAIN = slice(40, 47)
_JITTER = slice(47, 56)
_GRAYSCALE = 56
_BLUR = slice(57, 59)
_SOLARISE = 59
_HORIZONTAL_FLIP = 60
_VERTICAL_FLIP = 61
_RIGHT_ANGLE = slice(62, 64)
_NUM_UNIFORMS = 64


class CropPlan(NamedTuple):
    """What happens to one crop, in plain numbers; the fields are those of `CropPlans`."""

    size: int
    box: list[int]
    stain_factor: list[float]
    stain_shift: list[float]
    jitter_order: list[int]
    jitter_factor: list[float]
    grayscale: bool
    blur_sigma: float
    solarise_threshold: int
    horizontal_flip: bool
    vertical_flip: bool
    quarter_turns: int


@dataclass(frozen=True)
class CropPlans:
    """What happens to each crop of each sample. A value that means 'leave it' stands where nothing was drawn."""

    size: Int32[np.ndarray, "B C"]  # side of the finished crop, pixels
    box: Int32[np.ndarray, "B C 4"]  # x, y, width, height in the image, pixels
    stain_factor: Float32[np.ndarray, "B C 3"]  # haematoxylin, eosin, residual; 1 leaves
    stain_shift: Float32[np.ndarray, "B C 3"]  # the same, optical density base 10; 0 leaves
    jitter_order: Int8[np.ndarray, "B C 4"]  # which of BRIGHTNESS, CONTRAST, SATURATION, HUE comes first, second, ...
    jitter_factor: Float32[np.ndarray, "B C 4"]  # columns as named above; UNCHANGED_FACTORS leaves
    grayscale: Bool[np.ndarray, "B C"]
    blur_sigma: Float32[np.ndarray, "B C"]  # pixels of the crop; 0 leaves
    solarise_threshold: Int16[np.ndarray, "B C"]  # NOT_SOLARISED leaves
    horizontal_flip: Bool[np.ndarray, "B C"]
    vertical_flip: Bool[np.ndarray, "B C"]
    quarter_turns: Int8[np.ndarray, "B C"]  # counter-clockwise, after the flips

    def of_sample(self, b: int) -> list[CropPlan]:
        """The plans of one sample's crops, for code that takes them one by one."""
        columns = [array[b].tolist() for array in vars(self).values()]
        return [CropPlan(*crop) for crop in zip(*columns, strict=True)]


def draw_crops(
    augmentation: Augmentation,
    crops: CropsConfig,
    image_sizes: Sequence[tuple[int, int]],
    seed: int,
    positions: Sequence[int],
) -> CropPlans:
    """The plans of the samples at these global positions in the order, whose images are of these (height, width).

    A sample's plan is a function of its own position and image size, whatever is drawn beside it.
    The distributions are those of torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale, GaussianBlur and
    RandomSolarize as DINOv2 composes them, plus stain jitter (Tellez et al., arXiv 1902.06543) and right angles.
    """
    shape = NUM_GLOBAL_CROPS + crops.local_crops_number, _NUM_UNIFORMS
    uniforms = np.stack([stream(seed, position, "augment").random(shape) for position in positions])
    size = _per_crop(crops, crops.global_crops_size, crops.global_crops_size, crops.local_crops_size)
    stain_factor, stain_shift = _stain(augmentation, uniforms[..., _STAIN])
    jitter_order, jitter_factor = _jitter(augmentation, uniforms[..., _JITTER])
    return CropPlans(
        size=np.tile(size.astype(np.int32), (len(uniforms), 1)),
        box=_boxes(augmentation, crops, np.array(image_sizes), uniforms[..., _BOX]),
        stain_factor=stain_factor,
        stain_shift=stain_shift,
        jitter_order=jitter_order,
        jitter_factor=jitter_factor,
        grayscale=uniforms[..., _GRAYSCALE] < augmentation.grayscale_probability,
        blur_sigma=_blur_sigma(augmentation, crops, uniforms[..., _BLUR]),
        solarise_threshold=_solarise_threshold(augmentation, crops, uniforms[..., _SOLARISE]),
        horizontal_flip=uniforms[..., _HORIZONTAL_FLIP] < augmentation.horizontal_flip_probability,
        vertical_flip=uniforms[..., _VERTICAL_FLIP] < augmentation.vertical_flip_probability,
        quarter_turns=_quarter_turns(augmentation, uniforms[..., _RIGHT_ANGLE]),
    )


def _per_crop(crops: CropsConfig, global_1: float, global_2: float, local: float) -> Float64[np.ndarray, " C"]:
    """A value for each crop, by what kind of crop it is."""
    return np.array([global_1, global_2] + [local] * crops.local_crops_number, dtype=np.float64)


def _between(low: float | np.ndarray, high: float | np.ndarray, uniform: np.ndarray) -> np.ndarray:
    return low + (high - low) * uniform


def _boxes(
    augmentation: Augmentation,
    crops: CropsConfig,
    image_sizes: Int[np.ndarray, "B 2"],
    uniforms: Float64[np.ndarray, "B C 4*tries"],
) -> Int32[np.ndarray, "B C 4"]:
    """The first of ten tries (area, log aspect ratio, place) that fits into the image, else the centre of the image."""
    area_draw, aspect_draw, x_draw, y_draw = uniforms.reshape(*uniforms.shape[:2], _BOX_TRIES, 4).transpose(3, 0, 1, 2)
    image_height, image_width = image_sizes.T[:, :, None, None]
    scales = [crops.global_crops_scale] * NUM_GLOBAL_CROPS + [crops.local_crops_scale] * crops.local_crops_number
    smallest, largest = np.array(scales).T[:, :, None]
    area = image_height * image_width * _between(smallest, largest, area_draw)
    narrowest, widest = np.log(augmentation.aspect_ratio)
    aspect = np.exp(_between(narrowest, widest, aspect_draw))
    width = np.rint(np.sqrt(area * aspect)).astype(np.int32)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int32)
    fits = (width > 0) & (width <= image_width) & (height > 0) & (height <= image_height)
    x = (x_draw * (image_width - width + 1)).astype(np.int32)
    y = (y_draw * (image_height - height + 1)).astype(np.int32)
    tries = np.stack([x, y, width, height], axis=-1)
    first_fit = np.take_along_axis(tries, fits.argmax(axis=-1)[..., None, None], axis=-2)[..., 0, :]
    centre = [_centre_box(augmentation.aspect_ratio, *size) for size in image_sizes.tolist()]
    return np.where(fits.any(axis=-1)[..., None], first_fit, np.array(centre)[:, None]).astype(np.int32)


def _centre_box(aspect_ratio: Sequence[float], image_height: int, image_width: int) -> tuple[int, int, int, int]:
    """The largest centred box whose aspect ratio is allowed."""
    narrowest, widest = aspect_ratio
    width, height = image_width, image_height
    if image_width < narrowest * image_height:
        height = min(image_height, max(1, round(image_width / narrowest)))
    elif image_width > widest * image_height:
        width = min(image_width, max(1, round(image_height * widest)))
    return (image_width - width) // 2, (image_height - height) // 2, width, height


def _stain(
    augmentation: Augmentation, uniforms: Float64[np.ndarray, "B C 7"]
) -> tuple[Float32[np.ndarray, "B C 3"], Float32[np.ndarray, "B C 3"]]:
    stained = uniforms[..., :1] < augmentation.stain_probability
    factor = _between(1 - augmentation.stain_sigma, 1 + augmentation.stain_sigma, uniforms[..., 1:4])
    shift = _between(-augmentation.stain_bias, augmentation.stain_bias, uniforms[..., 4:7])
    return np.where(stained, factor, 1).astype(np.float32), np.where(stained, shift, 0).astype(np.float32)


def _jitter(
    augmentation: Augmentation, uniforms: Float64[np.ndarray, "B C 9"]
) -> tuple[Int8[np.ndarray, "B C 4"], Float32[np.ndarray, "B C 4"]]:
    jittered = uniforms[..., :1] < augmentation.jitter_probability
    strength = [augmentation.jitter_brightness, augmentation.jitter_contrast, augmentation.jitter_saturation]
    reach = np.array([*strength, augmentation.jitter_hue])
    factor = UNCHANGED_FACTORS + _between(-reach, reach, uniforms[..., 1:5])
    order = uniforms[..., 5:].argsort(axis=-1).astype(np.int8)
    return order, np.where(jittered, factor, UNCHANGED_FACTORS).astype(np.float32)


def _blur_sigma(
    augmentation: Augmentation, crops: CropsConfig, uniforms: Float64[np.ndarray, "B C 2"]
) -> Float32[np.ndarray, "B C"]:
    probability = _per_crop(
        crops,
        augmentation.blur_probability_global_1,
        augmentation.blur_probability_global_2,
        augmentation.blur_probability_local,
    )
    if augmentation.blur_inverted:
        probability = 1 - probability
    sigma = _between(*augmentation.blur_sigma, uniforms[..., 1])
    return np.where(uniforms[..., 0] < probability, sigma, 0).astype(np.float32)


def _solarise_threshold(
    augmentation: Augmentation, crops: CropsConfig, uniforms: Float64[np.ndarray, "B C"]
) -> Int16[np.ndarray, "B C"]:
    probability = _per_crop(
        crops,
        augmentation.solarise_probability_global_1,
        augmentation.solarise_probability_global_2,
        augmentation.solarise_probability_local,
    )
    return np.where(uniforms < probability, augmentation.solarise_threshold, NOT_SOLARISED).astype(np.int16)


def _quarter_turns(augmentation: Augmentation, uniforms: Float64[np.ndarray, "B C 2"]) -> Int8[np.ndarray, "B C"]:
    turned = uniforms[..., 0] < augmentation.right_angle_rotation_probability
    return np.where(turned, np.floor(4 * uniforms[..., 1]), 0).astype(np.int8)
