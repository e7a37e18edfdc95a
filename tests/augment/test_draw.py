"""Drawing the parameters of crops."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfm.augment.config import DINOV2, PATHOLOGY, CropsConfig
from pathfm.augment.draw import NOT_SOLARISED, UNCHANGED_FACTORS, CropPlan, CropPlans, draw_crops

CROPS = CropsConfig(local_crops_size=98)
FIELDS = [field.name for field in fields(CropPlans)]


def draw(augmentation=PATHOLOGY, crops=CROPS, height=256, width=256, seed=3, position=0):
    """The plans of one sample's crops: fields [crop, ...]."""
    plans = draw_crops(augmentation, crops, [(height, width)], seed, [position])
    return CropPlans(**{name: getattr(plans, name)[0] for name in FIELDS})


def many(augmentation, count=400, crops=CROPS):
    return draw_crops(augmentation, crops, [(256, 256)] * count, 3, range(count))


def assert_equal(one, other, names=FIELDS, crops=slice(None)):
    for name in names:
        np.testing.assert_array_equal(getattr(one, name)[crops], getattr(other, name)[crops], err_msg=name)


def test_a_plan_depends_on_seed_and_position_and_on_nothing_drawn_before():
    forwards = {position: draw(position=position) for position in range(5)}
    for position in reversed(range(5)):
        assert_equal(draw(position=position), forwards[position])
    assert (draw(position=1).box != forwards[0].box).any()
    assert (draw(seed=4).box != forwards[0].box).any()


def test_a_sample_is_drawn_alike_alone_and_beside_others():
    sizes, positions = [(256, 256), (31, 400), (1, 1), (256, 200)], [7, 0, 12, 5]
    together = draw_crops(PATHOLOGY, CROPS, sizes, 3, positions)
    for b, ((height, width), position) in enumerate(zip(sizes, positions, strict=True)):
        alone = draw(height=height, width=width, position=position)
        assert_equal(alone, CropPlans(**{name: getattr(together, name)[b] for name in FIELDS}))


def test_a_samples_plans_crop_by_crop_are_the_same_numbers():
    plans = many(PATHOLOGY, count=3)
    assert list(CropPlan._fields) == FIELDS
    for c, crop in enumerate(plans.of_sample(1)):
        for name in FIELDS:
            assert getattr(crop, name) == getattr(plans, name)[1, c].tolist(), name


def test_drawing_leaves_the_global_random_state_alone():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    draw()
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@settings(max_examples=200, deadline=None)
@given(
    height=st.integers(1, 2000),
    width=st.integers(1, 2000),
    position=st.integers(0, 2**40),
    smallest=st.floats(0.001, 1),
)
def test_a_box_lies_inside_its_image_whatever_the_image(height, width, position, smallest):
    crops = CropsConfig(local_crops_scale=(smallest, 1.0))
    x, y, box_width, box_height = draw(crops=crops, height=height, width=width, position=position).box.T
    assert (box_width >= 1).all()
    assert (box_height >= 1).all()
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (x + box_width <= width).all()
    assert (y + box_height <= height).all()


def test_boxes_keep_to_the_scale_and_the_aspect_ratio():
    box = many(DINOV2).box.astype(float)
    area, aspect = box[..., 2] * box[..., 3] / 256**2, box[..., 2] / box[..., 3]
    for crops, (low, high) in ((slice(0, 2), CROPS.global_crops_scale), (slice(2, None), CROPS.local_crops_scale)):
        assert area[:, crops].min() > low * 0.97  # sides are rounded to pixels
        assert area[:, crops].max() < high * 1.03
    assert aspect.min() > 0.75 * 0.97
    assert aspect.max() < 4 / 3 * 1.03
    # Log-uniform: as many lying as standing boxes. Areas of local crops, which always fit, are uniform.
    assert abs((np.log(aspect) > 0).mean() - 0.5) < 0.03
    assert abs(area[:, 2:].mean() - np.mean(CROPS.local_crops_scale)) < 0.005


@pytest.mark.parametrize(("height", "width", "box"), [(100, 1000, (433, 0, 133, 100)), (1000, 90, (0, 440, 90, 120))])
def test_an_image_too_long_for_any_box_gives_its_centre(height, width, box):
    crops = CropsConfig(global_crops_scale=(1.0, 1.0), local_crops_number=0)
    np.testing.assert_array_equal(draw(crops=crops, height=height, width=width).box, [box, box])


def test_more_local_crops_leave_the_first_ones_as_they_were():
    few, more = draw(crops=CropsConfig(local_crops_number=4)), draw(crops=CropsConfig(local_crops_number=8))
    assert_equal(few, more, crops=slice(0, 6))


