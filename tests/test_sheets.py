import numpy as np
from PIL import Image

from pathfm.sheets import GAP, captioned, in_columns, stacked


def square(grey: int) -> Image.Image:
    return Image.new("RGB", (20, 20), (0, 100, grey))


def test_pictures_stand_in_columns_with_gaps():
    sheet = np.asarray(in_columns([square(grey) for grey in range(3)], columns=2))
    assert sheet.shape == (40 + GAP, 40 + GAP, 3)
    assert (sheet[:20, 20 + GAP :] == (0, 100, 1)).all()
    assert (sheet[20 + GAP :, :20] == (0, 100, 2)).all()


def test_a_caption_never_runs_into_the_next_groups():
    alone = np.asarray(captioned([("", square(1)), ("b", square(2))]))
    beside = np.asarray(captioned([("a caption much wider than its group", square(1)), ("b", square(2))]))
    np.testing.assert_array_equal(alone[:, 20:], beside[:, 20:])
    assert (alone[:, :20] != beside[:, :20]).any()


def test_rows_are_stacked_at_the_left_inside_a_margin():
    picture = np.asarray(stacked([square(1), in_columns([square(2), square(3)], 2)]))
    assert picture.shape == (40 + 3 * GAP, 40 + 3 * GAP, 3)
    assert (picture[GAP : GAP + 20, GAP : GAP + 20] == (0, 100, 1)).all()
    assert (picture[20 + 2 * GAP : 40 + 2 * GAP, GAP : GAP + 20] == (0, 100, 2)).all()
