"""Which slide or patient a labelled file is of, by a column of a CSV: what query and test must not share."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import basename

from pathfm.data.datasets import Dataset
from pathfm.data.entries import printable
from pathfm.errors import UserError, listed, nearest

FILE_NAME = "filename"  # as `pathfm index` calls the column


@dataclass(frozen=True)
class GroupTable:
    """One column of a CSV by the file's name."""

    source: Path
    column: str
    group_of: Mapping[str, str]

    def groups_of(self, dataset: Dataset) -> list[str]:
        """The group of every sample, by row. Raises `UserError` that names the files that are not in the table."""
        names = [dataset.name_of(row) for row in range(len(dataset))]
        if absent := [name for name in names if name not in self.group_of]:
            shown = listed(map(printable, absent), at_most=3)
            raise UserError(f"{self.source} has no row for {len(absent):,} of {len(names):,} samples: {shown}")
        return [self.group_of[name] for name in names]


def read_groups(text: str) -> GroupTable:
    """`labels.csv:slide`: its columns `filename` and `slide`. Raises `UserError` for whatever is wrong with it."""
    path, colon, column = text.rpartition(":")
    if not (colon and path and column):
        raise UserError(f"groups are given as FILE.csv:COLUMN, not '{text}'; e.g. labels.csv:slide")
    source = Path(path).expanduser()
    try:
        with source.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file, skipinitialspace=True, restval="")
            columns = [name.strip() for name in reader.fieldnames or ()]
            _demand_columns(source, columns, column)
            reader.fieldnames = columns
            rows = [(reader.line_num, line[FILE_NAME].strip(), line[column].strip()) for line in reader]
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from error
    except csv.Error as error:
        raise UserError(f"{source} is not a readable CSV file: {error}") from error
    return GroupTable(source, column, _by_file(source, column, rows))


def _demand_columns(source: Path, columns: Sequence[str], column: str) -> None:
    for wanted in (FILE_NAME, column):
        if columns.count(wanted) != 1:
            has = ", ".join(map(printable, columns)) or "nothing"
            hint = "".join(f"; did you mean '{near}'?" for near in nearest(wanted, {*columns} - {wanted}))
            raise UserError(f"{source} must have one column '{wanted}' (it has: {has}){hint}")


def _by_file(source: Path, column: str, rows: Sequence[tuple[int, str, str]]) -> dict[str, str]:
    """By the name that the file has in its tar, without the folders."""
    found: dict[str, str] = {}
    for line, path, group in rows:
        name = basename(path)
        if not name or not group:
            raise UserError(f"{source}, line {line}: no {column if name else FILE_NAME}")
        if found.setdefault(name, group) != group:
            raise UserError(
                f"{source}, line {line}: {printable(name)} is of {column} '{printable(found[name])}' and "
                f"'{printable(group)}'"
            )
    return found
