import pytest

from pathfm.data.image_table import ImageRow, read_image_table
from pathfm.errors import UserError


@pytest.fixture
def table(tmp_path):
    def read(text: str):
        (tmp_path / "table.csv").write_bytes(text.encode())
        return read_image_table(tmp_path / "table.csv")

    return read


def test_columns_that_are_not_there_are_none(table):
    found = table("filename\na.png\n")
    assert (found.rows, found.has_grid) == ([ImageRow(2, "a.png")], False)


def test_all_columns_are_read_whatever_stands_beside_them(table):
    found = table("\ufeffregion, row,column,file,slide,x,y,note\nr1,0,2,a.png,s,512.0,1024,whatever\n")
    assert found.has_grid
    assert found.rows == [ImageRow(2, "a.png", slide="s", x=512, y=1024, region="r1", row=0, column=2)]


def test_real_tiles(shared_data):
    found = read_image_table(shared_data / "cmu1" / "tiles.csv")
    assert len(found.rows) == 173
    assert (found.rows[0].file, found.rows[0].x, found.rows[0].y) == ("cmu1_y0112_x0896.jpg", 896, 112)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"must have one column 'file' \(it has: nothing\)"),
        ("name\na.png\n", r"must have one column 'file' \(it has: name\)"),
        ("file,filename\na,b\n", "must have one column 'file'"),
        ("file\n", "has no rows below its header"),
        ("file,row,column\na,0,0\n", r"has row, column, but region, row, column go together"),
        ("file,x\na,0\n", r"has x, but x, y go together"),
        ("file,slide\na.png,s\nb.png,\n", "line 3: no slide"),
        ("file,slide\n,s\n", "line 2: no file"),
        ("file,x,y\na.png,1,east\n", "line 2: y is 'east', not a number"),
        ("file,x,y\na.png,1,nan\n", "line 2: y is 'nan', not a number"),
        ("file,region,row,column\na.png,r,0.5,1\n", r"line 2: row is '0.5', not a number"),
    ],
)
def test_what_is_wrong_is_told_by_line(table, text, reason):
    with pytest.raises(UserError, match=reason):
        table(text)
