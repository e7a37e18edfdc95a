import cv2
import numpy as np

from pathfm.data.decode import decode
from pathfm.evaluate.dense.fields import fields


def _field(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(height, width, 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    return np.clip(128 + 300 * smooth, 0, 255).astype(np.uint8)


def _quarters(field: np.ndarray) -> list[np.ndarray]:
    height, width = (side // 2 for side in field.shape[:2])
    return [field[top : top + height, left : left + width] for top in (0, height) for left in (0, width)]


def test_quarters_of_a_field_are_found_in_whatever_order_they_come():
    pictures = [quarter for seed in range(4) for quarter in _quarters(_field(seed))]
    order = np.random.default_rng(0).permutation(len(pictures))
    found = fields([pictures[number] for number in order])
    assert sorted(set(found)) == [0, 1, 2, 3]
    for one, of_one in zip(order, found, strict=True):
        for other, of_other in zip(order, found, strict=True):
            assert (of_one == of_other) == (one // 4 == other // 4)


def test_pictures_that_touch_only_through_another_are_of_one_field():
    first, second, third, fourth = _quarters(_field(0))
    assert fields([first, fourth]) == [0, 1]
    assert fields([first, fourth, third]) == [0, 0, 0]
    assert fields([first, second]) == [0, 0]


def test_even_edges_fit_everything_and_tell_nothing():
    blank = np.full((30, 40, 3), 240, np.uint8)
    assert fields([blank, blank.copy(), _field(0, 30, 40)]) == [0, 1, 2]


def test_pictures_of_several_sizes_are_compared_along_edges_of_one_length():
    field = _field(1)
    left, right = field[:, :20], field[:, 20:]
    assert fields([left, _field(2, 30, 40), right]) == [0, 1, 0]


def test_pictures_of_nuclei_fall_into_fields_of_four(shared_data):
    files = sorted((shared_data / "nuclei_masks" / "images").glob("*.png"))
    found = fields([decode(file.read_bytes()) for file in files])
    sizes = np.bincount(found)
    assert len(files) == 107
    assert len(sizes) == 27
    assert (sizes == 4).sum() == 23
    assert sizes.max() == 8  # two mosaics, side by side
