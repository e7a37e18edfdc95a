from pathlib import Path

import pytest

from pathfm.data.groups import read_groups
from pathfm.errors import UserError


class _Named:
    """As much of a data set as names are."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __len__(self) -> int:
        return len(self._names)

    def name_of(self, row: int) -> str:
        return self._names[row]


def table(folder: Path, *lines: str) -> str:
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return f"{folder / 'labels.csv'}:slide"


def test_every_sample_has_the_group_of_its_file_wherever_the_file_lay(tmp_path):
    found = read_groups(table(tmp_path, "slide, filename", "A,tiles/1.png", "B,2.png", "A,3.png"))
    assert found.groups_of(_Named("3.png", "2.png", "1.png")) == ["A", "B", "A"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["filename,slides", "1.png,A"], r"must have one column 'slide' \(it has: filename, slides\); did you mean"),
        (["file,slide", "1.png,A"], "must have one column 'filename'"),
        (["filename,slide", "1.png,A", "x/1.png,B"], "line 3: 1.png is of slide 'A' and 'B'"),
        (["filename,slide", "1.png,"], "line 2: no slide"),
        (["filename,slide", ",A"], "line 2: no filename"),
    ],
)
def test_what_is_wrong_with_the_table_is_said(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        read_groups(table(tmp_path, *lines))


def test_a_sample_without_a_group_is_named(tmp_path):
    found = read_groups(table(tmp_path, "filename,slide", "1.png,A"))
    with pytest.raises(UserError, match=r"labels.csv has no row for 1 of 2 samples: 2.png"):
        found.groups_of(_Named("1.png", "2.png"))
