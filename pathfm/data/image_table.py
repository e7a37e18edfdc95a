"""The CSV that says which slide images are of, where they lie on it, and of which region's grid they are a cell.

Columns: `file` (or `filename`), and where they are there: `slide`; `x`, `y` in px; `region`, `row`, `column` from 0.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathfm.data.entries import printable
from pathfm.errors import UserError, listed

_FILE = ("file", "filename")
_GRID = ("region", "row", "column")
_PLACE = ("x", "y")


@dataclass(frozen=True)
class ImageRow:
    """What the table says of one image; None where it has no such column."""

    line: int
    file: str
    slide: str | None = None
    x: int | None = None
    y: int | None = None
    region: str | None = None
    row: int | None = None
    column: int | None = None


@dataclass(frozen=True)
class ImageTable:
    """All rows of a CSV, in its order."""

    source: Path
    rows: Sequence[ImageRow]
    has_grid: bool

    def wrong(self, row: ImageRow, what: str) -> UserError:
        return UserError(f"{self.source}, line {row.line} ({printable(row.file)}): {what}")


def read_image_table(source: Path) -> ImageTable:
    """Raises `UserError` for whatever is wrong with it, by line."""
    try:
        with source.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restval="")
            columns = _columns(source, [name.strip() for name in reader.fieldnames or ()])
            reader.fieldnames = columns
            rows = [_row(source, reader.line_num, line, columns) for line in reader]
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from error
    except csv.Error as error:
        raise UserError(f"{source} is not a readable CSV file: {error}") from error
    if not rows:
        raise UserError(f"{source} has no rows below its header")
    return ImageTable(source, rows, "region" in columns)


def _columns(source: Path, columns: list[str]) -> list[str]:
    """The header with one word for the file's column."""
    columns = ["file" if name in _FILE else name for name in columns]
    has = f"(it has: {', '.join(map(printable, columns)) or 'nothing'})"
    if columns.count("file") != 1:
        raise UserError(f"{source} must have one column 'file' {has}")
    for together in (_GRID, _PLACE):
        there = [name for name in together if name in columns]
        if there and len(there) < len(together):
            raise UserError(f"{source} has {listed(there)}, but {', '.join(together)} go together {has}")
    return columns


def _row(source: Path, line: int, cells: Mapping[str, str], columns: Sequence[str]) -> ImageRow:
    def text(name: str) -> str | None:
        if name not in columns:
            return None
        if not (value := cells[name].strip()):
            raise UserError(f"{source}, line {line}: no {name}")
        return value

    def number(name: str, parse: Callable[[str], float] = float) -> int | None:
        if (value := text(name)) is None:
            return None
        try:
            return round(parse(value))
        except (ValueError, OverflowError):
            raise UserError(f"{source}, line {line}: {name} is '{printable(value)}', not a number") from None

    return ImageRow(
        line,
        text("file") or "",
        slide=text("slide"),
        x=number("x"),
        y=number("y"),
        region=text("region"),
        row=number("row", int),
        column=number("column", int),
    )
