import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathfm.data import concat as concat_room
from pathfm.data.concat import ConcatRequest, concat
from pathfm.data.datasets import PathologyFoundation
from pathfm.data.entries import (
    IndexFiles,
    new_entries,
    read_cohort_indices,
    read_concat_side_car,
    read_side_car,
    write_entries,
    write_side_car,
)
from pathfm.data.index import IndexRequest, build_index
from pathfm.errors import UserError


@pytest.fixture
def cohorts(tmp_path, write_tar, tile):
    """A folder with the indexed tars of three cohorts of 3, 5 and 4 tiles, not made in the order of their names."""
    for name, tiles in {"gtex": range(3), "tcga": range(10, 15), "alz": range(20, 24)}.items():
        write_tar(tmp_path / f"{name}.tar", {f"{name}/{n}.png": tile(n) for n in tiles})
        build_index(IndexRequest(tmp_path / f"{name}.tar", tmp_path, name))
    return tmp_path


def test_the_recorded_cohorts_give_the_recorded_files(golden_dir, tmp_path):
    recorded = golden_dir / "tar_npy" / "concatenated"
    concat(ConcatRequest(golden_dir / "tar_npy" / "cohorts", tmp_path))
    written, expected = (np.load(folder / "pretrain_entries.npy") for folder in (tmp_path, recorded))
    np.testing.assert_array_equal(written, expected)
    assert (written.dtype, written.shape) == (expected.dtype, expected.shape) == (np.dtype(np.uint64), (70, 5))
    names, expected = (np.load(folder / "cohort_indices.npy", allow_pickle=True) for folder in (tmp_path, recorded))
    assert (names.dtype, names.shape, names.item()) == (expected.dtype, expected.shape, expected.item())


def test_the_file_is_what_numpy_itself_would_save(cohorts, tmp_path):
    concat(ConcatRequest(cohorts, tmp_path / "out"))
    written = tmp_path / "out" / "pretrain_entries.npy"
    np.save(tmp_path / "saved.npy", np.load(written))
    assert written.read_bytes() == (tmp_path / "saved.npy").read_bytes()


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), chunk_rows=st.integers(1, 10), seed=st.integers(0, 9))
def test_rows_follow_each_other_in_the_cohorts_order_whatever_the_chunks(tmp_path_factory, sizes, chunk_rows, seed):
    root, random = tmp_path_factory.mktemp("cohorts"), np.random.default_rng(seed)
    tables = {f"cohort_{n}": random.integers(0, 1000, (size, 4), np.uint64) for n, size in enumerate(sizes)}
    for name, table in tables.items():
        files = IndexFiles(root, name)
        write_entries(files.entries, new_entries(*table.T))
        said = {"tar": f"{name}.tar", "tar_size_bytes": 1000, "tar_mtime_ns": 1, "num_entries": len(table)}
        files.side_car.write_text(json.dumps({**said, "num_files": 9, "command": ""}))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(concat_room, "_CHUNK_ROWS", chunk_rows)
        concat(ConcatRequest(root, root))
    expected = [np.c_[table, np.full(len(table), index, np.uint64)] for index, table in enumerate(tables.values())]
    np.testing.assert_array_equal(np.load(root / "pretrain_entries.npy"), np.concatenate(expected))


def test_every_sample_of_every_cohort_is_read_back(cohorts, tile):
    summary = concat(ConcatRequest(cohorts, cohorts))
    dataset = PathologyFoundation(cohorts)
    assert list(dataset.cohorts) == ["alz", "gtex", "tcga"]
    assert [(cohort.cohort, cohort.num_entries) for cohort in summary.cohorts] == [("alz", 4), ("gtex", 3), ("tcga", 5)]
    tiles = [*range(20, 24), *range(3), *range(10, 15)]
    assert [dataset.read_bytes(n) for n in range(12)] == [tile(n) for n in tiles]
    assert [dataset.name_of(n) for n in range(12)] == [f"{n}.png" for n in tiles]


def test_a_cohorts_name_may_be_no_utf_8(cohorts, write_tar, tile):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_tar(cohorts / f"{name}.tar", {"c.png": tile(40)})
    build_index(IndexRequest(cohorts / f"{name}.tar", cohorts, name))
    concat(ConcatRequest(cohorts, cohorts))
    dataset = PathologyFoundation(cohorts)
    assert dataset.read_bytes(4) == tile(40)
    assert dataset.cohort_of(4) == name


def test_the_side_car_names_every_cohorts_tar(cohorts, tmp_path):
    concat(ConcatRequest(cohorts, tmp_path / "out", command="pathfm concat ..."))
    side_car = read_concat_side_car(tmp_path / "out" / "pretrain_index.json")
    assert side_car.command == "pathfm concat ..."
    for said, name in zip(side_car.cohorts, ["alz", "gtex", "tcga"], strict=True):
        status = (cohorts / f"{name}.tar").stat()
        assert (said.cohort, said.tar) == (name, f"{name}.tar")
        assert (said.tar_size_bytes, said.tar_mtime_ns) == (status.st_size, status.st_mtime_ns)


