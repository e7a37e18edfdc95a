"""From the indices of cohorts to one: their rows one after another, each with the number of its cohort."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path

import numpy as np
from numpy.lib import format as npy_format

from pathfm.data.entries import (
    COHORT_ENTRY,
    ENTRY,
    CohortTar,
    ConcatSideCar,
    IndexFiles,
    open_entries,
    read_cohort_indices,
    read_side_car,
    write_cohort_indices,
    write_side_car,
)
from pathfm.data.reader import open_tar, tar_of_cohort
from pathfm.errors import UserError, listed
from pathfm.files import written_aside
from pathfm.log import get_logger, progress

_log = get_logger(__name__)
_OUTPUT = "pretrain"  # {_OUTPUT}_entries.npy; never a cohort
_OF_OTHER_DATA_SETS = ("pretrain_dataset.tar", "downstream_dataset.tar", "regions_dataset.tar")
_CHUNK_ROWS = 1 << 18


@dataclass(frozen=True)
class ConcatRequest:
    """Which indices to put together and where the result goes."""

    root: Path
    output_root: Path
    suffix: str = ""
    command: str = ""  # recorded in the side-car

    @property
    def files(self) -> IndexFiles:
        return IndexFiles(self.output_root, _OUTPUT, self.suffix)

    def files_of(self, cohort: str) -> IndexFiles:
        return IndexFiles(self.root, cohort, self.suffix)


@dataclass(frozen=True)
class ConcatSummary:
    """What came of it."""

    cohorts: Sequence[CohortTar]
    passed_over: Mapping[str, str]  # index that is no cohort's -> why
    written: Sequence[Path]


def concat(request: ConcatRequest) -> ConcatSummary:
    """Write `pretrain_entries[_{suffix}].npy` [N, 5], `cohort_indices.npy` and the side-car.

    Takes the index of every cohort below `root` whose tar is known: it lies there as `{cohort}.tar`, or the side-car
    of the index names it. Raises `UserError` when there is none, one does not fit its tar, or another index would be
    lost; then nothing was written. Warns of a tar that several cohorts are of.
    """
    if "/" in request.suffix:
        raise UserError(f"the suffix '{request.suffix}' must not hold a '/'; choose the folder with --output_root")
    cohorts, passed_over = _cohorts_in(request)
    _warn_of_shared_tars(cohorts)
    _demand_nothing_lost(request.files, [cohort.cohort for cohort in cohorts])
    try:
        return ConcatSummary(cohorts, passed_over, _write(request, cohorts))
    except OSError as error:
        raise UserError(f"cannot write to {request.output_root}: {error.strerror or error}") from error


def _cohorts_in(request: ConcatRequest) -> tuple[tuple[CohortTar, ...], Mapping[str, str]]:
    """The cohorts, by name, and which indices are passed over, why."""
    if not request.root.is_dir():
        raise UserError(f"there is no folder {request.root}")
    if (tar := request.root / f"{_OUTPUT}.tar").is_file():
        raise UserError(f"{tar} cannot be a cohort: {_OUTPUT}_entries.npy is what is made of all; give it another name")
    cohorts: list[CohortTar] = []
    passed_over: dict[str, str] = {}
    for name in _names_in(request.root, request.suffix):
        if reason := _why_no_cohort(request, name):
            passed_over[_index_of(request, name)] = reason
        else:
            cohorts.append(_checked(request, name))
    if not cohorts:
        found = listed(f"{file} ({reason})" for file, reason in passed_over.items()) or "no index"
        expected = request.files_of("NAME").entries.name
        raise UserError(f"{request.root} holds no cohorts ({expected} with its NAME.tar): found {found}")
    return tuple(cohorts), passed_over


def _names_in(root: Path, suffix: str) -> list[str]:
    """The names of a folder's indices, also of those without this subset."""
    endings = ["_entries.npy"] + ([f"_entries_{suffix}.npy"] if suffix else [])
    names = {
        path.name.removesuffix(ending)
        for ending in endings
        for path in root.glob(f"*{escape(ending)}")
        if not path.name.startswith((".", f"{_OUTPUT}_entries"))
    }
    return sorted(names - {""})


def _index_of(request: ConcatRequest, name: str) -> str:
    """The index that there is: of the subset, else of the whole."""
    files = request.files_of(name)
    return (files if files.entries.is_file() else replace(files, suffix="")).entries.name


def _why_no_cohort(request: ConcatRequest, name: str) -> str:
    """Why an index is not taken; empty when it is."""
    files = request.files_of(name)
    if not files.entries.is_file():
        return f"it has no subset {request.suffix}"
    if (request.root / f"{name}.tar").is_file():
        return ""
    side_car = read_side_car(files.side_car)
    if side_car is None:
        return f"there is no {name}.tar"
    return f"it is the index of {side_car.tar}" if side_car.tar in _OF_OTHER_DATA_SETS else ""


