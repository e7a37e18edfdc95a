"""The CSV that labels files, column by column, so that a million rows take a second; what is wrong is told by line."""

import csv
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pathfm.data.entries import printable
from pathfm.errors import UserError, listed

CLASS_NAME = "class"  # the column of class names, which need not be there


@dataclass(frozen=True)
class LabelTable:
    """The rows of a CSV of labels; every label is a number, every row has a file name."""

    source: Path
    names: Sequence[str]  # of files, as they stand there
    labels: Sequence[str]
    classes: Sequence[str]  # class names, '' for none
    lines: Sequence[int]

    @cached_property
    def class_index(self) -> np.ndarray:
        """The labels as uint64 [rows]."""
        number_of = {label: int(label) for label in set(self.labels)}
        return np.array([number_of[label] for label in self.labels], np.uint64)

    @cached_property
    def class_names(self) -> dict[int, str]:
        """The name of every label, in the order in which the labels first occur."""
        names: dict[int, str] = {}
        for label, name in dict.fromkeys(zip(self.labels, self.classes, strict=True)):
            name = name or f"class_{int(label)}"
            if names.setdefault(int(label), name) != name:
                row = next(i for i, pair in enumerate(zip(self.labels, self.classes, strict=True)) if pair[1] == name)
                raise UserError(
                    f"{self.source}: label {label} is called '{names[int(label)]}' and, in line {self.lines[row]}, "
                    f"'{name}'"
                )
        return names

    def demand_one_label(self, rows_of_a_file: Iterable[tuple[int, int]]) -> None:
        """Raises `UserError` when two rows about one file say different labels."""
        different = [(a, b) for a, b in rows_of_a_file if a != b and self.class_index[a] != self.class_index[b]]
        if different:
            shown = (f"{self._shown(a)} and {self._shown(b)}" for a, b in different)
            raise UserError(f"{self.source}: two labels for one file: {listed(shown)}")

    def check(self) -> None:
        """Raises `UserError` when a row has no file name or its label is no number."""
        if not self.names:
            raise UserError(f"{self.source} has no rows below its header")
        if not all(self.names):
            nameless = (self._shown(row) for row, name in enumerate(self.names) if not name)
            raise UserError(f"{self.source}: rows without a file name: {listed(nameless)}")
        if wrong := {label for label in set(self.labels) if not re.fullmatch(r"[0-9]{1,19}", label)}:
            shown = (self._shown(row) for row, label in enumerate(self.labels) if label in wrong)
            raise UserError(f"{self.source}: labels must be integers from 0: {listed(shown)}")

    def _shown(self, row: int) -> str:
        return f"line {self.lines[row]} ({printable(self.names[row])}: '{printable(self.labels[row])}')"


def read_labels(source: Path, file_name: str, label_name: str, class_name: str = CLASS_NAME) -> LabelTable:
    """Read three columns of a CSV by their names. Raises `UserError` for whatever is wrong with it."""
    try:
        # Bytes that are no UTF-8 stay as they are, so that odd file names still match the tar's.
        with source.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            return _read_table(source, csv.reader(file, skipinitialspace=True), (file_name, label_name, class_name))
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror or error}") from error


def _read_table(source: Path, reader: Any, wanted: tuple[str, str, str]) -> LabelTable:
    lines, names, labels, classes = array("q"), [], [], []
    text_of = _Stripped()
    try:
        columns = [column.strip() for column in next(reader, [])]
        _check_columns(source, columns, *wanted)
        at = {column: i for i, column in enumerate(columns)}
        name_at, label_at, class_at = (at.get(column, len(columns)) for column in wanted)
        last = max(name_at, label_at, class_at)
        for row in reader:
            if not row:
                continue
            if len(row) <= last:
                row += [""] * (1 + last - len(row))  # a short row ends in empty cells
            lines.append(reader.line_num)
            names.append(row[name_at].strip())
            labels.append(text_of[row[label_at]])
            classes.append(text_of[row[class_at]])
    except csv.Error as error:
        raise UserError(f"{source} is not a readable CSV file: line {reader.line_num}: {error}") from error
    table = LabelTable(source, names, labels, classes if class_at < len(columns) else [""] * len(names), lines)
    table.check()
    return table


class _Stripped(dict[str, str]):
    """A cell -> its text, one object for all cells that say the same: the labels of a million rows are a few."""

    def __missing__(self, cell: str) -> str:
        self[cell] = cell.strip()
        return self[cell]


def _check_columns(source: Path, columns: Sequence[str], file_name: str, label_name: str, class_name: str) -> None:
    has = f"(it has: {', '.join(map(printable, columns)) or 'nothing'})"
    for column, flag in ((file_name, "--file_name"), (label_name, "--label_name"), (class_name, "--class_name")):
        if column not in columns and (column, flag) != (CLASS_NAME, "--class_name"):
            raise UserError(f"{source} has no column '{column}' {has}; choose the column with {flag}")
        if columns.count(column) > 1:
            raise UserError(f"{source} has {columns.count(column)} columns '{column}'; rename all but one of them")
