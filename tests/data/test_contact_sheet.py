import io

import numpy as np
import pytest
from PIL import Image

from pathfm.data.concat import ConcatRequest, concat
from pathfm.data.contact_sheet import contact_sheet
from pathfm.data.datasets import KNN, Dataset, Pathology, PathologyFoundation
from pathfm.data.index import IndexRequest, build_index

TILE = 112**2  # pixels of a whole tile on the sheet


def colour(group: int) -> tuple[int, int, int]:
    """One that neither paper nor captions have."""
    return (0, 3 * group, 200)


def plain(group: int, width: int = 300, height: int = 300) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour(group)).save(file, "PNG")
    return file.getvalue()


def pixels_of(dataset: Dataset, *groups: int) -> list[int]:
    sheet = np.asarray(contact_sheet(dataset))
    return [int((sheet == colour(group)).all(axis=-1).sum()) for group in groups]


@pytest.fixture
def cohorts(tmp_path, write_tar):
    def make(numbers: list[int]) -> PathologyFoundation:
        for group, number in enumerate(numbers):
            write_tar(tmp_path / f"cohort_{group:02}.tar", {f"{n}.png": plain(group) for n in range(number)})
            build_index(IndexRequest(tmp_path / f"cohort_{group:02}.tar", tmp_path, f"cohort_{group:02}"))
        concat(ConcatRequest(tmp_path, tmp_path))
        return PathologyFoundation(tmp_path)

    return make


def test_few_cohorts_have_rows_of_tiles_each(cohorts):
    assert pixels_of(cohorts([40, 2, 17]), 0, 1, 2) == [16 * TILE, 2 * TILE, 16 * TILE]


def test_many_cohorts_have_four_tiles_each_two_of_them_side_by_side(cohorts):
    dataset = cohorts([5] * 11)
    assert pixels_of(dataset, *range(11)) == [4 * TILE] * 11
    assert 1 < contact_sheet(dataset).width / (8 * 112) < 1.1


def test_a_sheet_costs_no_more_memory_of_a_large_data_set(cohorts, monkeypatch):
    dataset = cohorts([1])
    monkeypatch.setattr(dataset, "cohorts", {"large": range(10**12)})
    monkeypatch.setattr(dataset, "will_need", lambda samples: None)
    monkeypatch.setattr(dataset, "read_bytes", lambda sample: plain(1))
    assert pixels_of(dataset, 1) == [64 * TILE]


def test_a_labelled_data_set_is_shown_by_class(tmp_path, write_tar):
    tar = write_tar(tmp_path / "downstream_dataset.tar", {f"{n}.png": plain(n % 2) for n in range(10)})
    rows = "\n".join(f"{n}.png,{n % 2}" for n in range(10))
    (tmp_path / "labels.csv").write_text(f"filename,label\n{rows}\n")
    build_index(IndexRequest(tar, tmp_path, "query", csv=tmp_path / "labels.csv"))
    sheet = np.asarray(contact_sheet(KNN(tmp_path, "query")))
    upper, lower = np.array_split(sheet, 2)
    assert (upper == colour(0)).all(axis=-1).sum() == (lower == colour(1)).all(axis=-1).sum() == 5 * TILE


def test_tiles_keep_their_shape_and_damaged_ones_are_black(tmp_path, write_tar):
    contents = {"wide.png": plain(1, width=400, height=200), "cut.png": plain(1)[:50]}
    write_tar(tmp_path / "pretrain_dataset.tar", contents)
    build_index(IndexRequest(tmp_path / "pretrain_dataset.tar", tmp_path, "pretrain"))
    assert pixels_of(Pathology(tmp_path), 1) == [TILE // 2]
    assert (np.asarray(contact_sheet(Pathology(tmp_path))) == 0).all(axis=-1).sum() == TILE
