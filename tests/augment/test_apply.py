"""Each operation against a slow, plain oracle: Pillow, colorsys or a formula in float64."""

import colorsys

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from benchmarks.loader import pillow_crop
from pathfm.augment import apply
from pathfm.augment.config import DINOV2, PATHOLOGY, CropsConfig
from pathfm.augment.draw import BRIGHTNESS, CONTRAST, HUE, NOT_SOLARISED, SATURATION, draw_crops

MAX_MEAN_DIFFERENCE = 2.0  # grey levels


def tissue_like(height=64, width=64, seed=0):
    """Smooth pink and purple blobs with fine grain and a white corner, drawn without any file."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    pixels = 0.6 * smooth + np.array([110, 60, 100]) + rng.normal(0, 12, smooth.shape)
    pixels[: height // 4, : width // 4] = 255
    return np.clip(pixels, 0, 255).astype(np.uint8)


def assert_close(ours, oracle):
    assert ours.dtype == np.uint8
    assert ours.shape == np.shape(oracle)
    assert np.abs(ours.astype(float) - oracle).mean() <= MAX_MEAN_DIFFERENCE


def rounded(pixels):
    return np.clip(np.rint(pixels), 0, 255)


@pytest.mark.parametrize("box", [(0, 0, 64, 64), (10, 5, 30, 21), (0, 40, 64, 3), (63, 63, 1, 1)])
@pytest.mark.parametrize("size", [14, 48, 100])
def test_a_resized_crop_is_pillows_but_for_rounding(box, size):
    image, (x, y, width, height) = tissue_like(), box
    inside = Image.fromarray(image).crop((x, y, x + width, y + height))
    oracle = np.asarray(inside.resize((size, size), Image.Resampling.BICUBIC))
    ours = apply.resized_crop(image, box, size)
    difference = np.abs(ours.astype(int) - oracle)
    assert difference.max() <= 2  # both passes of the resize round
    assert difference.mean() < 0.1
    assert ours.flags.c_contiguous


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.4])
@pytest.mark.parametrize(
    ("operation", "enhance"),
    [
        (BRIGHTNESS, ImageEnhance.Brightness),
        (CONTRAST, ImageEnhance.Contrast),
        (SATURATION, ImageEnhance.Color),
    ],
)
def test_brightness_contrast_and_saturation_are_pillows(operation, enhance, factor):
    crop = tissue_like()
    assert_close(
        apply.jitter_colour(crop, operation, factor), np.asarray(enhance(Image.fromarray(crop)).enhance(factor))
    )


@pytest.mark.parametrize("turns", [-0.5, -0.1, -0.01, 0.02, 0.1, 0.5])
def test_hue_turns_in_hsv(turns):
    crop = tissue_like(24, 24)
    oracle = np.empty(crop.shape)
    for index in np.ndindex(crop.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(crop[index] / 255))
        oracle[index] = 255 * np.array(colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value))
    assert_close(apply.jitter_colour(crop, HUE, turns), oracle)
    assert np.abs(apply.jitter_colour(crop, HUE, turns) - oracle).max() <= 1


def test_grayscale_is_pillows_luma_in_three_channels():
    crop = tissue_like()
    oracle = np.asarray(Image.fromarray(crop).convert("L").convert("RGB"))
    assert np.abs(apply.grayscale(crop).astype(int) - oracle).max() <= 1


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.3, 2.0])
def test_blur_is_a_gaussian_of_nine_by_nine_pixels_mirrored_at_the_border(sigma):
    crop = tissue_like(40, 40)
    weights = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    padded = np.pad(crop.astype(float), ((4, 4), (4, 4), (0, 0)), mode="reflect")
    oracle = sum(kernel[i, j] * padded[i : i + 40, j : j + 40] for i in range(9) for j in range(9))
    assert_close(apply.blur(crop, sigma), oracle)
    assert np.abs(apply.blur(crop, sigma) - oracle).max() <= 1


@pytest.mark.parametrize("threshold", [0, 128, 255])
def test_solarise_is_pillows(threshold):
    crop = tissue_like()
    oracle = np.asarray(ImageOps.solarize(Image.fromarray(crop), threshold))
    np.testing.assert_array_equal(apply.solarise(crop, threshold), oracle)


@pytest.mark.parametrize(
    ("factor", "shift"),
    [((1.2, 0.8, 1.0), (0, 0, 0)), ((1, 1, 1), (0.05, -0.02, 0.01)), ((0.8, 1.2, 0.9), (0.02,) * 3)],
)
def test_stain_jitter_unmixes_changes_and_mixes_the_stains_of_each_pixel(factor, shift):
    crop = tissue_like()
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    density = -np.log10(np.maximum(crop, 1) / 255)
    amounts = density.reshape(-1, 3) @ np.linalg.inv(stains)
    oracle = rounded(255 * 10 ** -((amounts * factor + shift) @ stains)).reshape(crop.shape)
    ours = apply.jitter_stain(crop, factor, shift)
    assert_close(ours, oracle)
    assert np.abs(ours - oracle).max() <= 1


def test_more_haematoxylin_darkens_nuclei_and_leaves_the_empty_slide_white():
    nucleus, empty = [90, 60, 140], [255, 255, 255]
    ours = apply.jitter_stain(np.uint8([[nucleus, empty]]), [1.2, 1, 1], [0, 0, 0])
    assert (ours[0, 0] < nucleus).all()
    np.testing.assert_array_equal(ours[0, 1], empty)


@pytest.mark.parametrize(
    "neutral",
    [
        lambda crop: apply.jitter_colour(crop, BRIGHTNESS, 1.0),
        lambda crop: apply.jitter_colour(crop, CONTRAST, 1.0),
        lambda crop: apply.jitter_colour(crop, SATURATION, 1.0),
        lambda crop: apply.jitter_colour(crop, HUE, 0.0),
        lambda crop: apply.jitter_stain(crop, [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]),
        lambda crop: apply.blur(crop, 0.0),
        lambda crop: apply.solarise(crop, NOT_SOLARISED),
        lambda crop: apply.orient(crop, False, False, 0),
    ],
)
def test_parameters_that_mean_leave_it_leave_every_byte(neutral):
    crop = tissue_like()
    np.testing.assert_array_equal(neutral(crop), crop)


@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_orientation_is_pillows_flips_then_quarter_turns(horizontal, vertical, turns):
    crop = tissue_like(8, 8)
    oracle = Image.fromarray(crop)
    oracle = ImageOps.mirror(oracle) if horizontal else oracle
    oracle = ImageOps.flip(oracle) if vertical else oracle
    oracle = oracle.rotate(90 * turns)
    np.testing.assert_array_equal(apply.orient(crop, horizontal, vertical, turns), np.asarray(oracle))


@pytest.mark.parametrize("augmentation", [DINOV2, PATHOLOGY])
@pytest.mark.parametrize(("height", "width"), [(256, 256), (31, 80), (1, 1)])
def test_a_plan_gives_the_same_bytes_every_time_and_crops_of_the_sizes_asked_for(augmentation, height, width):
    image = tissue_like(height, width)
    crops = CropsConfig(local_crops_number=3, local_crops_size=98)
    plans = draw_crops(augmentation, crops, [(height, width)], seed=1, positions=[5]).of_sample(0)
    first, again = ([apply.apply_plan(plan, image) for plan in plans] for _ in range(2))
    assert [crop.shape for crop in first] == [(224, 224, 3)] * 2 + [(98, 98, 3)] * 3
    for one, other in zip(first, again, strict=True):
        assert one.dtype == np.uint8
        np.testing.assert_array_equal(one, other)


def test_operations_happen_in_the_order_resize_stain_jitter_grey_blur_solarise_orient():
    image = tissue_like()
    crops = CropsConfig(global_crops_size=32, local_crops_number=0)
    always = dict.fromkeys([name for name in type(DINOV2).model_fields if "_probability" in name], 1.0)
    plan = draw_crops(PATHOLOGY.model_copy(update=always), crops, [(64, 64)], seed=2, positions=[9]).of_sample(0)[1]
    crop = apply.resized_crop(image, plan.box, 32)
    crop = apply.jitter_stain(crop, plan.stain_factor, plan.stain_shift)
    for operation in plan.jitter_order:
        crop = apply.jitter_colour(crop, operation, plan.jitter_factor[operation])
    crop = apply.solarise(apply.blur(apply.grayscale(crop), plan.blur_sigma), 128)
    crop = apply.orient(crop, True, True, plan.quarter_turns)
    np.testing.assert_array_equal(apply.apply_plan(plan, image), crop)


def test_whole_crops_of_real_tiles_are_pillows(shared_data):
    """Of the same plans. Pillow truncates after each operation and keeps 8 bits of hue, so its own steps add up."""
    files = sorted((shared_data / "osteosarcoma3" / "images").iterdir())[::40]
    images = [Image.open(file) for file in files]
    plans = draw_crops(DINOV2, CropsConfig(), [image.size[::-1] for image in images], seed=0, positions=range(24))
    of_crops = [
        np.abs(apply.apply_plan(plan, np.array(image)).astype(float) - pillow_crop(plan, image)).mean()
        for b, image in enumerate(images)
        for plan in plans.of_sample(b)
    ]
    assert len(of_crops) == 240
    assert np.mean(of_crops) < MAX_MEAN_DIFFERENCE / 2
    assert np.quantile(of_crops, 0.95) < MAX_MEAN_DIFFERENCE
