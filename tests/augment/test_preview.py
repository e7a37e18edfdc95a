"""The picture of a batch."""

import numpy as np
import torch

from pathfm.augment.preview import crops_picture
from pathfm.batch import Batch


def colour(sample):
    """A green that no caption's anti-aliased grey can have."""
    return (20, 100 + 20 * sample, 40)


def crops_of(num_samples, views, size):
    colours = torch.tensor([colour(sample) for sample in range(num_samples)] * views, dtype=torch.uint8)
    return colours.reshape(-1, 3, 1, 1).expand(-1, 3, size, size).contiguous()


def batch_of(num_samples, local_crops=3):
    masks = torch.zeros(2 * num_samples, 4, dtype=torch.bool)
    masks[0, 0] = True  # the upper left patch of sample 0's first crop
    return Batch(
        global_crops=crops_of(num_samples, 2, 28),
        local_crops=crops_of(num_samples, local_crops, 14),
        masks=masks,
        mask_indices=torch.tensor([0]),
        mask_weights=torch.ones(1),
        positions=torch.arange(num_samples),
        samples=torch.arange(num_samples),
    )


def pixels_of(picture, sample):
    return int((np.asarray(picture) == colour(sample)).all(axis=-1).sum())


def test_the_picture_shows_all_crops_and_hides_the_masked_patches():
    picture = crops_picture(batch_of(2), patch_size=14)
    all_crops = 4 * 28 * 28 + 3 * 14 * 14
    assert pixels_of(picture, 1) == all_crops
    assert pixels_of(picture, 0) == all_crops - 14 * 14


def test_only_as_many_samples_are_shown_as_asked():
    two, four = (crops_picture(batch_of(4), patch_size=14, num_samples=n) for n in (2, 4))
    assert two.width == four.width
    assert pixels_of(two, 2) == 0
    assert pixels_of(four, 2) > 0


def test_a_batch_without_local_crops_has_a_picture_too():
    assert crops_picture(batch_of(1, local_crops=0), patch_size=14).height > 28
