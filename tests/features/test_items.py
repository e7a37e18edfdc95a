from pathlib import Path

import pytest

from pathfm.data.image_files import open_images
from pathfm.data.image_table import read_image_table
from pathfm.errors import UserError
from pathfm.features.items import NO_IMAGE, Item, SlidePattern, items_of_grids, items_of_images
from tests.features.small import picture, save_picture


@pytest.fixture
def tiles(tmp_path: Path):
    for name in "abcd":
        save_picture(tmp_path / "tiles" / f"{name}.png", picture(0, 8, 8))
    return open_images(str(tmp_path / "tiles"))


@pytest.fixture
def table(tmp_path: Path):
    def write(*rows: str, header: str = "file,region,row,column,slide,x,y"):
        (tmp_path / "table.csv").write_text("\n".join([header, *rows]))
        return read_image_table(tmp_path / "table.csv")

    return write


WHOLE = ("d.png,r,1,1,s,40,30", "a.png,r,0,0,s,8,30", "c.png,r,1,0,s,8,62", "b.png,r,0,1,s,40,62")


def test_without_a_table_every_image_is_an_item_of_its_name(tiles):
    assert items_of_images(tiles, None, None) == [Item(name, (number,)) for number, name in enumerate("abcd")]


def test_with_a_table_its_rows_are_the_items_with_their_slides_and_places(tiles, table):
    rows = table("c.png,s1,5,6", "a.png,s2,7,8", header="filename,slide,x,y")
    assert items_of_images(tiles, rows, None) == [Item("c", (2,), "s1", 5, 6), Item("a", (0,), "s2", 7, 8)]


def test_an_image_is_no_two_items(tiles, table):
    with pytest.raises(UserError, match=r"table.csv, line 4 \(a.png\): this image is listed twice"):
        items_of_images(tiles, table("a.png", "b.png", "a.png", header="file"), None)


def test_tiles_of_a_region_stand_in_the_order_of_its_grid_whatever_the_order_of_the_rows(tiles, table):
    (region,) = items_of_grids(tiles, table(*WHOLE), 2, "refuse", None)
    assert region == Item("r", (0, 1, 2, 3), "s", 8, 30)


def test_a_cell_without_a_tile_is_refused_by_name_or_left_for_padding(tiles, table):
    rows = table(*WHOLE[:3])
    with pytest.raises(UserError, match=r"1 regions have cells without a tile: r \(the first lacks row 0, column 1\)"):
        items_of_grids(tiles, rows, 2, "refuse", None)
    assert items_of_grids(tiles, rows, 2, "pad", None)[0].images == (0, NO_IMAGE, 2, 3)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("b.png,r,0,0,s,1,1", r"line 6 \(b.png\): its cell has a tile already, in line 3"),
        ("b.png,r,2,0,s,1,1", r"row 2, column 0 lies outside a grid of 2 x 2"),
        ("b.png,r,-1,0,s,1,1", r"row -1, column 0 lies outside"),
        ("z.png,q,0,0,s,1,1", r"there is no image 'z.png'"),
    ],
)
def test_a_row_that_fits_no_grid_is_named_by_its_line(tiles, table, row, reason):
    with pytest.raises(UserError, match=reason):
        items_of_grids(tiles, table(*WHOLE, row), 2, "pad", None)


def test_a_region_is_of_one_slide(tiles, table):
    with pytest.raises(UserError, match=r"region r is of slide s in line 2"):
        items_of_grids(tiles, table(*WHOLE[:3], "b.png,r,0,1,other,1,1"), 2, "refuse", None)


def test_a_pattern_finds_slide_and_place_in_a_files_path():
    pattern = SlidePattern(r"([^/]+)_x(?P<x>\d+)_y(?P<y>\d+)")
    assert pattern.located(Item("t", (0,)), "cohort/s7_x512_y1024.jpg") == Item("t", (0,), "s7", 512, 1024)
    assert SlidePattern("s[0-9]+").located(Item("t", (0,)), "cohort/s7_1.jpg").slide == "s7"
    with pytest.raises(UserError, match=r"finds no slide in 'other.jpg'"):
        pattern.located(Item("t", (0,)), "other.jpg")


@pytest.mark.parametrize("pattern", ["(", r"(?P<x>\d+)_(?P<y>\d+)", r"(.+)_(?P<x>\d+)"])
def test_a_pattern_that_cannot_serve_is_refused(pattern):
    with pytest.raises(UserError, match="--slide"):
        SlidePattern(pattern)
