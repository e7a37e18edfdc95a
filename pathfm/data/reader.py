"""Samples of one or many indexed tars by row: checked in milliseconds, opened lazily in every process."""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from posixpath import basename
from typing import Any

import numpy as np

from pathfm.data.cohorts import Cohort, Misfit, cohorts_of, is_concatenated, unsorted
from pathfm.data.entries import (
    COHORT_ENTRY,
    ENTRY,
    CohortTar,
    IndexFiles,
    SideCar,
    concat_command,
    index_command,
    open_entries,
    pack_command,
    printable,
    read_cohort_indices,
    read_concat_side_car,
    read_side_car,
)
from pathfm.data.fit import demand_fit, spread
from pathfm.data.tar.file_bytes import read_at
from pathfm.data.tar.walk import TarWalk
from pathfm.errors import UserError, listed
from pathfm.log import get_logger

_log = get_logger(__name__)
_MAX_OPEN_TARS = 256  # by each process, which may usually have 1024 files open
_FINGERPRINT_STRETCHES, _STRETCH_ROWS = 256, 256  # few pages of the index: each may be a wait for the disk


class Reader:
    """The samples that an entries file lists in one tar, or in one tar for each cohort.

    Rows count from 0 in the entries' order. Making one raises `UserError` when a file is missing or the index does
    not fit a tar. It can be pickled and forked: every process opens the files for itself at the first read.
    """

    def __init__(
        self,
        entries_path: Path,
        row_type: np.dtype,
        tars: Mapping[str, Path],
        described: Mapping[str, SideCar | CohortTar | None],
        remake: str,
    ) -> None:
        """`tars`, by cohort in the order of their index; `described`, what the side-car knows of them; `remake`, the
        command that makes the index.
        """
        self._entries_path, self._row_type, self.remake = entries_path, row_type, remake
        self._open_tars: OrderedDict[Path, _OpenTar] = OrderedDict()
        self._entries: np.ndarray | None = open_entries(entries_path, row_type)
        self._num_samples = len(self._entries)
        if not self._num_samples:
            raise UserError(f"{entries_path} lists no samples")
        try:
            self.cohorts = cohorts_of(self._entries, tars)
            found = {cohort.tar: _found(cohort.tar) for cohort in self.cohorts if cohort.rows}
            self._tar_sizes_bytes = {tar: status.st_size for tar, status in found.items()}
            with _disk_errors_named(f"the tars of {entries_path}"):
                demand_fit(self._entries, self.cohorts, described, found)
        except Misfit as misfit:
            raise self._explained(misfit) from misfit

    def __len__(self) -> int:
        return self._num_samples

    @property
    def entries(self) -> np.ndarray:
        """Structured [N], a read-only memory map: `reader.entries["class_index"]`."""
        if self._entries is None:
            self._entries = open_entries(self._entries_path, self._row_type)
            if len(self._entries) != self._num_samples:
                raise UserError(f"{self._entries_path} changed since this data set was opened; open it again")
        return self._entries

    def fingerprint(self) -> str:
        """sha256 of the number of rows, the cohorts' names and stretches of rows that are spread over the index.

        A moment for any N, and the same wherever the files lie.
        """
        begins = spread(max(1, len(self) - _STRETCH_ROWS + 1), _FINGERPRINT_STRETCHES)
        content = b"".join(self.entries[begin : begin + _STRETCH_ROWS].tobytes() for begin in begins.tolist())
        names = json.dumps([cohort.name for cohort in self.cohorts]) if is_concatenated(self.entries) else ""
        return hashlib.sha256(f"{len(self)} {names}".encode() + content).hexdigest()

    def read_bytes(self, row: int) -> bytes:
        """The encoded image of a row."""
        tar, start, size = self._place(row)
        with _disk_errors_named(tar):
            content = read_at(self._opened(tar).descriptor, size, start)
        if len(content) < size:
            raise UserError(f"{tar} was cut while it was read: sample {row} should end at byte {start + size}")
        return content

    def will_need(self, rows: Iterable[int]) -> None:
        """Tell the operating system what will be read next, so that slow disks fetch many samples at once."""
        if not hasattr(os, "posix_fadvise"):
            return
        for row in rows:
            tar, start, size = self._place(row)
            with _disk_errors_named(tar):
                os.posix_fadvise(self._opened(tar).descriptor, start, size, os.POSIX_FADV_WILLNEED)

    def name_of(self, row: int) -> str:
        """The file's name (basename) as the tar itself says it, so that a hard link goes by its target's name.

        Not from the .npy of names, which is read whole, and which old files count from 0 or from 1.
        """
        tar, start, _ = self._place(row)
        with _disk_errors_named(tar):
            header = TarWalk(tar).header_of(start)
        return basename(header.path) if header else f"file {self.entries['file_index'][row]}"

    def cohort_of(self, row: int) -> Cohort:
        """The cohort of a row."""
        if not is_concatenated(self.entries):
            return self.cohorts[0]
        row, index = int(row), int(self.entries["cohort_index"][row])  # a range looks for numpy's integers one by one
        if index >= len(self.cohorts) or row not in self.cohorts[index].rows:
            raise self._explained(unsorted(self.entries, row))
        return self.cohorts[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open_tars": OrderedDict(), "_entries": None}

    def _place(self, row: int) -> tuple[Path, int, int]:
        """Tar, first byte and number of bytes of a row."""
        entry, tar = self.entries[row], self.cohort_of(row).tar
        start, end = int(entry["start_offset"]), int(entry["end_offset"])
        if not start <= end <= self._tar_sizes_bytes[tar]:
            raise self._explained(Misfit(f"says that row {row} is bytes {start} to {end}, which {tar} has not"))
        return tar, start, end - start

    def _opened(self, tar: Path) -> "_OpenTar":
        """The tar, open; when too many are, the one that was not asked for the longest is let go."""
        if tar in self._open_tars:
            self._open_tars.move_to_end(tar)
            return self._open_tars[tar]
        opened = _OpenTar(tar)
        if opened.size_bytes != self._tar_sizes_bytes[tar]:
            raise UserError(f"{tar} changed since this data set was opened; make the index again: {self.remake}")
        self._open_tars[tar] = opened
        if len(self._open_tars) > _MAX_OPEN_TARS:
            self._open_tars.popitem(last=False)
        return opened

    def _explained(self, misfit: Misfit) -> UserError:
        return UserError(f"{self._entries_path} {misfit}; make the index again: {self.remake}")


class _OpenTar:
    """A tar's descriptor, closed with the last one who holds it.

    A descriptor and pread, not mmap: a tar that is cut meanwhile is an error to report, not a SIGBUS.
    """

    def __init__(self, tar: Path) -> None:
        self.descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self.descriptor).st_size
        if hasattr(os, "posix_fadvise"):  # samples are read in random order: reading ahead would be for nothing
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def open_tar(tar: Path, files: IndexFiles, cohort: str) -> Reader:
    """The samples of one tar, all of one cohort."""
    _found(tar)
    _refuse_other_kind(files.entries, ENTRY)
    side_car = read_side_car(files.side_car)
    remake = printable(index_command(tar, files, side_car))
    _demand_index(files.entries, remake)
    if side_car is None:
        _warn_without(files.side_car)
    return Reader(files.entries, ENTRY, {cohort: tar}, {cohort: side_car}, remake)


