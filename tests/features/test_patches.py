from pathlib import Path

import numpy as np
import pytest
import torch

from pathfm.data.image_files import open_images
from pathfm.errors import UserError
from pathfm.features.items import NO_IMAGE, Item, items_of_images
from pathfm.features.patches import Geometry, cut, patches_of, wrong_size
from pathfm.models.vit import as_grid
from tests.features.small import picture, save_picture

GRID = Geometry(64, 16)
PADDED = Geometry(64, 16, "pad")


@pytest.fixture
def image(tmp_path: Path):
    def save(*shape: int):
        pixels = picture(1, *shape)
        save_picture(tmp_path / "r.png", pixels)
        images = open_images(str(tmp_path))
        return pixels, images, items_of_images(images, None, None)[0]

    return save


def test_patches_stand_in_the_order_of_the_recorded_grid(golden_dir: Path):
    arrays = np.load(golden_dir / "dino_hierarchical_vit.npz")
    grid = arrays["region_grid"]  # [32, 16, 16], of which the sequence is row by row
    as_picture = np.moveaxis(grid, 0, -1)
    rows = np.stack([patch[0, 0] for patch in cut(as_picture, 1)])
    np.testing.assert_array_equal(rows, arrays["region_sequence"])
    assert torch.equal(as_grid(torch.from_numpy(rows)[None], 16, 16)[0], torch.from_numpy(grid))


def test_a_region_is_cut_row_by_row(image):
    pixels, images, item = image(64, 64)
    patches = patches_of(item, images, GRID)
    assert (len(patches.pixels), patches.note) == (16, {})
    np.testing.assert_array_equal(patches.pixels[6], pixels[16:32, 32:48])


@pytest.mark.parametrize(("height", "width"), [(64, 48), (80, 64), (63, 64)])
def test_a_region_of_another_size_is_named_and_refused_by_its_header_and_by_its_pixels(image, height, width):
    _, images, item = image(height, width)
    assert wrong_size(item, images, GRID) == f"r.png ({width} x {height} px)"
    with pytest.raises(UserError, match=rf"1 images are not 64 x 64 px: r.png \({width} x {height} px\); .*pad"):
        patches_of(item, images, GRID)


def test_a_smaller_region_is_padded_with_white_and_the_cells_that_are_padding_are_noted(image):
    pixels, images, item = image(33, 64)
    assert wrong_size(item, images, PADDED) == ""
    patches = patches_of(item, images, PADDED)
    assert patches.note == {"size_px": [33, 64], "padding_cells": [12, 13, 14, 15]}
    np.testing.assert_array_equal(patches.pixels[8][0], pixels[32, :16])
    assert (patches.pixels[8][1:] == 255).all()
    assert all((patches.pixels[cell] == 255).all() for cell in range(12, 16))


def test_a_larger_region_is_refused_even_where_smaller_ones_are_padded(image):
    _, images, item = image(64, 65)
    assert wrong_size(item, images, PADDED)
    with pytest.raises(UserError, match="larger than 64 x 64"):
        patches_of(item, images, PADDED)


def test_a_cell_without_a_tile_is_white_and_noted(tmp_path: Path):
    pixels = picture(2, 16, 16)
    save_picture(tmp_path / "t.png", pixels)
    images = open_images(str(tmp_path))
    patches = patches_of(Item("r", (0, NO_IMAGE, 0, NO_IMAGE)), images, Geometry(32, 16, "pad"))
    assert patches.note == {"padding_cells": [1, 3]}
    np.testing.assert_array_equal(patches.pixels[2], pixels)
    assert (patches.pixels[3] == 255).all()


def test_a_region_that_cannot_be_decoded_is_named(tmp_path: Path):
    (tmp_path / "r.png").write_bytes(b"no image")
    images = open_images(str(tmp_path))
    item = items_of_images(images, None, None)[0]
    assert wrong_size(item, images, GRID) == ""  # its header does not tell
    with pytest.raises(UserError, match=r"r.png in .* cannot be decoded: it is not an image"):
        patches_of(item, images, GRID)


@pytest.mark.parametrize(("region", "patch"), [(100, 32), (16, 32), (64, 0)])
def test_a_region_is_a_whole_number_of_patches(region, patch):
    with pytest.raises(UserError, match=f"a region of {region} px is not a whole number of {patch} px patches"):
        Geometry(region, patch).check()
