"""Which pictures a head learns from and which it is scored on: by a CSV, or by the fields they were cut from."""

import csv
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import basename

from pathfm.data.entries import printable
from pathfm.errors import UserError, listed, nearest
from pathfm.files import write_text
from pathfm.random_streams import stream

TRAIN, TEST = "train", "test"
_TEST_SHARE = 1 / 3
_NAME = "filename"


@dataclass(frozen=True)
class Split:
    """Pictures by number, and the group of each, if there are groups: what is resampled together."""

    train: tuple[int, ...]
    test: tuple[int, ...]
    group_of: Mapping[int, str] | None = None

    def groups(self, numbers: Sequence[int]) -> list[str] | None:
        return None if self.group_of is None else [self.group_of[number] for number in numbers]

    def write(self, path: Path, names: Sequence[str]) -> None:
        """As a CSV that is read again in the same way."""
        rows = [
            ",".join([names[number], part, *([self.group_of[number]] if self.group_of is not None else [])])
            for part, numbers in ((TRAIN, self.train), (TEST, self.test))
            for number in numbers
        ]
        write_text(path, "\n".join(["filename,split" + (",group" if self.group_of is not None else ""), *rows]) + "\n")


def split_by_csv(path: Path, column: str, names: Sequence[str], group_column: str | None = None) -> Split:
    """`filename` with or without suffix and folder; `column` says train or test, other words leave a picture out.

    Pictures that the CSV does not list are left out too. Groups: `group_column`, or else the column group if there is
    one. Raises `UserError` for rows that mean no picture, and for a group that is in both.
    """
    rows = _rows(path, [_NAME, column, *([group_column] if group_column else [])])
    number_of = {name: number for number, name in enumerate(names)}
    group_column = group_column or ("group" if "group" in rows[0] else None)
    parts: dict[str, list[int]] = {TRAIN: [], TEST: []}
    groups, unknown = {}, []
    for row in rows:
        number = number_of.get(row[_NAME], number_of.get(_stem(row[_NAME])))
        part = parts.get(row[column].strip().lower())
        if part is None:
            continue
        if number is None:
            unknown.append(row[_NAME])
            continue
        part.append(number)
        if group_column:
            groups[number] = row[group_column]
    _demand_pictures(path, column, unknown, parts)
    split = Split(tuple(sorted(parts[TRAIN])), tuple(sorted(parts[TEST])), groups if group_column else None)
    _demand_apart(path, split, names)
    return split


def split_by_fields(field_of: Sequence[int], seed: int = 0) -> Split:
    """Whole fields, drawn by the seed, until a third of the pictures are for the test.

    Raises `UserError` when all pictures are of one field.
    """
    pictures = defaultdict(list)
    for number, field in enumerate(field_of):
        pictures[field].append(number)
    if len(pictures) < 2:
        raise UserError("all pictures are of one field, so none is left to test on; add pictures of other fields")
    test: list[int] = []
    for field in stream(seed, 0, "dense split").permutation(list(pictures)).tolist()[:-1]:
        if test and len(test) + len(pictures[field]) / 2 > _TEST_SHARE * len(field_of):
            break
        test += pictures[field]
    train = set(range(len(field_of))) - set(test)
    return Split(
        tuple(sorted(train)), tuple(sorted(test)), {number: f"field_{field}" for number, field in enumerate(field_of)}
    )


def _rows(path: Path, wanted: Sequence[str]) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            columns = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    for column in wanted:
        if column not in columns:
            near = nearest(column, columns)
            hint = f"did you mean '{near[0]}'?" if near else "name the one that says train or test as CSV:COLUMN"
            has = f"{path} has no column '{column}' but {listed(columns)}"
            raise UserError(f"{has}; {hint} (--split fields splits by the fields that pictures were cut from)")
    if not rows:
        raise UserError(f"{path} has no rows below its header")
    return rows


def _stem(name: str) -> str:
    return basename(name).rpartition(".")[0] or basename(name)


def _demand_pictures(path: Path, column: str, unknown: Sequence[str], parts: Mapping[str, Sequence[int]]) -> None:
    if unknown:
        raise UserError(
            f"{path} names {len(unknown):,} files that are no picture with a mask: "
            f"{listed(map(printable, unknown), 3)}; mend the CSV, or add them"
        )
    if missing := [part for part, numbers in parts.items() if not numbers]:
        raise UserError(f"column '{column}' of {path} says '{missing[0]}' of no picture; it takes {TRAIN} and {TEST}")


def _demand_apart(path: Path, split: Split, names: Sequence[str]) -> None:
    if twice := _repeated([*split.train, *split.test]):
        raise UserError(f"{path} lists pictures twice: {listed((printable(names[number]) for number in twice), 3)}")
    both = set(split.groups(split.train) or ()) & set(split.groups(split.test) or ())
    if both:
        raise UserError(f"groups are in both train and test of {path}: {listed(sorted(both), 3)}; keep each in one")


def _repeated(numbers: Iterable[int]) -> list[int]:
    seen: set[int] = set()
    return [number for number in numbers if number in seen or seen.add(number)]  # type: ignore[func-returns-value]