def open_cohorts(root: Path, files: IndexFiles) -> Reader:
    """The samples of concatenated entries, those of each cohort in `root/{cohort}.tar`."""
    _refuse_other_kind(files.entries, COHORT_ENTRY)
    side_car = read_concat_side_car(files.side_car)
    remake = printable(concat_command(root, files, side_car))
    _demand_index(files.entries, remake)
    _demand_index(files.cohort_indices, remake)
    names = read_cohort_indices(files.cohort_indices)
    if side_car is None:
        _warn_without(files.side_car)
    if side_car and (known := [said.cohort for said in side_car.cohorts]) != list(map(printable, names)):
        raise UserError(
            f"{files.cohort_indices} names other cohorts ({listed(names)}) than {files.side_car} "
            f"({listed(known)}); make both again: {remake}"
        )
    described = dict(zip(names, side_car.cohorts, strict=True)) if side_car else {}
    tars = {name: tar_of_cohort(root, name, described.get(name)) for name in names}
    return Reader(files.entries, COHORT_ENTRY, tars, described, remake)


def tar_of_cohort(root: Path, name: str, said: SideCar | CohortTar | None) -> Path:
    """`{cohort}.tar`, or where there is none, the tar that the cohort's index was made of."""
    usual = root / f"{name}.tar"
    return root / said.tar if said and not usual.is_file() and (root / said.tar).is_file() else usual


def _found(tar: Path) -> os.stat_result:
    """What the disk says of a tar."""
    with _disk_errors_named(tar):
        if tar.is_file():
            return tar.stat()
    raise UserError(
        f"there is no tar {tar}; make it with: {printable(pack_command(tar))}, or set root= to the folder that holds it"
    )


def _refuse_other_kind(entries_path: Path, row_type: np.dtype) -> None:
    """Before its side-car, which is of another kind too, is read."""
    if entries_path.is_file():
        open_entries(entries_path, row_type)


def _demand_index(path: Path, remake: str) -> None:
    if not path.is_file():
        raise UserError(f"there is no index {path}; make it with: {remake}, or set extra= to the folder that holds it")


def _warn_without(side_car: Path) -> None:
    _log.warning("%s is not there, so it is not certain which tar the index is of", side_car)


@contextmanager
def _disk_errors_named(place: Path | str) -> Iterator[None]:
    """A tar that vanished or a disk that fails is one line that names the tar, or else the place."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename or place}: {error.strerror or error}") from error
