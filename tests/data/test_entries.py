import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathfm.data.entries import (
    COHORT_ENTRY,
    CohortTar,
    ConcatSideCar,
    IndexFiles,
    SideCar,
    new_entries,
    open_entries,
    printable,
    read_class_ids,
    read_cohort_indices,
    read_concat_side_car,
    read_file_indices,
    read_side_car,
    write_class_ids,
    write_cohort_indices,
    write_entries,
    write_file_indices,
    write_side_car,
)
from pathfm.errors import UserError

fresh = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@fresh
@given(rows=st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 4), min_size=1, max_size=20))
def test_entries_are_plain_uint64_rows_with_named_columns(tmp_path, rows):
    table = np.array(rows, np.uint64)
    write_entries(tmp_path / "e.npy", new_entries(*table.T))
    plain = np.load(tmp_path / "e.npy")
    assert plain.dtype == np.uint64
    np.testing.assert_array_equal(plain, table)
    entries = open_entries(tmp_path / "e.npy")
    for column, name in enumerate(["class_index", "file_index", "start_offset", "end_offset"]):
        np.testing.assert_array_equal(entries[name], table[:, column])


def test_golden_entries_are_opened(golden_dir):
    path = golden_dir / "tar_npy" / "query_entries.npy"
    entries = open_entries(path)
    np.testing.assert_array_equal(entries["class_index"], np.load(path)[:, 0])
    assert isinstance(entries.base.base, np.memmap) or isinstance(entries.base, np.memmap)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (np.zeros((3, 5), np.uint64), r"uint64 \[3, 5\]"),
        (np.zeros((3, 4), np.int64), r"int64 \[3, 4\]"),
        (np.zeros(4, np.uint64), r"uint64 \[4\]"),
    ],
)
def test_other_tables_are_refused_with_what_was_expected_and_found(tmp_path, content, found):
    np.save(tmp_path / "e.npy", content)
    with pytest.raises(UserError, match=r"must hold uint64 \[N, 4\].*but holds " + found):
        open_entries(tmp_path / "e.npy")


def test_concatenated_entries_also_name_the_cohort(golden_dir, tmp_path):
    path = golden_dir / "tar_npy" / "concatenated" / "pretrain_entries.npy"
    np.testing.assert_array_equal(open_entries(path, COHORT_ENTRY)["cohort_index"], np.load(path)[:, 4])
    with pytest.raises(
        UserError, match=r"uint64 \[N, 4\].*holds uint64 \[70, 5\] \(a concatenation of cohorts, for Path"
    ):
        open_entries(path)
    np.save(tmp_path / "e.npy", np.zeros((3, 4), np.uint64))
    with pytest.raises(
        UserError, match=r"uint64 \[N, 5\].*cohort_index.*holds uint64 \[3, 4\] \(the index of one tar\)"
    ):
        open_entries(tmp_path / "e.npy", COHORT_ENTRY)


def test_a_table_stored_column_by_column_is_refused_rather_than_copied(tmp_path):
    np.save(tmp_path / "e.npy", np.asfortranarray(np.ones((3, 4), np.uint64)))
    with pytest.raises(UserError, match="column by column; save it again"):
        open_entries(tmp_path / "e.npy")


def test_cohorts_are_named_by_their_index(tmp_path, golden_dir):
    write_cohort_indices(tmp_path / "c.npy", ["a", "b"])
    assert read_cohort_indices(tmp_path / "c.npy") == ["a", "b"]
    assert read_cohort_indices(golden_dir / "tar_npy" / "concatenated" / "cohort_indices.npy") == [
        "cohort_a",
        "cohort_b",
    ]


