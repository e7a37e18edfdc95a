import numpy as np
import torch

from pathfm.batch import normalise_crops
from pathfm.features.attention import attention_picture, patch_attention, region_attention
from pathfm.hierarchical import in_chunks
from tests.features.small import PATCH, SIDE, WIDTH, patch_backbone, picture, region_backbone


def test_patches_are_stitched_where_they_lie_and_each_has_its_own_weights():
    vit = patch_backbone()
    region = torch.from_numpy(picture(3)).permute(2, 0, 1)
    stitched = patch_attention(vit, in_chunks(region, PATCH, 5), SIDE, SIDE)
    tokens = PATCH // 16  # along a side of a patch
    assert stitched.shape == (3, SIDE * tokens, SIDE * tokens)
    row, column = 2, 1
    patch = region[None, :, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
    expected = vit.last_attention(normalise_crops(patch))[0, :, 0, 1:].unflatten(1, (tokens, tokens))
    found = stitched[:, row * tokens : (row + 1) * tokens, column * tokens : (column + 1) * tokens]
    torch.testing.assert_close(found, expected)


def test_a_regions_weights_stand_on_its_grid():
    vit, grid = region_backbone(), torch.randn(WIDTH, 2, 3, generator=torch.Generator().manual_seed(0))
    found = region_attention(vit, grid)
    assert found.shape == (6, 2, 3)
    expected = vit.last_attention(grid[None])[0, :, 0]
    torch.testing.assert_close(found.flatten(1), expected[:, 1:])
    torch.testing.assert_close(found.flatten(1).sum(1), 1 - expected[:, 0])


def test_the_picture_is_brightest_where_attention_is_highest():
    attention = torch.zeros(2, 4, 4)
    attention[:, 1, 3] = 1
    drawn = np.asarray(attention_picture(picture(0), attention, "patch level").convert("L"), dtype=float)
    panel = drawn[24 : 24 + 512, -6 - 512 : -6]  # the last of the first row: head 1
    means = panel.reshape(4, 128, 4, 128).mean((1, 3))
    assert np.unravel_index(means.argmax(), (4, 4)) == (1, 3)
    assert means[1, 3] > 4 * np.sort(means, axis=None)[-2]
