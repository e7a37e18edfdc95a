"""Settings of crops and augmentation."""

import subprocess
import sys

import pytest

from pathfm.augment.config import (
    DINOV2,
    PATHOLOGY,
    Augmentation,
    AugmentConfig,
    CropsConfig,
    patches_per_side,
    resolve,
)
from pathfm.config import Layer, build
from pathfm.errors import UserError


def test_a_preset_alone_gives_its_own_numbers():
    assert resolve(AugmentConfig()) == DINOV2
    assert resolve(AugmentConfig(preset="pathology")) == PATHOLOGY


def test_a_key_that_is_set_changes_that_number_and_no_other():
    resolved = resolve(AugmentConfig(preset="pathology", jitter_hue=0.0, blur_sigma=(0.5, 1.5)))
    assert resolved == PATHOLOGY.model_copy(update={"jitter_hue": 0.0, "blur_sigma": (0.5, 1.5)})


def test_every_number_of_an_augmentation_is_a_key_of_the_recipe():
    numbers = Augmentation.model_json_schema()["properties"]
    keys = AugmentConfig.model_json_schema()["properties"]
    assert set(keys) == {"preset", "device", *numbers}
    for name, number in numbers.items():
        allowed, unset = keys[name]["anyOf"]
        assert allowed.items() <= number.items()  # the same type and bounds
        assert unset == {"type": "null"}
        assert keys[name]["default"] is None


def test_the_dinov2_preset_has_nothing_of_pathology():
    assert DINOV2.stain_probability == DINOV2.vertical_flip_probability == DINOV2.right_angle_rotation_probability == 0


def test_the_pathology_preset_never_solarises_or_drops_colour():
    assert PATHOLOGY.grayscale_probability == 0
    assert PATHOLOGY.solarise_probability_global_1 == PATHOLOGY.solarise_probability_global_2 == 0
    assert PATHOLOGY.solarise_probability_local == 0


@pytest.mark.parametrize(
    ("model", "tree", "words"),
    [
        (CropsConfig, {"global_crops_scale": [1.0, 0.32]}, ["global_crops_scale", "1.0", "0.32"]),
        (CropsConfig, {"local_crops_scale": [0.0, 0.32]}, ["local_crops_scale", "0.0"]),
        (CropsConfig, {"global_crops_scale": [0.3, 1.2]}, ["global_crops_scale", "1.2"]),
        (CropsConfig, {"local_crops_number": -1}, ["local_crops_number", "-1"]),
        (CropsConfig, {"local_crop_size": 98}, ["local_crop_size", "local_crops_size"]),
        (AugmentConfig, {"preset": "pathologie"}, ["preset", "pathologie"]),
        (AugmentConfig, {"jitter_hue": 0.7}, ["jitter_hue", "0.7"]),
        (AugmentConfig, {"blur_probability_local": 1.5}, ["blur_probability_local", "1.5"]),
        (AugmentConfig, {"blur_sigma": [2.0, 0.1]}, ["blur_sigma", "2.0", "0.1"]),
        (AugmentConfig, {"aspect_ratio": [0, 1]}, ["aspect_ratio", "0"]),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(model, tree, words):
    with pytest.raises(UserError) as error:
        build(model, [Layer("recipe.yaml", tree)])
    assert all(word in str(error.value) for word in ["recipe.yaml", *words]), str(error.value)


def test_a_crop_that_patches_do_not_tile_is_refused_with_sizes_that_work():
    assert patches_per_side(98, 14, "crops.local_crops_size") == 7
    with pytest.raises(UserError, match=r"crops.local_crops_size=96 .* 14; use 84 or 98"):
        patches_per_side(96, 14, "crops.local_crops_size")


def test_reading_settings_does_not_import_torch():
    code = "import sys, pathfm.augment.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
