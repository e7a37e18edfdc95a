"""What features are extracted of: regions that are images, regions that are tiles on a grid, or tiles."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pathfm.data.entries import printable
from pathfm.data.image_files import ImageFiles, distinct_stems
from pathfm.data.image_table import ImageRow, ImageTable
from pathfm.errors import UserError, listed

OtherSizes = Literal["refuse", "pad"]
NO_IMAGE = -1  # of a cell that no tile covers


@dataclass(frozen=True, slots=True)
class Item:
    """A region or a tile; its features are one entry of what is written."""

    name: str
    images: tuple[int, ...]  # numbers of its image, or of the image of each cell of its grid, row-major
    slide: str | None = None
    x: int | None = None  # px on the slide
    y: int | None = None


class SlidePattern:
    """A regular expression on an image's path: its first group, or all that it finds, is the slide.

    Groups called x and y, if it has them, are where the image lies: `(.+)_x(?P<x>[0-9]+)_y(?P<y>[0-9]+)`.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self._pattern = re.compile(pattern)
        except re.error as error:
            raise UserError(f"--slide '{pattern}' is no regular expression: {error}") from error
        named = self._pattern.groupindex
        if ("x" in named) != ("y" in named) or (1 in (named.get("x"), named.get("y"))):
            raise UserError(f"--slide '{pattern}' must find the slide first, and x and y both or neither")

    def located(self, item: Item, path: str) -> Item:
        """The item with its slide and place. Raises `UserError` when the pattern does not find them."""
        found = self._pattern.search(path)
        slide = found and (found.group(1) if self._pattern.groups else found.group())
        if not found or not slide:
            raise UserError(f"--slide '{self._pattern.pattern}' finds no slide in '{printable(path)}'")
        if "x" not in self._pattern.groupindex:
            return replace(item, slide=slide)
        try:
            return replace(item, slide=slide, x=int(found["x"]), y=int(found["y"]))
        except (ValueError, TypeError):
            raise UserError(f"--slide '{self._pattern.pattern}' finds no numbers in '{printable(path)}'") from None


def items_of_images(images: ImageFiles, table: ImageTable | None, slides: SlidePattern | None) -> list[Item]:
    """One item for each image, or for each row of the table where there is one; named by their files."""
    numbers = list(range(len(images))) if table is None else [images.number_of(row.file) for row in table.rows]
    if table and len(set(numbers)) < len(numbers):
        times = Counter(numbers)
        again = max(place for place, number in enumerate(numbers) if times[number] > 1)
        raise table.wrong(table.rows[again], "this image is listed twice")
    names = distinct_stems([images.paths[number] for number in numbers])
    rows: Iterable[ImageRow | None] = table.rows if table else [None] * len(numbers)
    items = [
        Item(name, (number,), row.slide, row.x, row.y) if row else Item(name, (number,))
        for name, number, row in zip(names, numbers, rows, strict=True)
    ]
    return list(_located(items, images, slides))


def items_of_grids(
    images: ImageFiles, table: ImageTable, side: int, other_sizes: OtherSizes, slides: SlidePattern | None
) -> list[Item]:
    """One item for each region of a table of tiles, in the order of their first rows; a region's grid is side x side.

    Raises `UserError` for a cell that lies outside the grid, has two tiles or, unless padded, none.
    """
    grids: dict[str, dict[int, ImageRow]] = {}
    for row in table.rows:
        _place(grids.setdefault(row.region or "", {}), row, table, side)
    if other_sizes == "refuse" and (partial := [name for name, cells in grids.items() if len(cells) < side * side]):
        first = next(cell for cell in range(side * side) if cell not in grids[partial[0]])
        raise UserError(
            f"{table.source}: {len(partial):,} regions have cells without a tile: {listed(map(printable, partial))} "
            f"(the first lacks row {first // side}, column {first % side}); --other-sizes pad takes white for them"
        )
    items = [_of_grid(name, cells, images, table, side) for name, cells in grids.items()]
    if len({item.name for item in items}) < len(items):
        raise UserError(f"{table.source}: regions whose names differ in '/' and '_' alone would share a file")
    return list(_located(items, images, slides))


def _place(cells: dict[int, ImageRow], row: ImageRow, table: ImageTable, side: int) -> None:
    if row.row is None or row.column is None:
        raise table.wrong(row, "no row and column")
    if not (0 <= row.row < side and 0 <= row.column < side):
        raise table.wrong(row, f"row {row.row}, column {row.column} lies outside a grid of {side} x {side}, from 0")
    if (other := cells.setdefault(row.row * side + row.column, row)) is not row:
        raise table.wrong(row, f"its cell has a tile already, in line {other.line}")


def _of_grid(name: str, cells: dict[int, ImageRow], images: ImageFiles, table: ImageTable, side: int) -> Item:
    numbers = tuple(images.number_of(cells[cell].file) if cell in cells else NO_IMAGE for cell in range(side * side))
    rows = list(cells.values())
    if strange := next((row for row in rows if row.slide != rows[0].slide), None):
        raise table.wrong(strange, f"region {printable(name)} is of slide {rows[0].slide} in line {rows[0].line}")
    x, y = _lowest([row.x for row in rows]), _lowest([row.y for row in rows])
    return Item(name.replace("/", "_"), numbers, rows[0].slide, x, y)


def _lowest(values: Sequence[int | None]) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _located(items: Sequence[Item], images: ImageFiles, slides: SlidePattern | None) -> Iterator[Item]:
    for item in items:
        first = next(number for number in item.images if number != NO_IMAGE)
        yield slides.located(item, images.paths[first]) if slides else item
