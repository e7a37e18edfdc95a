import os
import re
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pathfm.data.entries import read_class_ids, read_file_indices, read_side_car
from pathfm.data.index import IndexRequest, build_index
from pathfm.data.tar.walk import TarWalk
from pathfm.errors import UserError


@pytest.fixture
def golden(golden_dir, tmp_path):
    """The recorded tar under the two names that its commands used."""
    source = golden_dir / "tar_npy"
    for name in ("pretrain_dataset.tar", "downstream_dataset.tar"):
        shutil.copyfile(source / "pretrain_dataset.tar", tmp_path / name)
    return source, tmp_path


def assert_equals_recorded(written, recorded):
    """Same dtype, shape and values."""
    ours, theirs = (np.load(path, allow_pickle=True) for path in (written, recorded))
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.tolist() == theirs.tolist()


def test_the_whole_set_equals_the_recorded_index(golden):
    source, here = golden
    build_index(IndexRequest(here / "pretrain_dataset.tar", here / "out", "pretrain"))
    for name in ("pretrain_entries.npy", "pretrain_file_indices.npy"):
        assert_equals_recorded(here / "out" / name, source / name)


def test_a_subset_equals_the_recorded_index(golden):
    source, here = golden
    build_index(IndexRequest(here / "pretrain_dataset.tar", here, "pretrain", "train", keep=source / "train.txt"))
    for name in ("pretrain_entries_train.npy", "pretrain_file_indices.npy"):
        assert_equals_recorded(here / name, source / name)


@pytest.mark.parametrize("split", ["query", "test"])
def test_labelled_splits_equal_the_recorded_index(golden, split):
    source, here = golden
    keep, labels = source / f"{split}.txt", source / "labels.csv"
    build_index(IndexRequest(here / "downstream_dataset.tar", here, split, keep=keep, csv=labels))
    for name in (f"{split}_entries.npy", f"{split}_file_indices.npy", "class-ids.npy"):
        assert_equals_recorded(here / name, source / name)


@pytest.mark.parametrize("cohort", ["cohort_a", "cohort_b"])
def test_cohorts_equal_the_recorded_index(golden_dir, tmp_path, cohort):
    source = golden_dir / "tar_npy" / "cohorts"
    build_index(IndexRequest(source / f"{cohort}.tar", tmp_path, cohort))
    for name in (f"{cohort}_entries.npy", f"{cohort}_file_indices.npy"):
        assert_equals_recorded(tmp_path / name, source / name)


@pytest.fixture
def small(tmp_path, write_tar):
    """A tar of five files, two of them called b.jpg; returns a function that indexes it with text files as given."""
    names = ["s1/a.jpg", "s1/b.jpg", "./s2/b.jpg", "s2/c.jpg", "d.jpg"]
    tar = write_tar(tmp_path / "small.tar", {name: name.encode() for name in names})

    def index(**options):
        for kind in ("keep", "remove", "csv"):
            if kind in options:
                (tmp_path / f"{kind}.txt").write_text(options[kind], encoding="utf-8", newline="")
                options[kind] = tmp_path / f"{kind}.txt"
        summary = build_index(IndexRequest(tar, tmp_path / "out", "small", **options))
        return summary, np.load(tmp_path / "out" / "small_entries.npy")

    return index


def test_offsets_point_at_the_bytes_and_file_indices_at_the_names(small, tmp_path):
    _, entries = small()
    content = (tmp_path / "small.tar").read_bytes()
    names = read_file_indices(tmp_path / "out" / "small_file_indices.npy")
    read = [(content[start:end].decode().rpartition("/")[2], names[index]) for _, index, start, end in entries.tolist()]
    assert read == [(name, name) for name in ("a.jpg", "b.jpg", "b.jpg", "c.jpg", "d.jpg")]


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        ("c.jpg\na.jpg\n", [0, 3]),
        ("\ufeffa.jpg\r\n\r\n  d.jpg  \r\nd.jpg", [0, 4]),
        ("s2/b.jpg", [2]),
        ("./s1//b.jpg\n/s2/c.jpg", [1, 3]),
    ],
)
def test_names_are_basenames_or_full_paths(small, lines, kept):
    _, entries = small(keep=lines)
    assert entries[:, 1].tolist() == kept


@pytest.mark.parametrize(("what", "lines"), [("keep", "a.jpg\n"), ("csv", "filename,label\na.jpg,0\nd.jpg,0\n")])
def test_a_list_may_come_through_a_pipe_and_a_missing_one_is_named(tmp_path, write_tar, what, lines):
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": b"x", "d.jpg": b"x"})
    request = IndexRequest(tar, tmp_path / "out")
    reading, writing = os.pipe()
    os.write(writing, lines.encode())
    os.close(writing)
    assert build_index(replace(request, **{what: Path(f"/dev/fd/{reading}")})).num_entries == lines.count("jpg")
    os.close(reading)
    with pytest.raises(UserError, match=r"cannot read .*none.txt: No such file"):
        build_index(replace(request, **{what: tmp_path / "none.txt"}))


