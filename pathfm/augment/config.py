"""What the crops of a sample are and how they may be altered: settings of the groups `crops` and `augment`."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from pathfm.config import Section
from pathfm.errors import UserError

NUM_GLOBAL_CROPS = 2  # the losses compare two teacher views, so this is no setting


def _ascending(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] > values[1]:
        raise ValueError(f"a range goes from low to high, not from {values[0]} to {values[1]}")
    return values


Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]  # s: factors are drawn from [1 - s, 1 + s]
HueShift = Annotated[float, Field(ge=0, le=0.5)]  # in turns of the hue circle
StainShift = Annotated[float, Field(ge=0, le=1)]  # in optical density (base 10)
GreyLevel = Annotated[int, Field(ge=0, le=255)]
AreaRange = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]


class CropsConfig(Section):
    """Two global crops and a number of local ones; scales are fractions of the image's area, sizes are pixels."""

    global_crops_scale: AreaRange = (0.32, 1.0)  # DINOv2 ssl_default_config
    local_crops_number: int = Field(8, ge=0)  # DINOv2 ssl_default_config
    local_crops_scale: AreaRange = (0.05, 0.32)  # DINOv2 ssl_default_config
    global_crops_size: int = Field(224, ge=1)  # DINOv2 ssl_default_config
    local_crops_size: int = Field(96, ge=1)  # DINOv2 ssl_default_config; 98 with 14 px patches


class Augmentation(Section):
    """Concrete numbers of every alteration; the defaults are DINOv2's. `resolve` makes one.

    A `..._probability` is the chance that one crop is altered; each crop draws for itself.
    """

    # torchvision's RandomResizedCrop, which DINOv2 leaves at its default
    aspect_ratio: Range = (3 / 4, 4 / 3)

    horizontal_flip_probability: Probability = 0.5  # DINOv2 augmentations
    vertical_flip_probability: Probability = 0.0  # DINOv2 has none: photographs have an up
    right_angle_rotation_probability: Probability = 0.0  # chance to turn by 0, 1, 2 or 3 quarters; DINOv2 has none

    stain_probability: Probability = 0.0  # DINOv2 has none
    stain_sigma: Strength = 0.0  # each stain's amount is multiplied by a factor from [1 - sigma, 1 + sigma]
    stain_bias: StainShift = 0.0  # and then shifted by an amount from [-bias, bias]

    jitter_probability: Probability = 0.8  # DINOv2 augmentations, as are the four strengths
    jitter_brightness: Strength = 0.4
    jitter_contrast: Strength = 0.4
    jitter_saturation: Strength = 0.2
    jitter_hue: HueShift = 0.1

    grayscale_probability: Probability = 0.2  # DINOv2 augmentations

    # DINOv2's chances as its paper and recipe mean them; its code applied 1 - p (the first global crop never blurred).
    blur_probability_global_1: Probability = 1.0
    blur_probability_global_2: Probability = 0.1
    blur_probability_local: Probability = 0.5
    blur_inverted: bool = False  # whether each of them acts as 1 - p, to repeat a run of that code
    blur_sigma: Range = (0.1, 2.0)  # pixels of the crop; DINOv2 transforms (kernel 9)

    solarise_probability_global_1: Probability = 0.0  # DINOv2 solarises the second global crop only
    solarise_probability_global_2: Probability = 0.2
    solarise_probability_local: Probability = 0.0
    solarise_threshold: GreyLevel = 128  # pixels at or above it are inverted; DINOv2 augmentations


DINOV2 = Augmentation()

# Values without a source are ours, set by looking at crops of H&E tiles from several slides.
PATHOLOGY = Augmentation(
    # A section lies on the glass any way round: all eight orientations are equally likely, and features that were
    # trained on them agree between orientations (arXiv 2412.11938).
    horizontal_flip_probability=0.5,
    vertical_flip_probability=0.5,
    right_angle_rotation_probability=1.0,
    # Laboratories differ in how much of each stain they use; the form is Tellez et al.'s (arXiv 1902.06543), who call
    # 0.05 light and 0.2 strong. The shift stays small because it also tints the empty background.
    stain_probability=0.8,
    stain_sigma=0.2,
    stain_bias=0.01,
    # Scanners differ in lamp and white balance, mildly. A large hue shift would make stains that do not exist.
    jitter_probability=0.5,
    jitter_brightness=0.15,
    jitter_contrast=0.15,
    jitter_saturation=0.1,
    jitter_hue=0.02,
    # Which stain a structure took up is what the colour says; without colour nuclei and pigment look the same.
    grayscale_probability=0.0,
    # Blur as DINOv2: slides are out of focus now and then, and it keeps features off the scanner's sharpening.
    # No solarising: light and dark are amounts of stain, and no slide shows them inverted.
    solarise_probability_global_2=0.0,
)

_PRESETS = {"dinov2": DINOV2, "pathology": PATHOLOGY}


class AugmentConfig(Section):
    """A preset, and any of `Augmentation`'s numbers to set on top of it; a number left out is the preset's."""

    preset: Literal["dinov2", "pathology"] = "dinov2"

    aspect_ratio: Range | None = None
    horizontal_flip_probability: Probability | None = None
    vertical_flip_probability: Probability | None = None
    right_angle_rotation_probability: Probability | None = None
    stain_probability: Probability | None = None
    stain_sigma: Strength | None = None
    stain_bias: StainShift | None = None
    jitter_probability: Probability | None = None
    jitter_brightness: Strength | None = None
    jitter_contrast: Strength | None = None
    jitter_saturation: Strength | None = None
    jitter_hue: HueShift | None = None
    grayscale_probability: Probability | None = None
    blur_probability_global_1: Probability | None = None
    blur_probability_global_2: Probability | None = None
    blur_probability_local: Probability | None = None
    blur_inverted: bool | None = None
    blur_sigma: Range | None = None
    solarise_probability_global_1: Probability | None = None
    solarise_probability_global_2: Probability | None = None
    solarise_probability_local: Probability | None = None
    solarise_threshold: GreyLevel | None = None

    # below: speed only
    device: Literal["cpu", "cuda", "auto"] = "cpu"  # what alters the pixels: the loader's workers, or the trainer's GPU


def resolve(config: AugmentConfig) -> Augmentation:
    """The preset's numbers with the keys that were set over them."""
    set_keys = config.model_dump(exclude={"preset", "device"}, exclude_none=True)
    return _PRESETS[config.preset].model_copy(update=set_keys)


def patches_per_side(crop_size: int, patch_size: int, key: str) -> int:
    """How many patches a crop's side holds. Raises `UserError` naming `key` when they do not fit evenly."""
    if crop_size % patch_size:
        below = crop_size - crop_size % patch_size
        raise UserError(
            f"{key}={crop_size} is not a multiple of the patch size {patch_size}; "
            f"use {below or patch_size} or {below + patch_size}"
        )
    return crop_size // patch_size