@pytest.mark.parametrize("names", [{1: "a", 2: "b"}, {0: "a", 2: "b"}, {0: "a", 1: "a"}])
def test_cohorts_that_do_not_count_from_0_or_share_a_name_are_refused(tmp_path, names):
    np.save(tmp_path / "c.npy", np.array(names, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"must name different cohorts by 0, 1, 2, ..., but says \d: a"):
        read_cohort_indices(tmp_path / "c.npy")


def test_the_side_car_of_a_concatenation_is_read_as_written(tmp_path):
    side_car = ConcatSideCar(
        (CohortTar("a", "a.tar", 1024, 5, 3), CohortTar("b", "b.tar", 2048, 6, 4)), "pathfm concat"
    )
    write_side_car(tmp_path / "i.json", side_car)
    assert read_concat_side_car(tmp_path / "i.json") == side_car
    assert read_concat_side_car(tmp_path / "other.json") is None
    for damaged in ('{"cohorts": [{"cohort": "a"}]}', "[]", '{"cohorts": 3, "command": ""}'):
        (tmp_path / "i.json").write_text(damaged)
        with pytest.raises(UserError, match="make the index again or delete"):
            read_concat_side_car(tmp_path / "i.json")


def test_cut_foreign_and_missing_entries_are_refused(tmp_path):
    write_entries(tmp_path / "e.npy", new_entries(*np.zeros((4, 100), np.uint64)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "e.npy").read_bytes()[:1000])
    (tmp_path / "text.npy").write_text("hello")
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04")
    write_file_indices(tmp_path / "objects.npy", ["a"])
    for name in ("cut", "text", "zip", "objects"):
        with pytest.raises(UserError, match=rf"{name}.npy is not a whole"):
            open_entries(tmp_path / f"{name}.npy")
    with pytest.raises(UserError, match="there is no file"):
        open_entries(tmp_path / "nowhere.npy")


@fresh
@given(names=st.lists(st.text(st.characters()), max_size=10))
def test_file_names_survive_whatever_they_hold(tmp_path, names):
    write_file_indices(tmp_path / "f.npy", names)
    assert read_file_indices(tmp_path / "f.npy") == dict(enumerate(names))


def test_golden_file_names_and_class_names_are_read(golden_dir):
    names = read_file_indices(golden_dir / "tar_npy" / "pretrain_file_indices.npy")
    assert len(names) == 70
    assert names[0] == "crcval7k_ADI-TCGA-ALPPQLSF.jpg"
    classes = read_class_ids(golden_dir / "tar_npy" / "class-ids.npy")
    assert list(classes.items())[:2] == [(0, "adipose"), (1, "lymphocytes")]


def test_class_names_keep_their_order(tmp_path):
    write_class_ids(tmp_path / "c.npy", {7: "stroma", 2: "tumour"})
    assert list(read_class_ids(tmp_path / "c.npy").items()) == [(7, "stroma"), (2, "tumour")]


@pytest.mark.parametrize("rows", [np.empty((0, 2), object), np.array([[-1, "fat"]], object), np.array([[0]], object)])
def test_tables_that_are_no_classes_are_refused(tmp_path, rows):
    np.save(tmp_path / "c.npy", rows, allow_pickle=True)
    with pytest.raises(UserError, match=r"must hold an object array \[C, 2\]"):
        read_class_ids(tmp_path / "c.npy")


class RunsCode:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a data file was run')",)


@pytest.mark.parametrize("hostile", [RunsCode(), np.int64(3), {1.5}, 2j, pickle.Pickler])
def test_pickles_of_anything_else_are_refused_and_not_run(tmp_path, hostile):
    np.save(tmp_path / "f.npy", np.array({0: hostile}, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"f\.npy"):
        read_file_indices(tmp_path / "f.npy")


def write_some_entries(path):
    write_entries(path, new_entries(*np.zeros((4, 9), np.uint64)))


def write_some_names(path):
    write_file_indices(path, ["a.jpg", "b.jpg"])


def write_some_classes(path):
    write_class_ids(path, {0: "a", 3: "b"})


@pytest.mark.parametrize(
    ("write", "read", "kind"),
    [
        (write_some_entries, open_entries, np.ndarray),
        (write_some_names, read_file_indices, dict),
        (write_some_classes, read_class_ids, dict),
    ],
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_end_in_a_user_error_or_in_what_they_should_hold(tmp_path, write, read, kind, data):
    write(tmp_path / "f.npy")
    content = bytearray((tmp_path / "f.npy").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "f.npy").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        held = read(tmp_path / "f.npy")
    except UserError:
        return
    assert isinstance(held, kind)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    write_side_car(tmp_path / "f", SideCar("t.tar", 1024, 5, 3, 4, "pathfm index"))

    def fail(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", fail)
    monkeypatch.setattr("io.open", fail)
    for read in (open_entries, read_file_indices, read_side_car):
        with pytest.raises(UserError, match=r"^cannot read \S+/f: Permission denied$"):
            read(tmp_path / "f")


def test_the_side_car_is_read_as_written_and_its_absence_is_no_error(tmp_path):
    side_car = SideCar("t\udce4.tar", 1024, 5, 3, 4, "pathfm index")
    write_side_car(tmp_path / "i.json", side_car)
    assert read_side_car(tmp_path / "i.json") == SideCar("t\\udce4.tar", 1024, 5, 3, 4, "pathfm index")
    assert read_side_car(tmp_path / "other.json") is None
    (tmp_path / "i.json").write_text('{"tar": 3')
    with pytest.raises(UserError, match="make the index again or delete"):
        read_side_car(tmp_path / "i.json")


def test_files_are_named_as_the_ancestors_named_them(tmp_path):
    files = IndexFiles(tmp_path, "pretrain", "train")
    assert [path.name for path in (files.entries, files.file_indices, files.class_ids, files.side_car)] == [
        "pretrain_entries_train.npy",
        "pretrain_file_indices.npy",
        "class-ids.npy",
        "pretrain_index_train.json",
    ]
    assert IndexFiles(tmp_path).entries.name == "entries.npy"
    assert IndexFiles(tmp_path, suffix="train").entries.name == "entries_train.npy"


def test_any_file_name_is_printed_on_one_line():
    names = "a\nb.jpg", "\x1b[31m.jpg", "t\udce4.jpg", "tät 日本 a\\b.jpg"
    assert " ".join(map(printable, names)) == r"a\x0ab.jpg \x1b[31m.jpg t\udce4.jpg tät 日本 a\b.jpg"