@pytest.mark.parametrize(
    ("change", "touched"),
    [
        ({"jitter_probability": 1.0, "jitter_hue": 0.4}, {"jitter_factor"}),
        ({"stain_probability": 0.0}, {"stain_factor", "stain_shift"}),
        ({"grayscale_probability": 0.9}, {"grayscale"}),
        ({"blur_probability_local": 0.0, "blur_sigma": (1.0, 3.0)}, {"blur_sigma"}),
        ({"solarise_probability_local": 0.9}, {"solarise_threshold"}),
        ({"horizontal_flip_probability": 0.0}, {"horizontal_flip"}),
        ({"vertical_flip_probability": 0.0}, {"vertical_flip"}),
        ({"right_angle_rotation_probability": 0.0}, {"quarter_turns"}),
        ({"aspect_ratio": (0.5, 2.0)}, {"box"}),
    ],
)
def test_altering_one_operation_changes_the_draws_of_no_other(change, touched):
    before, after = draw(PATHOLOGY, position=8), draw(PATHOLOGY.model_copy(update=change), position=8)
    assert_equal(before, after, names=set(FIELDS) - touched)
    assert any((getattr(before, name) != getattr(after, name)).any() for name in touched)


def test_operations_happen_as_often_as_the_dinov2_preset_says():
    plan = many(DINOV2, count=1000)
    blurred, solarised = plan.blur_sigma > 0, plan.solarise_threshold < NOT_SOLARISED
    jittered = (plan.jitter_factor != np.float32(UNCHANGED_FACTORS)).any(axis=-1)
    expected = [
        (blurred[:, 0], 1.0),
        (blurred[:, 1], 0.1),
        (blurred[:, 2:], 0.5),
        (solarised[:, 0], 0.0),
        (solarised[:, 1], 0.2),
        (solarised[:, 2:], 0.0),
        (jittered, 0.8),
        (plan.grayscale, 0.2),
        (plan.horizontal_flip, 0.5),
        (plan.vertical_flip, 0.0),
        (plan.quarter_turns > 0, 0.0),
        ((plan.stain_factor != 1).any(axis=-1), 0.0),
    ]
    for happened, probability in expected:
        four_deviations = 4 * np.sqrt(probability * (1 - probability) / happened.size)
        assert abs(happened.mean() - probability) <= four_deviations


def test_pathology_crops_come_in_all_eight_orientations_equally():
    plan = many(PATHOLOGY)
    corner = np.arange(4).reshape(2, 2)
    orientation = np.zeros(plan.quarter_turns.shape, int)
    for index in np.ndindex(orientation.shape):
        turned = corner[:, ::-1] if plan.horizontal_flip[index] else corner
        turned = turned[::-1] if plan.vertical_flip[index] else turned
        orientation[index] = int("".join(map(str, np.rot90(turned, plan.quarter_turns[index]).ravel())), 4)
    _, counts = np.unique(orientation, return_counts=True)
    assert len(counts) == 8
    assert np.abs(counts / orientation.size - 1 / 8).max() < 0.025


def test_factors_stay_in_their_ranges_and_jitter_takes_every_order():
    plan = many(DINOV2)
    reach = np.abs(plan.jitter_factor - np.float32(UNCHANGED_FACTORS)).max(axis=(0, 1))
    assert (reach <= np.array([0.4, 0.4, 0.2, 0.1]) + 1e-6).all()
    assert (reach > np.array([0.39, 0.39, 0.19, 0.09])).all()
    assert len(np.unique(plan.jitter_order.reshape(-1, 4), axis=0)) == 24
    sigma = plan.blur_sigma[plan.blur_sigma > 0]
    assert 0.1 <= sigma.min() < 0.15
    assert 1.95 < sigma.max() <= 2.0


def test_shapes_and_types_do_not_depend_on_what_is_drawn_so_that_plans_travel_as_tensors():
    plans = [draw(a, height=h, position=p) for a, h, p in ((DINOV2, 256, 0), (PATHOLOGY, 31, 7), (DINOV2, 9, 2))]
    for name in FIELDS:
        arrays = [getattr(plan, name) for plan in plans]
        assert len({(array.dtype, array.shape) for array in arrays}) == 1
        assert arrays[0].shape[0] == 10


def test_the_old_blur_turns_every_chance_of_blur_round():
    """The first global crop is then never blurred, the second nearly always."""
    old = DINOV2.model_copy(update={"blur_inverted": True, "blur_probability_local": 0.2})
    blurred = many(old, count=1000).blur_sigma > 0
    assert not blurred[:, 0].any()
    assert abs(blurred[:, 1].mean() - 0.9) < 0.04
    assert abs(blurred[:, 2:].mean() - 0.8) < 0.02
