from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pathfm.data.pack import PackRequest, pack
from pathfm.errors import UserError
from pathfm.evaluate.dense.data import class_mask, instance_mask, number_mask, open_pairs
from tests.features.small import picture, save_picture


def _png(values: np.ndarray, mode: str | None = None) -> bytes:
    buffer = BytesIO()
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(buffer, format="PNG")
    return buffer.getvalue()


def _npy(values: np.ndarray) -> bytes:
    buffer = BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


VALUES = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)


def _palette() -> bytes:
    image = Image.fromarray(VALUES).convert("L")
    coloured = Image.frombytes("P", image.size, image.tobytes())
    coloured.putpalette([channel for index in range(256) for channel in (255 - index, index, 7)])
    buffer = BytesIO()
    coloured.save(buffer, format="PNG")
    return buffer.getvalue()


def test_classes_are_grey_values_or_palette_indices_or_arrays():
    for encoded in (_png(VALUES), _palette(), _npy(VALUES), _png(VALUES.astype(np.uint16))):
        assert torch.equal(class_mask(encoded, "mask"), torch.from_numpy(VALUES))
    two = class_mask(_png(VALUES == 1), "mask")
    assert torch.equal(two, torch.from_numpy((VALUES == 1).astype(np.uint8)))


def test_another_value_may_be_the_one_that_is_ignored():
    found = class_mask(_npy(np.array([[0, 1], [-1, 2]])), "mask", ignored=-1, classes=3)
    assert found.tolist() == [[0, 1], [255, 2]]


def test_numbers_of_objects_are_one_class_also_the_255th():
    values = np.array([[0, 1, 255], [256, 40_000, 0]], np.uint16)
    assert instance_mask(_png(values), "mask").tolist() == [[0, 1, 1], [1, 1, 0]]


def test_numbers_stand_as_they_are():
    deep = np.array([[0.5, np.nan], [0.0, 3e4]], np.float32)
    torch.testing.assert_close(number_mask(_npy(deep), "mask"), torch.from_numpy(deep), equal_nan=True)
    values = np.array([[0, 1000], [65535, 2]], np.uint16)
    assert number_mask(_png(values), "mask").tolist() == values.astype(float).tolist()


@pytest.mark.parametrize(
    ("read", "encoded", "said"),
    [
        (partial(class_mask, classes=2), _png(VALUES), "m.png has the value 2, and classes are 0 to 1; name them all"),
        (class_mask, _png(picture(0, 8, 8)), "m.png has 3 channels; a mask has one"),
        (class_mask, b"nothing", "m.png cannot be decoded as a mask"),
        (class_mask, _png(VALUES)[:-30], "m.png cannot be decoded as a mask"),
        (class_mask, _npy(np.zeros((2, 2))), "m.png holds float64, not whole numbers"),
        (number_mask, _npy(np.zeros((2, 2), dtype=complex)), "m.png holds complex128, not numbers"),
        (number_mask, _npy(np.zeros((2, 2, 2))), "m.png has 2 channels"),
    ],
)
def test_what_is_no_mask_is_one_line(read, encoded: bytes, said: str):
    with pytest.raises(UserError, match=said):
        read(encoded, "m.png")


def _folders(root: Path) -> tuple[Path, Path]:
    for index, name in enumerate("abc"):
        save_picture(root / "images" / f"{name}.jpg", picture(index, 24, 32))
        save_picture(root / "masks" / f"{name}.png", np.full((24, 32), index, np.uint8))
    save_picture(root / "images" / "without.png", picture(9))
    return root / "images", root / "masks"


def test_pictures_and_masks_meet_by_name_whatever_their_suffix(tmp_path: Path):
    images, masks = _folders(tmp_path)
    pairs = open_pairs(str(images), str(masks), class_mask)
    assert pairs.names == ("a", "b", "c")
    truth = pairs.read(1)
    assert truth.image.shape == (24, 32, 3)
    assert (truth.target == 1).all()


def test_packed_pictures_and_masks_are_the_same_pairs(tmp_path: Path):
    images, masks = _folders(tmp_path)
    for folder in (images, masks):
        pack(PackRequest(folder, folder.name, tmp_path / "root", cohort=True))
    root = tmp_path / "root"
    packed = open_pairs(str(root / "images.tar"), str(root / "masks.tar"), class_mask)
    plain = open_pairs(str(images), str(masks), class_mask)
    assert packed.names == plain.names
    for number in range(3):
        assert np.array_equal(packed.read(number).image, plain.read(number).image)
        assert torch.equal(packed.read(number).target, plain.read(number).target)


def test_a_folder_of_arrays_is_a_folder_of_masks(tmp_path: Path):
    images, _ = _folders(tmp_path)
    for name in "ab":
        (tmp_path / "depth").mkdir(exist_ok=True)
        np.save(tmp_path / "depth" / f"{name}.npy", np.full((24, 32), 1.5))
    pairs = open_pairs(str(images), str(tmp_path / "depth"), number_mask)
    assert pairs.names == ("a", "b")
    assert (pairs.read(0).target == 1.5).all()


def test_masks_of_other_names_or_sizes_are_one_line(tmp_path: Path):
    images, masks = _folders(tmp_path)
    save_picture(masks / "a.png", np.zeros((32, 24), np.uint8))
    with pytest.raises(UserError, match="the mask of a is 24 x 32 px, its picture 32 x 24"):
        open_pairs(str(images), str(masks), class_mask).read(0)
    save_picture(tmp_path / "others" / "z.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(
        UserError, match=r"has a mask of its name in .*others: pictures are a, b and 2 more; masks are z"
    ):
        open_pairs(str(images), str(tmp_path / "others"), class_mask)