def test_a_remove_list_leaves_the_others(small):
    _, entries = small(remove="a.jpg\ns1/b.jpg")
    assert entries[:, 1].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "b.jpg\n"}, r"more than once.*full path.*'b.jpg': s1/b.jpg, s2/b.jpg"),
        ({"remove": "b.jpg\n"}, r"more than once.*'b.jpg': s1/b.jpg, s2/b.jpg"),
        ({"keep": "\n \n"}, "keep.txt is empty"),
        ({"keep": "x.jpg\ny.jpg"}, r"none of the 2 names .*'x.jpg'.*'s1/a.jpg'"),
        ({"remove": "s1/a.jpg\ns1/b.jpg\ns2/b.jpg\nc.jpg\nd.jpg"}, "removes every file"),
        ({"keep": "a.jpg", "remove": "c.jpg"}, "not both"),
        ({"keep": "a.jpg\nd.jpg", "csv": "filename,label\na.jpg,0\n"}, "no label for 1 files: d.jpg"),
        ({"keep": "s1/b.jpg", "csv": "filename,label\nb.jpg,0\n"}, r"more than once.*s1/b.jpg, s2/b.jpg"),
        ({"keep": "a.jpg", "csv": "filename,label\na.jpg,0.5\n"}, r"integers.*line 2 \(a.jpg: '0.5'\)"),
        ({"keep": "a.jpg", "csv": "filename,label\na.jpg,-1\n"}, r"integers from 0.*line 2"),
        ({"keep": "a.jpg", "csv": "filename,label\nd.jpg,\n"}, r"integers.*line 2 \(d.jpg: ''\)"),
        ({"keep": "a.jpg", "csv": "filename,label\na.jpg,1\na.jpg,2\n"}, r"two labels.*line 2.*and line 3"),
        ({"keep": "a.jpg", "csv": "filename,label\ns1/a.jpg,1\n./s1/a.jpg,2\n"}, "two labels"),
        ({"keep": "a.jpg", "csv": "filename,label\na.jpg,1\ns1/a.jpg,2\n"}, r"two labels.*line 2 .*and line 3"),
        (
            {"keep": "a.jpg", "csv": "filename,label,class\na.jpg,1,x\nd.jpg,1,y\n"},
            "label 1 is called 'x' and, in line 3",
        ),
        (
            {"keep": "a.jpg", "csv": "file;label\na.jpg;1\n"},
            r"no column 'filename' \(it has: file;label\).*--file_name",
        ),
        ({"keep": "a.jpg", "csv": "filename,label\na.jpg,1\n", "class_name": "kind"}, "no column 'kind'"),
        ({"keep": "a.jpg", "csv": "filename,label\n"}, "no rows"),
        ({"keep": "a.jpg", "csv": ""}, r"it has: nothing"),
        ({"keep": "a.jpg", "csv": "filename,label\n,1\n"}, "without a file name"),
        ({"suffix": "a/b"}, "must not hold a '/'"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(small, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        small(**options)
    assert not (tmp_path / "out").exists()


def test_files_are_labelled_by_full_path_or_basename_and_may_be_said_twice(small):
    csv = "filename,label\na.jpg,3\ns1/b.jpg,1\ns2/b.jpg,2\nc.jpg,9\nd.jpg,0\ns2/c.jpg,9\na.jpg,3\ns1/e.jpg,3\n"
    summary, entries = small(csv=csv)
    assert entries[:, 0].tolist() == [3, 1, 2, 9, 0]
    assert summary.unused_labels == 1


def test_a_label_for_two_files_of_one_path_is_refused_where_it_is_used(tmp_path):
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name in ("s/a.jpg", "s/a.jpg", "s/b.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    (tmp_path / "labels.csv").write_text("filename,label\ns/a.jpg,3\nb.jpg,4\n")
    (tmp_path / "keep.txt").write_text("b.jpg\n")
    request = IndexRequest(tmp_path / "t.tar", tmp_path / "out", csv=tmp_path / "labels.csv")
    with pytest.raises(UserError, match=r"every path is unique: '/s/a.jpg': s/a.jpg, s/a.jpg$"):
        build_index(request)
    assert build_index(replace(request, keep=tmp_path / "keep.txt")).num_entries == 1


def test_classes_that_another_csv_named_are_replaced_with_a_warning(small, warnings_logged):
    keep = "a.jpg\nd.jpg"
    small(keep=keep, csv="filename,label,class\na.jpg,1,x\nd.jpg,2,y\n")
    small(keep=keep, csv="filename,label,class\nd.jpg,2,y\na.jpg,1,x\n")
    assert not warnings_logged
    small(keep=keep, csv="filename,label,class\na.jpg,1,x\nd.jpg,1,x\n")
    assert re.search("replacing .*class-ids.npy, which had other classes; .* one CSV", *warnings_logged)


def test_class_names_come_in_the_order_of_the_csv(small, tmp_path):
    csv = 'name,y,kind\nd.jpg,5,"tumour, viable"\na.jpg,2,\nelsewhere.jpg,0,stroma\n'
    options = {"file_name": "name", "label_name": "y", "class_name": "kind"}
    summary, entries = small(csv=csv, keep="a.jpg\nd.jpg", **options)
    assert entries[:, 0].tolist() == [2, 5]
    assert list(read_class_ids(tmp_path / "out" / "class-ids.npy").items()) == [
        (5, "tumour, viable"),
        (2, "class_2"),
        (0, "stroma"),
    ]
    assert summary.unused_labels == 1


def test_names_that_are_missing_are_reported_and_the_rest_is_indexed(small):
    summary, entries = small(keep="a.jpg\nx.jpg\ns1/y.jpg")
    assert list(summary.missing) == ["x.jpg", "s1/y.jpg"]
    assert entries[:, 1].tolist() == [0]


def test_a_tar_that_was_made_again_replaces_the_index_and_other_subsets_are_named(
    small, tmp_path, write_tar, warnings_logged
):
    small()
    build_index(IndexRequest(tmp_path / "small.tar", tmp_path / "out", "small", "train"))
    assert not warnings_logged
    write_tar(tmp_path / "small.tar", {"new.jpg": b"new"})
    build_index(IndexRequest(tmp_path / "small.tar", tmp_path / "out", "small"))
    assert len(np.load(tmp_path / "out" / "small_entries.npy")) == 1
    assert read_file_indices(tmp_path / "out" / "small_file_indices.npy") == {0: "new.jpg"}
    assert "replacing small_entries.npy" in warnings_logged[0]
    assert "small_index_train.json is about another tar" in warnings_logged[1]


def test_the_side_car_says_which_tar_it_was(small, tmp_path):
    small(command="pathfm index ...")
    side_car = read_side_car(tmp_path / "out" / "small_index.json")
    status = (tmp_path / "small.tar").stat()
    assert (side_car.tar, side_car.tar_size_bytes, side_car.tar_mtime_ns) == (
        "small.tar",
        status.st_size,
        status.st_mtime_ns,
    )
    assert (side_car.num_entries, side_car.num_files, side_car.command) == (5, 5, "pathfm index ...")


def test_a_failed_write_leaves_the_old_entries(small, tmp_path, monkeypatch):
    small()
    before = (tmp_path / "out" / "small_entries.npy").read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cannot write the index .*No space left"):
        small(keep="a.jpg")
    assert (tmp_path / "out" / "small_entries.npy").read_bytes() == before
    assert not [name for name in os.listdir(tmp_path / "out") if "partial" in name]


def test_a_tar_without_files_is_refused(tmp_path, write_tar):
    tar = write_tar(tmp_path / "t.tar", {"._a.jpg": b"x"})
    with pytest.raises(UserError, match=r"holds no files \(only 1 macOS companions"):
        build_index(IndexRequest(tar, tmp_path / "out"))


def test_files_that_do_not_look_like_images_are_warned_of(tmp_path, write_tar, warnings_logged):
    tar = write_tar(tmp_path / "t.tar", {"a.JPG": b"x", "Thumbs.db": b"x"})
    assert build_index(IndexRequest(tar, tmp_path / "out")).num_entries == 2
    assert warnings_logged == ["1 of the files do not look like images: Thumbs.db"]


@pytest.mark.parametrize("change", ["appended to", "replaced"])
def test_a_tar_that_changes_while_it_is_read_is_refused(tmp_path, write_tar, monkeypatch, change):
    tar = write_tar(tmp_path / "t.tar", {"a.jpg": b"x"})

    def walk_and_change(walk):
        yield from whole_walk(walk)
        if change == "appended to":
            with tar.open("ab") as file:
                file.write(bytes(512))
        else:
            os.utime(write_tar(tar, {"b.jpg": b"x"}), ns=(0, 0))

    whole_walk = TarWalk.__iter__
    monkeypatch.setattr(TarWalk, "__iter__", walk_and_change)
    with pytest.raises(UserError, match="changed while it was read; index it again"):
        build_index(IndexRequest(tar, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
