import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfm.errors import UserError
from pathfm.evaluate.dense.windows import Windows, mirrored, windows_for


def _picture(height: int, width: int, channels: int = 2) -> torch.Tensor:
    return torch.randn(channels, height, width, generator=torch.Generator().manual_seed(0))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_windows_cover_every_pixel_and_give_the_picture_back(
    height: int, width: int, down: int, across: int, step: int
):
    windows = Windows((4 * down, 4 * across), (4 * min(step, down), 4 * min(step, across)))
    picture = _picture(height, width)
    cut = windows.cut(picture)
    assert len(cut) == len(windows.corners(height, width))
    torch.testing.assert_close(windows.merge(cut, height, width), picture)


@pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 40), (5, 9), (33, 24)])
def test_merging_equals_a_plain_loop_over_pixels(height: int, width: int):
    windows = Windows((16, 24), (8, 16))
    corners = windows.corners(height, width)
    maps = torch.randn(len(corners), 3, 16, 24, generator=torch.Generator().manual_seed(1))
    merged = windows.merge(maps, height, width)
    for y in range(height):
        for x in range(width):
            over = [
                maps[number, :, y - top, x - left]
                for number, (top, left) in enumerate(corners)
                if top <= y < top + 16 and left <= x < left + 24
            ]
            torch.testing.assert_close(merged[:, y, x], torch.stack(over).mean(0))


def test_a_picture_of_exactly_one_window_is_cut_once_and_comes_back_bit_for_bit():
    windows = Windows((16, 24), (8, 8))
    picture = _picture(16, 24)
    assert windows.corners(16, 24) == [(0, 0)]
    assert torch.equal(windows.cut(picture)[0], picture)
    assert torch.equal(windows.merge(picture[None], 16, 24), picture)


def test_beyond_its_edges_a_picture_is_mirrored_as_numpy_does():
    for height, width, rows, columns in [(5, 7, 8, 9), (2, 3, 11, 10), (1, 4, 6, 4), (4, 4, 4, 4)]:
        picture = _picture(height, width)
        pad = ((0, 0), (0, rows - height), (0, columns - width))
        assert np.array_equal(mirrored(picture, rows, columns).numpy(), np.pad(picture.numpy(), pad, mode="reflect"))


def test_what_is_wanted_beyond_the_picture_is_nothing():
    target = torch.ones(5, 6, dtype=torch.uint8)
    (cut,) = Windows((8, 8), (8, 8)).cut_target(target, 255)
    assert torch.equal(cut[:5, :6], target)
    assert (cut[5:] == 255).all()
    assert (cut[:, 6:] == 255).all()


def test_by_itself_a_window_is_the_largest_picture_up_to_512_px():
    assert windows_for(16, (256, 320)) == Windows((256, 320), (160, 208))
    assert windows_for(14, (256, 320)).size == (266, 322)
    assert windows_for(16, (3000, 200)).size == (512, 208)
    assert windows_for(16, (3000, 3000)).stride == (336, 336)
    assert windows_for(16, (3000, 200), window=224, stride=112) == Windows((224, 224), (112, 112))
    assert windows_for(16, (10, 10)) == Windows((16, 16), (16, 16))


def test_windows_that_are_no_whole_patches_or_leave_gaps_are_refused():
    with pytest.raises(UserError, match="--window 250 is no whole number of 16 px patches; take 256"):
        windows_for(16, (300, 300), window=250)
    with pytest.raises(UserError, match="--stride 3 is no whole number of 16 px patches; take 16"):
        windows_for(16, (300, 300), stride=3)
    with pytest.raises(UserError, match="--stride 64 leaves gaps between windows of 32 x 32 px"):
        windows_for(16, (300, 300), window=32, stride=64)
