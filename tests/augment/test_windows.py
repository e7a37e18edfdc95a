"""Windows of regions' grids: each place equally likely, keyed by the position alone, cut as they were drawn."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pathfm.augment.config import DINOV2, PATHOLOGY, AugmentConfig, CropsConfig
from pathfm.augment.masks import MaskPlan
from pathfm.augment.preview import crops_picture
from pathfm.augment.windows import AssembleWindows, draw_windows
from pathfm.batch import Batch

SEED, STEP, GLOBAL_BATCH, WIDTH = 11, 2, 6, 5
CROPS = CropsConfig(global_crops_size=14, local_crops_size=6, local_crops_number=3)


@dataclass
class Region:
    position: int
    sample: int
    image: np.ndarray


def regions(count: int = GLOBAL_BATCH, step: int = STEP, side: int = 16) -> list[Region]:
    """Features that tell their place: row, column, and the region."""
    rows, columns = np.mgrid[:side, :side].astype(np.float32)
    found = []
    for position in range(step * GLOBAL_BATCH, step * GLOBAL_BATCH + count):
        grid = np.stack([rows, columns, *[np.full_like(rows, position)] * (WIDTH - 2)], axis=-1)
        found.append(Region(position, 100 + position, grid))
    return found


def assembler(preset: str = "dinov2", masked: float = 0.5) -> AssembleWindows:
    return AssembleWindows(CROPS, AugmentConfig(preset=preset), MaskPlan(14, 14, masked), SEED, GLOBAL_BATCH)


def test_windows_stand_view_major_and_are_what_the_plan_cuts() -> None:
    batch = assembler()(regions(), STEP)
    assert batch.global_crops.shape == (12, WIDTH, 14, 14)
    assert batch.local_crops.shape == (18, WIDTH, 6, 6)
    for b, region in enumerate(regions()):
        plan = draw_windows(DINOV2, CROPS, [(16, 16)], SEED, [region.position])
        for view in range(5):
            crops, row = (batch.global_crops, view * 6 + b) if view < 2 else (batch.local_crops, (view - 2) * 6 + b)
            cut = torch.from_numpy(plan.cut(0, view, region.image).copy()).permute(2, 0, 1)
            assert torch.equal(crops[row], cut)


def test_a_window_lies_within_its_region_and_is_flipped_left_to_right_half_of_the_time() -> None:
    plan = draw_windows(DINOV2, CROPS, [(16, 16)] * 2000, SEED, range(2000))
    assert {*plan.top[:, 0]} == {*plan.left[:, 1]} == {0, 1, 2}
    assert {*plan.top[:, 4]} == {*range(11)}
    assert plan.horizontal_flip.mean() == pytest.approx(0.5, abs=0.02)
    assert not plan.vertical_flip.any()
    assert not plan.quarter_turns.any()
    first = regions(1)[0].image
    flipped = plan.cut(int(plan.horizontal_flip[:, 0].argmax()), 0, first)
    assert flipped[0, 0, 1] > flipped[0, 1, 1]  # columns run backwards


def test_every_place_is_equally_likely() -> None:
    plan = draw_windows(DINOV2, CROPS, [(16, 16)] * 4000, SEED, range(4000))
    counts = np.bincount(plan.top[:, 2], minlength=11)
    assert counts.min() > 0.75 * 4000 / 11
    assert counts.max() < 1.25 * 4000 / 11


def test_all_eight_orientations_come_where_the_recipe_asks_for_them() -> None:
    plan = draw_windows(PATHOLOGY, CROPS, [(16, 16)] * 200, SEED, range(200))
    assert {*plan.quarter_turns[:, 0]} == {0, 1, 2, 3}
    assert plan.vertical_flip.any()


def test_regions_of_several_sizes_share_a_batch() -> None:
    batch = assembler()([*regions(3), *regions(GLOBAL_BATCH, side=20)[3:]], STEP)
    assert batch.global_crops.shape == (12, WIDTH, 14, 14)
    assert batch.global_crops[3:6, 0].max() > 16


def test_two_ranks_halves_are_the_rows_of_the_whole() -> None:
    whole, ours = assembler()(regions(), STEP), regions()
    halves = [assembler()(ours[:3], STEP), assembler()(ours[3:], STEP)]
    for name in ("global_crops", "local_crops", "masks"):
        views = [getattr(half, name).unflatten(0, (-1, 3)) for half in halves]
        assert torch.equal(torch.cat(views, dim=1).flatten(0, 1), getattr(whole, name))


def test_it_travels_to_workers() -> None:
    there: Batch = pickle.loads(pickle.dumps(assembler()))(regions(), STEP)
    assert torch.equal(there.global_crops, assembler()(regions(), STEP).global_crops)


def test_features_are_seen_by_the_network_as_they_are() -> None:
    batch = assembler()(regions(), STEP)
    assert torch.equal(batch.normalised().global_crops, batch.global_crops)


def test_a_person_sees_windows_in_colours_with_the_masked_patches_veiled() -> None:
    picture = crops_picture(assembler()(regions(), STEP), patch_size=1)
    colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
    assert len(colours) > 50
    assert picture.height > 6 * 14 * 12