def test_its_own_output_and_other_data_sets_are_no_cohorts(cohorts, write_tar, tile):
    concat(ConcatRequest(cohorts, cohorts))
    write_tar(cohorts / "downstream_dataset.tar", {"a.png": tile(0)})
    build_index(IndexRequest(cohorts / "downstream_dataset.tar", cohorts, "query"))
    np.save(cohorts / "old_entries.npy", np.zeros((1, 4), np.uint64))
    summary = concat(ConcatRequest(cohorts, cohorts))
    assert [cohort.cohort for cohort in summary.cohorts] == ["alz", "gtex", "tcga"]
    assert summary.passed_over == {
        "query_entries.npy": "it is the index of downstream_dataset.tar",
        "old_entries.npy": "there is no old.tar",
    }


def test_a_cohort_by_the_name_of_the_output_is_refused_not_left_out(cohorts, write_tar, tile):
    write_tar(cohorts / "pretrain.tar", {"a.png": tile(0)})
    with pytest.raises(UserError, match=r"pretrain.tar cannot be a cohort: .*; give it another name"):
        concat(ConcatRequest(cohorts, cohorts / "out"))
    assert not (cohorts / "out").exists()


def test_cohorts_of_one_tar_are_warned_of(cohorts, tmp_path, warnings_logged):
    (tmp_path / "keep.txt").write_text("1.png")
    build_index(IndexRequest(cohorts / "gtex.tar", cohorts, "gtex_clean", keep=tmp_path / "keep.txt"))
    assert [cohort.num_entries for cohort in concat(ConcatRequest(cohorts, cohorts)).cohorts] == [4, 3, 1, 5]
    assert warnings_logged == [
        "the cohorts gtex, gtex_clean are all of gtex.tar: a sample that several list is several samples"
    ]


def test_a_cohorts_tar_may_have_the_name_that_its_side_car_says(cohorts, tile):
    (cohorts / "tcga.tar").rename(cohorts / "tcga_dataset.tar")
    side_car = json.loads((cohorts / "tcga_index.json").read_text())
    (cohorts / "tcga_index.json").write_text(json.dumps({**side_car, "tar": "tcga_dataset.tar"}))
    concat(ConcatRequest(cohorts, cohorts))
    assert PathologyFoundation(cohorts).read_bytes(7) == tile(10)


def test_the_tars_may_lie_elsewhere_when_side_cars_know_them(cohorts, tmp_path, tile):
    (tmp_path / "indices").mkdir()
    for path in [*cohorts.glob("*.npy"), *cohorts.glob("*.json")]:
        shutil.move(path, tmp_path / "indices" / path.name)
    concat(ConcatRequest(tmp_path / "indices", tmp_path / "indices"))
    assert PathologyFoundation(cohorts, tmp_path / "indices").read_bytes(0) == tile(20)


@pytest.fixture
def subsets(cohorts, tmp_path):
    """The cohorts gtex and tcga also have a subset of one tile."""
    for name, kept in {"gtex": "1.png", "tcga": "12.png"}.items():
        (tmp_path / "keep.txt").write_text(kept)
        build_index(IndexRequest(cohorts / f"{name}.tar", cohorts, name, "train", keep=tmp_path / "keep.txt"))
    return cohorts


def test_a_suffix_takes_the_subsets_and_says_which_cohorts_have_none(subsets, tmp_path, tile):
    summary = concat(ConcatRequest(subsets, tmp_path / "out", "train"))
    assert summary.passed_over == {"alz_entries.npy": "it has no subset train"}
    dataset = PathologyFoundation(subsets, tmp_path / "out", "train")
    assert [dataset.read_bytes(n) for n in range(len(dataset))] == [tile(1), tile(12)]


def test_a_subset_without_a_tar_is_passed_over_by_its_own_name(subsets):
    np.save(subsets / "old_entries_train.npy", np.zeros((1, 4), np.uint64))
    assert concat(ConcatRequest(subsets, subsets / "out", "train")).passed_over == {
        "alz_entries.npy": "it has no subset train",
        "old_entries_train.npy": "there is no old.tar",
    }


def test_subsets_are_not_taken_unless_they_are_named(subsets):
    assert sum(cohort.num_entries for cohort in concat(ConcatRequest(subsets, subsets)).cohorts) == 12


def test_a_subset_of_other_cohorts_does_not_renumber_the_whole(subsets):
    concat(ConcatRequest(subsets, subsets))
    with pytest.raises(UserError, match=r"holds pretrain_entries.npy of other cohorts \(alz, gtex, tcga\) than these"):
        concat(ConcatRequest(subsets, subsets, "train"))
    assert read_cohort_indices(subsets / "cohort_indices.npy") == ["alz", "gtex", "tcga"]
    assert len(PathologyFoundation(subsets)) == 12


def test_more_cohorts_may_join_when_nothing_else_relies_on_their_numbers(cohorts, write_tar, tile):
    concat(ConcatRequest(cohorts, cohorts))
    write_tar(cohorts / "beta.tar", {"b.png": tile(40)})
    build_index(IndexRequest(cohorts / "beta.tar", cohorts, "beta"))
    concat(ConcatRequest(cohorts, cohorts))
    dataset = PathologyFoundation(cohorts)
    assert list(dataset.cohorts) == ["alz", "beta", "gtex", "tcga"]
    assert dataset.read_bytes(4) == tile(40)


