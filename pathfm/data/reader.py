"""Samples of an indexed tar by row: opened lazily in every process, checked in milliseconds when it is made."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from posixpath import basename
from typing import Any

import numpy as np

from pathfm.data.entries import IndexFiles, index_command, open_entries, pack_command, printable, read_side_car
from pathfm.data.tar_walk import TarWalk, read_at
from pathfm.errors import UserError
from pathfm.log import get_logger

_log = get_logger(__name__)
_NUM_SPOT_CHECKS = 16
_FINGERPRINT_ROWS = 65_536
_FULL_CHECK_ROWS = 1_000_000  # up to here every end offset is compared with the tar's size (a few milliseconds)


class TarReader:
    """The samples that an entries file lists in one tar.

    Rows count from 0 in the entries' order. Making one raises `UserError` when a file is missing or the index does
    not belong to the tar. It can be pickled and forked: every process opens the files for itself at the first read.
    """

    def __init__(self, tar: Path, files: IndexFiles) -> None:
        self.tar = tar
        self.files = files
        self._descriptor: int | None = None
        _demand_files(tar, files)
        self._entries: np.ndarray | None = open_entries(files.entries)
        self._num_samples = len(self._entries)
        if not self._num_samples:
            raise UserError(f"{files.entries} lists no samples")
        with _disk_errors_named(tar):
            self._tar_size_bytes = tar.stat().st_size
            self._check_side_car()
            self._check_offsets()

    def __len__(self) -> int:
        return self._num_samples

    @property
    def entries(self) -> np.ndarray:
        """Structured [N], a read-only memory map: `reader.entries["class_index"]`."""
        if self._entries is None:
            self._entries = open_entries(self.files.entries)
        return self._entries

    def fingerprint(self) -> str:
        """sha256 of the number of rows and of up to 65,536 rows spread over the index, in a moment for any N."""
        rows = np.linspace(0, len(self) - 1, num=min(len(self), _FINGERPRINT_ROWS)).astype(np.int64)
        return hashlib.sha256(f"{len(self)} ".encode() + self.entries[rows].tobytes()).hexdigest()

    def read_bytes(self, row: int) -> bytes:
        """The encoded image of a row."""
        start, size = self._place(row)
        with _disk_errors_named(self.tar):
            content = read_at(self._tar_descriptor(), size, start)
        if len(content) < size:
            raise UserError(f"{self.tar} was cut while it was read: sample {row} should end at byte {start + size}")
        return content

    def will_need(self, rows: Iterable[int]) -> None:
        """Tell the operating system what will be read next, so that slow disks fetch many samples at once."""
        if not hasattr(os, "posix_fadvise"):
            return
        with _disk_errors_named(self.tar):
            for row in rows:
                start, size = self._place(row)
                os.posix_fadvise(self._tar_descriptor(), start, size, os.POSIX_FADV_WILLNEED)

    def name_of(self, row: int) -> str:
        """The file's name (basename) as the tar itself says it, so that a hard link goes by its target's name.

        Not from the .npy of names, which is read whole, and which old files count from 0 or from 1.
        """
        start, _ = self._place(row)
        with _disk_errors_named(self.tar):
            header = TarWalk(self.tar).header_of(start)
        return basename(header.path) if header else f"file {self.entries['file_index'][row]}"

    def class_index(self, row: int) -> int:
        return int(self.entries["class_index"][row])

    def close(self) -> None:
        """Let go of the tar; the next read opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_descriptor": None, "_entries": None}

    def _place(self, row: int) -> tuple[int, int]:
        entry = self.entries[row]
        start = int(entry["start_offset"])
        return start, int(entry["end_offset"]) - start

    def _tar_descriptor(self) -> int:
        if self._descriptor is None:
            # pread on a descriptor, not mmap: a tar that is cut meanwhile is an error to report, not a SIGBUS.
            descriptor = os.open(self.tar, os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(descriptor).st_size != self._tar_size_bytes:
                os.close(descriptor)
                raise UserError(f"{self.tar} changed since this data set was opened; {self._advice()}")
            if hasattr(os, "posix_fadvise"):  # samples are read in random order: reading ahead would be for nothing
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            self._descriptor = descriptor
        return self._descriptor

    def _check_side_car(self) -> None:
        side_car = read_side_car(self.files.side_car)
        status = self.tar.stat()
        if side_car is None:
            _log.warning("%s is not there, so it is not certain which tar the index is of", self.files.side_car)
            return
        if side_car.num_entries != len(self):
            raise UserError(
                f"{self.files.entries} has {len(self)} rows, but its side-car counts {side_car.num_entries}; "
                + self._advice()
            )
        if side_car.tar_size_bytes != status.st_size:
            raise UserError(
                f"{self.files.entries} is the index of another tar: {side_car.tar} had {side_car.tar_size_bytes} "
                f"bytes, {self.tar} has {status.st_size}; {self._advice()}"
            )
        if side_car.tar_mtime_ns != status.st_mtime_ns:
            _log.warning("%s is not as old as its index says: copied, or made again since?", self.tar)

    def _check_offsets(self) -> None:
        """Offsets lie inside the tar, and before some rows' data there is a tar header that gives their size."""
        entries, size = self.entries, self._tar_size_bytes
        last = int(entries["end_offset"].max() if len(entries) <= _FULL_CHECK_ROWS else entries["end_offset"][-1])
        if last > size:
            raise UserError(
                f"{self.files.entries} reaches to byte {last}, but {self.tar} ends at byte {size}: the tar is cut, "
                f"or the index is of another tar; {self._advice()}"
            )
        tar = TarWalk(self.tar)
        for row in np.linspace(0, len(entries) - 1, min(_NUM_SPOT_CHECKS, len(entries))).astype(int):
            start, end = int(entries["start_offset"][row]), int(entries["end_offset"][row])
            header = tar.header_of(start)
            if header is None or header.end_offset != end:
                raise UserError(
                    f"{self.files.entries} is the index of another tar: row {row} says bytes {start} to {end}, "
                    f"but no file of {self.tar} lies there; {self._advice()}"
                )

    def _advice(self) -> str:
        return f"make the index again: {printable(index_command(self.tar, self.files))}"


def _demand_files(tar: Path, files: IndexFiles) -> None:
    if not tar.is_file():
        raise UserError(
            f"there is no tar {tar}; make it with: {printable(pack_command(tar))}, "
            "or set root= to the folder that holds it"
        )
    if not files.entries.is_file():
        raise UserError(
            f"there is no index {files.entries}; make it with: {printable(index_command(tar, files))}, "
            "or set extra= to the folder that holds it"
        )


@contextmanager
def _disk_errors_named(tar: Path) -> Iterator[None]:
    """A tar that vanished or a disk that fails is one line that names the tar."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {tar}: {error.strerror or error}") from error
