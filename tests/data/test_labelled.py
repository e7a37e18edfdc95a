from collections import Counter

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some

from pathfm.data.datasets import KNN
from pathfm.data.decode import decode
from pathfm.data.labelled import at_side, load_tiles, share_of
from pathfm.errors import UserError
from tests.labelled import make_labelled


@pytest.fixture(scope="module")
def query(tmp_path_factory) -> KNN:
    return KNN(make_labelled(tmp_path_factory.mktemp("labelled")), "query")


@given(some.integers(0, 200), some.integers(1, 17), some.integers(1, 5))
def test_every_row_belongs_to_one_rank_and_ranks_have_as_many_batches(num_rows: int, batch_size: int, ranks: int):
    shares = [share_of(num_rows, batch_size, rank, ranks) for rank in range(ranks)]
    assert Counter(row for share in shares for batch in share for row in batch) == Counter(range(num_rows))
    assert len({len(share) for share in shares}) == 1
    assert all(len(batch) <= batch_size for share in shares for batch in share)
    for of_round in zip(*shares, strict=True):
        assert max(map(len, of_round)) - min(map(len, of_round)) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_tiles_come_in_order_whoever_decodes_them(query: KNN, workers: int):
    batches = [[3, 4, 5], [], [30]]
    found = list(load_tiles(query, batches, 64, num_workers=workers))
    assert [tiles.rows.tolist() for tiles in found] == batches
    assert found[1].images.shape == (0, 3, 64, 64)
    expected = decode(query.read_bytes(4))
    assert np.array_equal(found[0].images[1].permute(1, 2, 0).numpy(), expected)


def test_a_tile_that_cannot_be_decoded_is_left_out_and_named(query: KNN, monkeypatch):
    whole = KNN.read_bytes
    monkeypatch.setattr(KNN, "read_bytes", lambda self, row: whole(self, row)[: 20 if row == 1 else None])
    (tiles,) = load_tiles(query, [[0, 1, 2]], 64)
    assert tiles.rows.tolist() == [0, 2]
    assert len(tiles.images) == 2
    (named,) = tiles.unreadable
    assert named.startswith(f"{query.name_of(1)}: ")


def test_a_tar_that_was_cut_meanwhile_is_one_line_from_a_worker_too(tmp_path):
    root = make_labelled(tmp_path)
    cut = KNN(root, "test")
    with (root / "downstream_dataset.tar").open("r+b") as tar:
        tar.truncate(2048)
    with pytest.raises(UserError, match=r"downstream_dataset\.tar") as caught:
        list(load_tiles(cut, [[20]], 64, num_workers=1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("height", "width", "middle"), [(40, 100, (20, 50)), (64, 64, (32, 32)), (300, 200, (150, 100))]
)
def test_tiles_of_any_size_are_scaled_and_cropped_to_their_middle(height: int, width: int, middle: tuple[int, int]):
    picture = np.zeros((height, width, 3), np.uint8)
    cv2.circle(picture, middle[::-1], min(height, width) // 4, (255, 255, 255), -1)
    seen = at_side(picture, 64)
    assert seen.shape == (64, 64, 3)
    rows, columns = np.nonzero(seen[:, :, 0] > 128)
    assert abs(rows.mean() - 31.5) < 1.5
    assert abs(columns.mean() - 31.5) < 1.5
    assert abs(len(rows) / (np.pi * 16**2) - 1) < 0.1  # the disc has a quarter of the side for its radius


def test_a_tile_of_the_right_size_is_not_touched():
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert at_side(picture, 32) is picture