def test_the_index_of_one_tar_is_not_replaced(cohorts, tiles_root):
    before = (tiles_root / "pretrain_entries.npy").read_bytes()
    with pytest.raises(UserError, match=r"pretrain_entries.npy is there and is no concatenation"):
        concat(ConcatRequest(cohorts, tiles_root))
    assert (tiles_root / "pretrain_entries.npy").read_bytes() == before


def test_a_folder_without_cohorts_says_what_was_found(tmp_path):
    with pytest.raises(UserError, match=r"holds no cohorts \(NAME_entries.npy with its NAME.tar\): found no index"):
        concat(ConcatRequest(tmp_path, tmp_path))
    np.save(tmp_path / "a_entries.npy", np.zeros((1, 4), np.uint64))
    with pytest.raises(UserError, match=r"found a_entries.npy \(there is no a.tar\)"):
        concat(ConcatRequest(tmp_path, tmp_path))
    with pytest.raises(UserError, match=r"\(NAME_entries_train.npy .*found a_entries.npy \(it has no subset train\)"):
        concat(ConcatRequest(tmp_path, tmp_path, "train"))
    with pytest.raises(UserError, match="there is no folder"):
        concat(ConcatRequest(tmp_path / "nowhere", tmp_path))
    with pytest.raises(UserError, match="must not hold a '/'"):
        concat(ConcatRequest(tmp_path, tmp_path, "a/b"))


def wrong_columns(root):
    np.save(root / "gtex_entries.npy", np.zeros((3, 5), np.uint64))


def longer_tar(root):
    os.truncate(root / "gtex.tar", 20480)


def offsets_of_another_tar_without_side_car(root):
    (root / "gtex_index.json").unlink()
    entries = np.load(root / "gtex_entries.npy")
    np.save(root / "gtex_entries.npy", entries + np.array([0, 0, 512, 512], np.uint64))


def cut_tar(root):
    os.truncate(root / "gtex.tar", 1024)


def more_rows_than_the_side_car(root):
    entries = np.load(root / "gtex_entries.npy")
    np.save(root / "gtex_entries.npy", entries[[0, 1, 2, 2]])


def damaged_side_car(root):
    (root / "gtex_index.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (wrong_columns, r"gtex_entries.npy must hold uint64 \[N, 4\].* but holds uint64 \[3, 5\]"),
        (longer_tar, r"gtex_entries.npy is the index of another tar: .*make the index again: pathfm index"),
        (offsets_of_another_tar_without_side_car, r"gtex_entries.npy is the index of another tar: row 0"),
        (cut_tar, r"gtex.tar had \d+ bytes, .*gtex.tar has 1024"),
        (more_rows_than_the_side_car, "has 4 rows, but its side-car counts 3"),
        (damaged_side_car, "gtex_index.json cannot be read"),
    ],
)
def test_a_cohort_that_does_not_fit_its_tar_is_refused_and_nothing_is_written(cohorts, tmp_path, damage, message):
    damage(cohorts)
    with pytest.raises(UserError, match=message):
        concat(ConcatRequest(cohorts, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_rows_beyond_a_tar_that_lies_elsewhere_are_refused(cohorts, tmp_path):
    (cohorts / "gtex.tar").unlink()
    side_car = read_side_car(cohorts / "gtex_index.json")
    write_side_car(cohorts / "gtex_index.json", side_car.__class__(**{**vars(side_car), "tar_size_bytes": 700}))
    with pytest.raises(UserError, match=r"gtex_entries.npy reaches to byte \d+, but gtex.tar has 700"):
        concat(ConcatRequest(cohorts, tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_the_older_concatenation_as_it_was(cohorts, monkeypatch):
    concat(ConcatRequest(cohorts, cohorts))
    before = {path: path.read_bytes() for path in cohorts.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(concat_room, "_with_cohort", full)
    with pytest.raises(UserError, match=r"cannot write to .*: No space left on device"):
        concat(ConcatRequest(cohorts, cohorts))
    assert {path: path.read_bytes() for path in cohorts.iterdir()} == before


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    """A sparse index of two million rows (64 MB) of zeros."""
    num_rows = 2_000_000
    with (tmp_path / "big_entries.npy").open("wb") as file:
        shape = {"descr": "<u8", "fortran_order": False, "shape": (num_rows, 4)}
        np.lib.format.write_array_header_1_0(file, shape)
        file.truncate(file.tell() + num_rows * 32)
    said = {"tar": "big.tar", "tar_size_bytes": 10, "tar_mtime_ns": 1, "num_entries": num_rows, "num_files": num_rows}
    (tmp_path / "big_index.json").write_text(json.dumps({**said, "command": ""}))
    tracemalloc.start()
    concat(ConcatRequest(tmp_path, tmp_path / "out"))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 40e6
    assert np.load(tmp_path / "out" / "pretrain_entries.npy", mmap_mode="r").shape == (num_rows, 5)