def _checked(request: ConcatRequest, name: str) -> CohortTar:
    """A cohort whose index fits its tar, as far as that can be seen in a moment."""
    files = request.files_of(name)
    side_car = read_side_car(files.side_car)
    tar = tar_of_cohort(request.root, name, side_car)
    if side_car and not tar.is_file():  # it lies elsewhere; the side-car knows it
        rows = len(open_entries(files.entries))
        if rows != side_car.num_entries:
            raise UserError(f"{files.entries} has {rows} rows, but its side-car counts {side_car.num_entries}")
        return CohortTar(name, side_car.tar, side_car.tar_size_bytes, side_car.tar_mtime_ns, rows)
    rows, status = len(open_tar(tar, files, name)), tar.stat()
    return CohortTar(name, tar.name, status.st_size, status.st_mtime_ns, rows)


def _warn_of_shared_tars(cohorts: Sequence[CohortTar]) -> None:
    """Such cohorts may be meant, to be weighed apart; or one is the rest of an earlier try."""
    sharing: dict[str, list[str]] = {}
    for cohort in cohorts:
        sharing.setdefault(cohort.tar, []).append(cohort.cohort)
    for tar, names in sharing.items():
        if len(names) > 1:
            _log.warning(
                "the cohorts %s are all of %s: a sample that several list is several samples", listed(names), tar
            )


def _demand_nothing_lost(files: IndexFiles, cohorts: Sequence[str]) -> None:
    """What is replaced is an older concatenation, and no other concatenation relies on other numbers of cohorts."""
    if files.entries.exists() and not _is_concatenation(files.entries):
        raise UserError(f"{files.entries} is there and is no concatenation; choose another --output_root")
    others = [path for path in files.folder.glob(f"{_OUTPUT}_entries*.npy") if path != files.entries]
    if not files.cohort_indices.exists() or not any(map(_is_concatenation, others)):
        return
    if (known := read_cohort_indices(files.cohort_indices)) != list(cohorts):
        raise UserError(
            f"{files.folder} holds {listed(path.name for path in others)} of other cohorts ({listed(known)}) than "
            f"these ({listed(cohorts)}), which would be numbered anew; choose another --output_root"
        )


def _is_concatenation(path: Path) -> bool:
    try:
        open_entries(path, COHORT_ENTRY)
    except UserError:
        return False
    return True


def _write(request: ConcatRequest, cohorts: tuple[CohortTar, ...]) -> list[Path]:
    """An old index goes away before the cohorts are numbered anew: it would be read with the wrong names."""
    files = request.files
    with written_aside(files.entries) as aside:
        _write_rows(aside, request, cohorts)
        for old in (files.side_car, files.entries):
            old.unlink(missing_ok=True)
        write_cohort_indices(files.cohort_indices, [cohort.cohort for cohort in cohorts])
    write_side_car(files.side_car, ConcatSideCar(cohorts, request.command))
    return [files.entries, files.cohort_indices, files.side_car]


def _write_rows(path: Path, request: ConcatRequest, cohorts: Sequence[CohortTar]) -> None:
    """The .npy file from front to back, in chunks. Not through a memory map: a full disk would be a SIGBUS."""
    num_rows = sum(cohort.num_entries for cohort in cohorts)
    shape = (num_rows, len(COHORT_ENTRY.names or ()))
    with path.open("wb") as file:
        npy_format.write_array_header_1_0(file, {"descr": "<u8", "fortran_order": False, "shape": shape})
        chunks = _chunks(request, cohorts)
        row_bytes = COHORT_ENTRY.itemsize
        for chunk in progress(chunks, "concatenating", num_rows, "rows", done=lambda _: file.tell() // row_bytes):
            file.write(chunk.tobytes())


def _chunks(request: ConcatRequest, cohorts: Sequence[CohortTar]) -> Iterator[np.ndarray]:
    for index, cohort in enumerate(cohorts):
        path = request.files_of(cohort.cohort).entries
        entries = open_entries(path)
        for start in range(0, len(entries), _CHUNK_ROWS):
            rows = entries[start : start + _CHUNK_ROWS]
            if (last := int(rows["end_offset"].max())) > cohort.tar_size_bytes:
                raise UserError(
                    f"{path} reaches to byte {last}, but {cohort.tar} has {cohort.tar_size_bytes}; index it again"
                )
            yield _with_cohort(rows, index)


def _with_cohort(rows: np.ndarray, index: int) -> np.ndarray:
    numbered = np.empty(len(rows), COHORT_ENTRY)
    for column in ENTRY.names or ():
        numbered[column] = rows[column]
    numbered["cohort_index"] = index
    return numbered
