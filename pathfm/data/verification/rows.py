"""Whether every row of an index is the bytes of a file of its tar: one walk over each tar's headers."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from posixpath import basename

import numpy as np
from jaxtyping import Bool, Int64

from pathfm.data.cohorts import is_concatenated
from pathfm.data.datasets import Dataset
from pathfm.data.entries import printable
from pathfm.data.tar.plain import Members
from pathfm.data.tar.walk import TarWalk
from pathfm.data.verification.findings import Check, first_cases
from pathfm.data.verification.slides import SlideNames
from pathfm.errors import UserError
from pathfm.log import progress

# R rows of a cohort   F files of its tar


class _BrokenTar(ValueError):
    """A tar that cannot be walked to its end."""


@dataclass(frozen=True)
class CheckedRows:
    """What came of it."""

    checks: tuple[Check, ...]
    misplaced: Int64[np.ndarray, " M"]  # rows that are not the bytes of a file
    slides: dict[str, str]  # slide -> the first of its files; empty when nobody asked


def check_rows(dataset: Dataset, slide_names: SlideNames | None = None) -> CheckedRows:
    """Compare every row with the headers of its tar. Memory grows with the files of the largest tar (some 100 bytes).

    With `slide_names` the slides of the data set are collected on the way.
    """
    if (folder := dataset.tar_of(0)).is_dir():
        check = Check("offsets", "ok", f"{len(dataset):,} files of the folder {folder}, without an index")
        return CheckedRows((check,), np.empty(0, np.int64), {})
    checks: list[Check] = []
    misplaced: list[np.ndarray] = []
    slides: dict[str, str] = {}
    for cohort, rows in dataset.cohorts.items():
        if rows:
            checked = _check_cohort(dataset, cohort, rows, slide_names)
            checks += checked.checks
            misplaced.append(checked.misplaced)
            slides |= {slide: file for slide, file in checked.slides.items() if slide not in slides}
    if all(check.name != "offsets" for check in checks):
        tars = sum(1 for rows in dataset.cohorts.values() if rows)
        said = f"{len(dataset):,} rows in {tars:,} tar{'s' if tars > 1 else ''}, each the bytes of a file"
        checks.insert(0, Check("offsets", "ok", said))
    return CheckedRows(tuple(checks), np.concatenate(misplaced), slides)


def _check_cohort(dataset: Dataset, cohort: str, rows: range, slide_names: SlideNames | None) -> CheckedRows:
    entries = dataset.entries[rows.start : rows.stop]
    starts, ends, file_index = (
        entries[column].astype(np.int64) for column in ("start_offset", "end_offset", "file_index")
    )
    tar = dataset.tar_of(rows[0])
    try:
        files = _Files.of(tar, np.sort(starts), slide_names)
    except _BrokenTar as error:
        return CheckedRows((Check("offsets", "damage", f"cohort {cohort}: {error}"),), np.array(rows), {})
    if not len(lost := np.flatnonzero(~files.are(starts, ends) | _of_another_cohort(entries))):
        checks = [*_repeated(cohort, starts), *_misnumbered(cohort, file_index, starts, files)]
        return CheckedRows(tuple(checks), lost, files.slides)
    said = f"cohort {cohort}: {len(lost):,} of {len(rows):,} rows are not the bytes of a file of {tar}"
    cases = first_cases(_as_case(rows[place], entries[place], files) for place in lost.tolist())
    return CheckedRows((Check("offsets", "damage", said, cases),), lost + rows.start, files.slides)


def _of_another_cohort(entries: np.ndarray) -> Bool[np.ndarray, " R"]:
    """Rows that lie among those of the cohort that the first one is of."""
    if not is_concatenated(entries):
        return np.zeros(len(entries), bool)
    return np.asarray(entries["cohort_index"] != entries["cohort_index"][0])


def _as_case(row: int, entry: np.ndarray, files: "_Files") -> str:
    """What a row says, beside what the tar says of the file that it counts."""
    file = int(entry["file_index"])
    said = f"row {row} says bytes {entry['start_offset']} to {entry['end_offset']}"
    if file < len(files.starts):
        return f"{said}, its file {files.name(file)} is bytes {files.starts[file]} to {files.ends[file]}"
    return f"{said} of file {file}, but there are {len(files.starts):,} files"


@dataclass(frozen=True)
class _Files:
    """Where the files of a tar are, in tar order."""

    tar: Path
    starts: Int64[np.ndarray, " F"]
    ends: Int64[np.ndarray, " F"]
    slides: dict[str, str]

    @classmethod
    def of(cls, tar: Path, rows_starts: Int64[np.ndarray, " R"], slide_names: SlideNames | None) -> "_Files":
        """`rows_starts`: sorted; whose slides are asked for."""
        starts: list[np.ndarray] = []
        ends: list[np.ndarray] = []
        slides: dict[str, str] = {}
        for files in _files_of(tar):
            starts.append(files.start_offsets)
            ends.append(files.end_offsets)
            if slide_names is not None:
                for place in np.flatnonzero(_found(files.start_offsets, rows_starts)[1]):
                    path = files.paths[place]
                    slides.setdefault(slide_names.slide_of(path), printable(basename(path)))
        if not starts:
            raise _BrokenTar(f"{tar} holds no files")
        return cls(tar, np.concatenate(starts), np.concatenate(ends), slides)

    def are(self, starts: Int64[np.ndarray, " R"], ends: Int64[np.ndarray, " R"]) -> Bool[np.ndarray, " R"]:
        """Whether [start, end) is a file, for each row."""
        known, first = np.unique(self.starts, return_index=True)  # hard links begin where their targets do
        places, are_known = _found(starts, known)
        return are_known & (self.ends[first][places] == ends)

    def name(self, file_index: int) -> str:
        header = TarWalk(self.tar).header_of(int(self.starts[file_index]))
        return printable(basename(header.path)) if header else f"file {file_index}"


def _found(
    values: Int64[np.ndarray, " V"], known: Int64[np.ndarray, " K"]
) -> tuple[Int64[np.ndarray, " V"], Bool[np.ndarray, " V"]]:
    """Where each value is in `known`, which is sorted, and whether it is there at all."""
    places = np.searchsorted(known, values).clip(max=len(known) - 1)
    return places, known[places] == values


def _files_of(tar: Path) -> Iterator[Members]:
    """All files, some at a time."""
    try:
        walk = TarWalk(tar)
        description, total = f"comparing with {printable(tar.name)}", walk.size_bytes / 1e6
        yield from progress(walk, description, total, unit="MB", done=lambda files: files.end_offsets[-1] / 1e6)
    except UserError as error:
        raise _BrokenTar(str(error)) from error
    except OSError as error:
        raise _BrokenTar(f"cannot read {tar}: {error.strerror or error}") from error


def _repeated(cohort: str, starts: Int64[np.ndarray, " R"]) -> list[Check]:
    """Rows that are the same bytes of the tar."""
    num_repeated = int((np.diff(np.sort(starts)) == 0).sum())
    if not num_repeated:
        return []
    said = f"cohort {cohort}: {num_repeated:,} of {len(starts):,} rows are the bytes of another one (hard links?)"
    return [Check("rows", "warning", said)]


def _misnumbered(
    cohort: str, file_index: Int64[np.ndarray, " R"], starts: Int64[np.ndarray, " R"], files: _Files
) -> list[Check]:
    """File indices that count from 0, or all of them from 1 as old ones do, else name other files than the rows are."""
    wrong = min(_count_wrong(file_index - first, starts, files) for first in (0, 1))
    if not wrong:
        return []
    said = f"cohort {cohort}: {wrong:,} of {len(starts):,} file indices count another file, so names are wrong"
    return [Check("rows", "warning", said)]


def _count_wrong(file_index: Int64[np.ndarray, " R"], starts: Int64[np.ndarray, " R"], files: _Files) -> int:
    inside = (file_index >= 0) & (file_index < len(files.starts))
    right = inside & (files.starts[np.where(inside, file_index, 0)] == starts)
    return len(starts) - int(right.sum())
