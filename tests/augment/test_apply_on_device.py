"""The device executor against the one on the CPU, on real tiles and random plans."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pathfm.augment.apply import apply_plan
from pathfm.augment.apply_on_device import apply_plans, crop_on_device
from pathfm.augment.assemble import Assemble, uncropped
from pathfm.augment.config import DINOV2, PATHOLOGY, AugmentConfig, CropsConfig
from pathfm.augment.draw import draw_crops
from pathfm.augment.masks import MaskPlan
from pathfm.data.decode import decode
from pathfm.data.loader import Sample

MAX_MEAN_DIFFERENCE = 0.1  # grey levels, of a crop on average
MAX_CROP_DIFFERENCE = 1.0  # of the worst crop: one of a single colour may round the other way as a whole
MAX_QUANTILE_DIFFERENCE = 2  # of 999 pixels in 1000

CROPS = CropsConfig(global_crops_size=112, local_crops_size=56, local_crops_number=4)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")],
    ),
]
EVERYTHING = {name: 1.0 for name in PATHOLOGY.__class__.model_fields if "_probability" in name}
STRONG = {"jitter_hue": 0.5, "jitter_brightness": 0.8, "jitter_contrast": 0.8, "jitter_saturation": 1.0}
BUSY = PATHOLOGY.model_copy(update={**EVERYTHING, **STRONG, "grayscale_probability": 0.3})


@pytest.fixture(scope="module")
def tiles(shared_data):
    """Twelve tiles, three of them smaller than the others."""
    files = sorted((shared_data / "osteosarcoma3" / "images").iterdir())[::80]
    tiles = [decode(file.read_bytes()) for file in files]
    tiles[1], tiles[4], tiles[7] = tiles[1][:150, :200], tiles[4][:40], tiles[7][100:, 90:110]
    return [np.ascontiguousarray(tile) for tile in tiles]


def on_cpu(plans, images, views):
    crops = [apply_plan(plans.of_sample(b)[view], image) for view in views for b, image in enumerate(images)]
    return np.stack(crops).transpose(0, 3, 1, 2).astype(float)


def on_device(plans, images, views, size, device):
    tensors = uncropped(images, plans).with_every_tensor(lambda tensor: tensor.to(device))
    crops = apply_plans({name: v[:, views] for name, v in tensors.plans.items()}, tensors.images, size)
    assert (crops.device.type, crops.dtype) == (device, torch.uint8)
    return crops.cpu().numpy().astype(float)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augmentation", [DINOV2, PATHOLOGY, BUSY], ids=["dinov2", "pathology", "everything"])
@pytest.mark.parametrize(("views", "size"), [([0, 1], 112), ([2, 3, 4, 5], 56)])
def test_a_device_makes_the_crops_that_the_cpu_makes(tiles, augmentation, views, size, device):
    for seed in range(3):
        plans = draw_crops(augmentation, CROPS, [tile.shape[:2] for tile in tiles], seed, range(len(tiles)))
        difference = np.abs(on_device(plans, tiles, views, size, device) - on_cpu(plans, tiles, views))
        assert difference.mean() < MAX_MEAN_DIFFERENCE
        assert difference.mean(axis=(1, 2, 3)).max() < MAX_CROP_DIFFERENCE
        assert np.quantile(difference, 0.999) <= MAX_QUANTILE_DIFFERENCE


@pytest.mark.parametrize("horizontal", [False, True])
@pytest.mark.parametrize("vertical", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_every_orientation_is_the_same_on_both(tiles, horizontal, vertical, turns):
    crops = CropsConfig(global_crops_size=28, local_crops_number=0)
    nothing = DINOV2.model_copy(update=dict.fromkeys(EVERYTHING, 0.0))
    plans = draw_crops(nothing, crops, [tiles[0].shape[:2]], 0, [0])
    plans.horizontal_flip[:], plans.vertical_flip[:], plans.quarter_turns[:] = horizontal, vertical, turns
    ours, oracle = on_device(plans, tiles[:1], [0, 1], 28, "cpu"), on_cpu(plans, tiles[:1], [0, 1])
    assert np.abs(ours - oracle).max() <= 1


def test_what_leaves_a_crop_leaves_every_byte(tiles):
    nothing = DINOV2.model_copy(update=dict.fromkeys(EVERYTHING, 0.0))
    crops = CropsConfig(global_crops_scale=(1, 1), global_crops_size=256, local_crops_number=0)
    plans = draw_crops(nothing, crops, [(256, 256)], 0, [0])
    plans.box[:] = [0, 0, 256, 256]
    ours = on_device(plans, tiles[:1], [0], 256, "cpu")
    np.testing.assert_array_equal(ours[0], tiles[0].transpose(2, 0, 1))


def test_neither_shapes_nor_steps_depend_on_what_was_drawn(tiles):
    """Meta tensors have no values: whatever looked at one, as a host that waits for its device does, would fail."""
    plans = draw_crops(PATHOLOGY, CROPS, [tile.shape[:2] for tile in tiles], 0, range(12))
    tensors = uncropped(tiles, plans).with_every_tensor(lambda tensor: tensor.to("meta"))
    assert apply_plans(tensors.plans, tensors.images, 56).shape == (72, 3, 56, 56)


def samples_of(tiles):
    return [Sample(position, 100 + position, tile) for position, tile in enumerate(tiles)]


def assembler(crops=CROPS, crops_on_device=True):
    augment = AugmentConfig(preset="pathology")
    return Assemble(crops, augment, MaskPlan(8, 8), 14, 3, 12, crops_on_device)


def test_a_batch_that_is_cropped_after_the_loader_is_the_batch_that_is_cropped_in_it(tiles):
    """Through a worker process: what travels are tiles, plans and masks."""
    make = partial(assembler(), step=0)
    (travelled,) = DataLoader(samples_of(tiles), batch_size=12, collate_fn=make, num_workers=1, timeout=60)
    assert travelled.global_crops.shape == (0, 3, 112, 112)
    ours, oracle = crop_on_device(travelled, CROPS), assembler(crops_on_device=False)(samples_of(tiles), 0)
    assert ours.uncropped is None
    for name in ("masks", "mask_indices", "mask_weights", "positions", "samples"):
        assert torch.equal(getattr(ours, name), getattr(oracle, name)), name
    for name in ("global_crops", "local_crops"):
        crops, expected = getattr(ours, name), getattr(oracle, name)
        assert (crops.dtype, crops.shape) == (expected.dtype, expected.shape)
        assert (crops.float() - expected.float()).abs().mean() < MAX_MEAN_DIFFERENCE


def test_no_local_crops_are_made_where_there_are_none(tiles):
    crops = CROPS.model_copy(update={"local_crops_number": 0})
    batch = crop_on_device(assembler(crops)(samples_of(tiles), 0), crops)
    assert batch.local_crops.shape == (0, 3, 56, 56)
    assert batch.num_local_crops == 0


def test_beside_one_much_larger_image_crops_are_made_before_they_travel(tiles):
    """Or one odd image would claim its own memory again for every other image of the batch."""
    samples = samples_of([*tiles[:7], np.tile(tiles[0], (4, 4, 1))])
    batch, oracle = assembler()(samples, 0), assembler(crops_on_device=False)(samples, 0)
    assert batch.uncropped is None
    assert torch.equal(batch.global_crops, oracle.global_crops)
    assert torch.equal(batch.local_crops, oracle.local_crops)
