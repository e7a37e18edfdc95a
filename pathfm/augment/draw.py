"""Drawing: every random number of a sample's crops, decided before any pixel is touched.

C crops of a sample, global ones first. All parameters are arrays over the crops, of a shape and type that does not
depend on what was drawn, so plans of many samples stack and the same numbers can be applied in batch on a GPU.
Each operation draws from its own stream, a fixed amount per crop and crop by crop: altering one operation, or adding
local crops, leaves all other draws as they were.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int8, Int16, Int32

from pathfm.augment.config import NUM_GLOBAL_CROPS, Augmentation, CropsConfig
from pathfm.random_streams import stream

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of the jitter arrays
UNCHANGED_FACTORS = (1.0, 1.0, 1.0, 0.0)  # brightness, contrast, saturation are factors, hue is a shift in turns
NOT_SOLARISED = 256  # a threshold no grey level reaches
_BOX_TRIES = 10  # torchvision's RandomResizedCrop


@dataclass(frozen=True)
class SamplePlan:
    """What happens to each crop of one sample. A value that means 'leave it' stands where nothing was drawn."""

    size: Int32[np.ndarray, " C"]  # side of the finished crop, pixels
    box: Int32[np.ndarray, "C 4"]  # x, y, width, height in the image, pixels
    stain_factor: Float32[np.ndarray, "C 3"]  # haematoxylin, eosin, residual; 1 leaves
    stain_shift: Float32[np.ndarray, "C 3"]  # the same, optical density base 10; 0 leaves
    jitter_order: Int8[np.ndarray, "C 4"]  # which of BRIGHTNESS, CONTRAST, SATURATION, HUE comes first, second, ...
    jitter_factor: Float32[np.ndarray, "C 4"]  # columns as named above; UNCHANGED_FACTORS leaves
    grayscale: Bool[np.ndarray, " C"]
    blur_sigma: Float32[np.ndarray, " C"]  # pixels of the crop; 0 leaves
    solarise_threshold: Int16[np.ndarray, " C"]  # NOT_SOLARISED leaves
    horizontal_flip: Bool[np.ndarray, " C"]
    vertical_flip: Bool[np.ndarray, " C"]
    quarter_turns: Int8[np.ndarray, " C"]  # counter-clockwise, after the flips

    @property
    def num_crops(self) -> int:
        return len(self.size)


def draw_sample(
    augmentation: Augmentation, crops: CropsConfig, image_height: int, image_width: int, seed: int, position: int
) -> SamplePlan:
    """The plan of the sample at a global position in the order; a function of its arguments alone.

    The distributions are those of torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale, GaussianBlur and
    RandomSolarize as DINOv2 composes them, plus stain jitter (Tellez et al., arXiv 1902.06543) and right angles.
    """
    num_crops = NUM_GLOBAL_CROPS + crops.local_crops_number

    def uniforms(name: str, *per_crop: int) -> Float64[np.ndarray, "C ..."]:
        return stream(seed, position, f"augment {name}").random((num_crops, *per_crop))

    stain_factor, stain_shift = _stain(augmentation, uniforms("stain", 7))
    jitter_order, jitter_factor = _jitter(augmentation, uniforms("jitter", 9))
    return SamplePlan(
        size=_per_crop(crops, crops.global_crops_size, crops.global_crops_size, crops.local_crops_size, np.int32),
        box=_boxes(augmentation, crops, image_height, image_width, uniforms("box", _BOX_TRIES, 4)),
        stain_factor=stain_factor,
        stain_shift=stain_shift,
        jitter_order=jitter_order,
        jitter_factor=jitter_factor,
        grayscale=uniforms("grayscale") < augmentation.grayscale_probability,
        blur_sigma=_blur_sigma(augmentation, crops, uniforms("blur", 2)),
        solarise_threshold=_solarise_threshold(augmentation, crops, uniforms("solarise")),
        horizontal_flip=uniforms("horizontal flip") < augmentation.horizontal_flip_probability,
        vertical_flip=uniforms("vertical flip") < augmentation.vertical_flip_probability,
        quarter_turns=_quarter_turns(augmentation, uniforms("right angle", 2)),
    )


def _per_crop(crops: CropsConfig, global_1: float, global_2: float, local: float, dtype: type) -> np.ndarray:
    """A value for each crop, by what kind of crop it is."""
    return np.array([global_1, global_2] + [local] * crops.local_crops_number, dtype=dtype)


def _between(low: float | np.ndarray, high: float | np.ndarray, uniform: np.ndarray) -> np.ndarray:
    return low + (high - low) * uniform


def _boxes(
    augmentation: Augmentation,
    crops: CropsConfig,
    image_height: int,
    image_width: int,
    uniforms: Float64[np.ndarray, "C tries 4"],
) -> Int32[np.ndarray, "C 4"]:
    """The first of ten tries (area, log aspect ratio, place) that fits into the image, else the centre of the image."""
    scales = [crops.global_crops_scale] * NUM_GLOBAL_CROPS + [crops.local_crops_scale] * crops.local_crops_number
    smallest, largest = np.array(scales).T[:, :, None]
    area = image_height * image_width * _between(smallest, largest, uniforms[..., 0])
    narrowest, widest = np.log(augmentation.aspect_ratio)
    aspect = np.exp(_between(narrowest, widest, uniforms[..., 1]))
    width = np.rint(np.sqrt(area * aspect)).astype(np.int32)
    height = np.rint(np.sqrt(area / aspect)).astype(np.int32)
    fits = (width > 0) & (width <= image_width) & (height > 0) & (height <= image_height)
    x = (uniforms[..., 2] * (image_width - width + 1)).astype(np.int32)
    y = (uniforms[..., 3] * (image_height - height + 1)).astype(np.int32)
    first_fit = np.stack([x, y, width, height], axis=-1)[np.arange(len(fits)), fits.argmax(axis=1)]
    centre = _centre_box(augmentation.aspect_ratio, image_height, image_width)
    return np.where(fits.any(axis=1)[:, None], first_fit, centre).astype(np.int32)


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
    augmentation: Augmentation, uniforms: Float64[np.ndarray, "C 7"]
) -> tuple[Float32[np.ndarray, "C 3"], Float32[np.ndarray, "C 3"]]:
    stained = uniforms[:, :1] < augmentation.stain_probability
    factor = _between(1 - augmentation.stain_sigma, 1 + augmentation.stain_sigma, uniforms[:, 1:4])
    shift = _between(-augmentation.stain_bias, augmentation.stain_bias, uniforms[:, 4:7])
    return np.where(stained, factor, 1).astype(np.float32), np.where(stained, shift, 0).astype(np.float32)


def _jitter(
    augmentation: Augmentation, uniforms: Float64[np.ndarray, "C 9"]
) -> tuple[Int8[np.ndarray, "C 4"], Float32[np.ndarray, "C 4"]]:
    jittered = uniforms[:, :1] < augmentation.jitter_probability
    strength = [augmentation.jitter_brightness, augmentation.jitter_contrast, augmentation.jitter_saturation]
    reach = np.array([*strength, augmentation.jitter_hue])
    factor = UNCHANGED_FACTORS + _between(-reach, reach, uniforms[:, 1:5])
    order = uniforms[:, 5:].argsort(axis=1).astype(np.int8)
    return order, np.where(jittered, factor, UNCHANGED_FACTORS).astype(np.float32)


def _blur_sigma(
    augmentation: Augmentation, crops: CropsConfig, uniforms: Float64[np.ndarray, "C 2"]
) -> Float32[np.ndarray, " C"]:
    probability = _per_crop(
        crops,
        augmentation.blur_probability_global_1,
        augmentation.blur_probability_global_2,
        augmentation.blur_probability_local,
        np.float64,
    )
    sigma = _between(*augmentation.blur_sigma, uniforms[:, 1])
    return np.where(uniforms[:, 0] < probability, sigma, 0).astype(np.float32)


def _solarise_threshold(
    augmentation: Augmentation, crops: CropsConfig, uniforms: Float64[np.ndarray, " C"]
) -> Int16[np.ndarray, " C"]:
    probability = _per_crop(
        crops,
        augmentation.solarise_probability_global_1,
        augmentation.solarise_probability_global_2,
        augmentation.solarise_probability_local,
        np.float64,
    )
    return np.where(uniforms < probability, augmentation.solarise_threshold, NOT_SOLARISED).astype(np.int16)


def _quarter_turns(augmentation: Augmentation, uniforms: Float64[np.ndarray, "C 2"]) -> Int8[np.ndarray, " C"]:
    turned = uniforms[:, 0] < augmentation.right_angle_rotation_probability
    return np.where(turned, np.floor(4 * uniforms[:, 1]), 0).astype(np.int8)
