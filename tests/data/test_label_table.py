import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathfm.data.label_table import read_labels
from pathfm.errors import UserError

cells = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).map(str.strip).filter(bool)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(cells, st.integers(0, 10**18), cells), min_size=1, max_size=9), is_first=st.booleans())
def test_whatever_was_written_is_read(tmp_path, rows, is_first):
    quoted = [[f'"{cell.replace(chr(34), 2 * chr(34))}"' for cell in map(str, row)] for row in rows]
    lines = [["filename", "label", "note"], *quoted]
    text = "\n".join(",".join(line if is_first else line[::-1]) for line in lines)
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    table = read_labels(tmp_path / "labels.csv", "filename", "label")
    assert list(table.names) == [name for name, _, _ in rows]
    assert table.class_index.tolist() == [label for _, label, _ in rows]
    assert table.class_names == {label: f"class_{label}" for _, label, _ in rows}
    assert list(table.lines) == list(range(2, len(rows) + 2))


def test_short_rows_end_in_empty_cells_and_empty_lines_count_as_lines_alone(tmp_path):
    (tmp_path / "labels.csv").write_text("label,filename,class\n1,a.jpg\n\n1,b.jpg,\n2,c.jpg,stroma\n")
    table = read_labels(tmp_path / "labels.csv", "filename", "label", "class")
    assert (list(table.names), list(table.lines)) == (["a.jpg", "b.jpg", "c.jpg"], [2, 4, 5])
    assert table.class_names == {1: "class_1", 2: "stroma"}


@pytest.mark.parametrize("header", ["filename,label,label", "class,filename,class,label"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, header):
    (tmp_path / "labels.csv").write_text(f"{header}\na.jpg,1,2,3\n")
    with pytest.raises(UserError, match=r"has 2 columns '(label|class)'; rename all but one"):
        read_labels(tmp_path / "labels.csv", "filename", "label")


def test_the_line_of_a_broken_csv_is_named(tmp_path):
    (tmp_path / "labels.csv").write_text('filename,label\na.jpg,1\n"' + "b" * 200_000 + '",1\n')
    with pytest.raises(UserError, match="not a readable CSV file: line 3"):
        read_labels(tmp_path / "labels.csv", "filename", "label")
