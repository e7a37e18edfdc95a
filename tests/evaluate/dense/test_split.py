from pathlib import Path

import pytest

from pathfm.errors import UserError
from pathfm.evaluate.dense.split import Split, split_by_csv, split_by_fields

NAMES = ("a", "b", "c", "d")


def _csv(folder: Path, *rows: str) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_a_column_says_which_pictures_teach_and_which_are_scored(tmp_path: Path):
    path = _csv(tmp_path, "filename,split,fold", "b.png,train,test", "sub/a.png,TEST,train", "d,val,", "c,train,train")
    assert split_by_csv(path, "split", NAMES) == Split((1, 2), (0,))
    assert split_by_csv(path, "fold", NAMES) == Split((0, 2), (1,))


def test_groups_come_from_their_column_and_stay_in_one_part(tmp_path: Path):
    path = _csv(tmp_path, "filename,split,group,slide", "a,train,x,1", "b,test,y,2", "c,test,y,1", "d,train,z,1")
    split = split_by_csv(path, "split", NAMES)
    assert split.groups(split.test) == ["y", "y"]
    with pytest.raises(UserError, match=r"groups are in both train and test of .*labels.csv: 1; keep each in one"):
        split_by_csv(path, "split", NAMES, "slide")


def test_a_split_is_written_as_it_is_read(tmp_path: Path):
    for split in (Split((0, 3), (1, 2)), Split((0, 3), (1, 2), {0: "x", 3: "z", 1: "y", 2: "y"})):
        split.write(tmp_path / "again.csv", NAMES)
        assert split_by_csv(tmp_path / "again.csv", "split", NAMES) == split


def test_fields_stay_whole_and_about_a_third_is_scored():
    field_of = [number // 4 for number in range(40)]
    for seed in range(5):
        split = split_by_fields(field_of, seed)
        assert 12 <= len(split.test) <= 16
        assert sorted(split.train + split.test) == list(range(40))
        assert not set(split.groups(split.train) or ()) & set(split.groups(split.test) or ())
    assert split_by_fields(field_of, 0) == split_by_fields(field_of, 0) != split_by_fields(field_of, 1)
    assert len(split_by_fields([0, 1]).train) == 1
    with pytest.raises(UserError, match="all pictures are of one field"):
        split_by_fields([0, 0, 0])


@pytest.mark.parametrize(
    ("rows", "column", "said"),
    [
        (["filename,splt", "a,train"], "split", r"has no column 'split' but filename, splt; did you mean 'splt'\?"),
        (["filename,x", "a,train"], "split", r"name the one that says train or test as CSV:COLUMN \(--split fields"),
        (["filename,split"], "split", "has no rows below its header"),
        (["filename,split", "a,train", "b,train"], "split", "says 'test' of no picture; it takes train and test"),
        (["filename,split", "a,train", "e,test"], "split", "names 1 files that are no picture with a mask: e;"),
        (["filename,split", "a,train", "b,test", "a.png,test"], "split", "lists pictures twice: a"),
    ],
)
def test_what_is_wrong_with_a_csv_is_one_line(tmp_path: Path, rows: list[str], column: str, said: str):
    with pytest.raises(UserError, match=said):
        split_by_csv(_csv(tmp_path, *rows), column, NAMES)


def test_a_csv_that_is_not_there_is_one_line(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere.csv: No such file"):
        split_by_csv(tmp_path / "nowhere.csv", "split", NAMES)
