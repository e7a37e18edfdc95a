"""From samples to a batch."""

import functools
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pathfm.augment.apply import apply_plan
from pathfm.augment.assemble import Assemble, mask_weights
from pathfm.augment.config import PATHOLOGY, AugmentConfig, CropsConfig
from pathfm.augment.draw import draw_crops
from pathfm.augment.masks import MaskPlan, draw_masks
from pathfm.batch import Batch
from pathfm.errors import UserError

SEED, STEP, GLOBAL_BATCH = 11, 2, 6
CROPS = CropsConfig(global_crops_size=56, local_crops_size=28, local_crops_number=3)


@dataclass
class Sample:
    position: int
    sample: int
    image: np.ndarray


def samples(count=GLOBAL_BATCH, step=STEP):
    positions = range(step * GLOBAL_BATCH, step * GLOBAL_BATCH + count)
    shapes = [(64, 64), (40, 90), (20, 17)]
    return [
        Sample(p, 100 + p, np.random.default_rng(p).integers(0, 256, (*shapes[p % 3], 3), dtype=np.uint8))
        for p in positions
    ]


def assembler(crops=CROPS, patch_size=14, masks=None, preset="pathology"):
    masks = masks or MaskPlan(4, 4)
    return Assemble(crops, AugmentConfig(preset=preset), masks, patch_size, SEED, GLOBAL_BATCH)


def tensors(batch: Batch):
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}


def test_crops_stand_view_major_as_the_plan_draws_them():
    batch = assembler()(samples(), STEP)
    assert batch.global_crops.shape == (12, 3, 56, 56)
    assert batch.local_crops.shape == (18, 3, 28, 28)
    for b, sample in enumerate(samples()):
        plans = draw_crops(PATHOLOGY, CROPS, [sample.image.shape[:2]], SEED, [sample.position]).of_sample(0)
        crops = [torch.from_numpy(apply_plan(plan, sample.image)).permute(2, 0, 1) for plan in plans]
        for view in range(2):
            assert torch.equal(batch.global_crops[view * 6 + b], crops[view])
        for view in range(3):
            assert torch.equal(batch.local_crops[view * 6 + b], crops[2 + view])


def test_crops_travel_as_bytes_in_one_piece_with_their_positions_and_samples():
    batch = assembler()(samples(), STEP)
    for crops in (batch.global_crops, batch.local_crops):
        assert crops.dtype == torch.uint8
        assert crops.is_contiguous(memory_format=torch.channels_last)
    assert batch.positions.tolist() == [12, 13, 14, 15, 16, 17]
    assert batch.samples.tolist() == [112, 113, 114, 115, 116, 117]
    assert (batch.num_samples, batch.num_global_crops, batch.num_local_crops) == (6, 2, 3)


def test_mask_indices_and_weights_count_every_masked_crop_once():
    batch = assembler()(samples(), STEP)
    expected = draw_masks(MaskPlan(4, 4), SEED, STEP, batch.positions.tolist(), GLOBAL_BATCH)
    np.testing.assert_array_equal(batch.masks.numpy(), expected)
    assert batch.masks.flatten()[batch.mask_indices].all()
    assert len(batch.mask_indices) == len(batch.mask_weights) == batch.masks.sum()
    per_crop = torch.zeros(len(batch.masks)).index_add(0, batch.mask_indices // 16, batch.mask_weights)
    torch.testing.assert_close(per_crop, batch.masks.any(dim=1).float())


def test_mask_weights_are_those_of_the_golden_batch(golden_dir):
    golden = np.load(golden_dir / "dinov2_losses.npz")
    weights = mask_weights(torch.from_numpy(golden["ibot/masks"]))
    np.testing.assert_array_equal(weights, golden["ibot/masks_weight"])


def test_two_ranks_halves_are_the_whole_batch():
    whole, make = assembler()(samples(), STEP), assembler()
    halves = [make(samples()[:3], STEP), make(samples()[3:], STEP)]
    for name in ("global_crops", "local_crops", "masks"):
        of_whole = getattr(whole, name)
        views = of_whole.unflatten(0, (-1, 6))
        joined = torch.cat([getattr(half, name).unflatten(0, (-1, 3)) for half in halves], dim=1)
        assert torch.equal(joined, views), name


def test_a_pickled_copy_in_any_order_gives_the_same_bytes():
    make = assembler(preset="dinov2")
    first = make(samples(), STEP)
    copy = pickle.loads(pickle.dumps(make))
    copy(samples(step=9), 9)
    for name, tensor in tensors(copy(samples(), STEP)).items():
        assert torch.equal(tensor, tensors(first)[name]), name


def test_a_loaders_worker_makes_the_same_bytes_as_this_process():
    make = functools.partial(assembler(preset="dinov2"), step=STEP)
    here = make(samples())
    loader = DataLoader(samples(), batch_size=GLOBAL_BATCH, collate_fn=make, num_workers=1, timeout=60)
    for name, tensor in tensors(next(iter(loader))).items():
        assert torch.equal(tensor, tensors(here)[name]), name


def test_no_local_crops_and_no_masks_make_a_batch_too():
    crops = CropsConfig(global_crops_size=56, local_crops_size=28, local_crops_number=0)
    batch = assembler(crops, masks=MaskPlan(4, 4, sample_probability=0.0))(samples(), STEP)
    assert len(batch.local_crops) == len(batch.mask_indices) == len(batch.mask_weights) == 0
    assert batch.num_local_crops == 0
    assert not batch.masks.any()


@pytest.mark.parametrize(
    ("crops", "masks", "words"),
    [
        (CropsConfig(global_crops_size=56, local_crops_size=96), MaskPlan(4, 4), "crops.local_crops_size=96"),
        (CropsConfig(global_crops_size=60, local_crops_size=28), MaskPlan(4, 4), "crops.global_crops_size=60"),
        (CROPS, MaskPlan(16, 16), "16 x 16 patches do not fit global crops of 4 x 4"),
    ],
)
def test_sizes_that_do_not_fit_the_patches_are_refused_at_once(crops, masks, words):
    with pytest.raises(UserError, match=words):
        assembler(crops, masks=masks)


def test_real_tiles_keep_their_colours_on_average(shared_data):
    files = sorted((shared_data / "osteosarcoma3").rglob("*.jpg"))[:240:40]
    tiles = [Sample(12 + i, i, np.asarray(Image.open(file).convert("RGB"))) for i, file in enumerate(files)]
    batch = assembler()(tiles, STEP)
    before = np.mean([tile.image.mean() for tile in tiles])
    assert abs(batch.global_crops.float().mean().item() - before) < 25
