"""From a folder of images or region features to one tar and its index: the same folder gives the same bytes."""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pathfm.data.decode import IMAGE_SUFFIXES
from pathfm.data.entries import printable, read_side_car
from pathfm.data.files_below import files_below
from pathfm.data.folder_reader import REGION_SUFFIX
from pathfm.data.index import IndexRequest, IndexSummary, build_index
from pathfm.errors import UserError
from pathfm.files import written_aside
from pathfm.log import progress


@dataclass(frozen=True)
class PackRequest:
    """What to pack and where it goes."""

    folder: Path
    name: str  # the tar is NAME_dataset.tar, the index NAME_entries.npy
    output: Path
    suffix: str = ""
    cohort: bool = False  # the tar is NAME.tar, as PathologyFoundation wants it
    force: bool = False  # replace a tar of other content
    command: str = ""

    @property
    def tar(self) -> Path:
        return self.output / (f"{self.name}.tar" if self.cohort else f"{self.name}_dataset.tar")


@dataclass(frozen=True)
class PackSummary:
    """What came of it."""

    num_samples: int
    skipped: Mapping[str, int]  # other files, by kind
    was_there: bool  # a tar of the same content
    index: IndexSummary | None  # None: the index was there too


@dataclass(frozen=True)
class _Sample:
    path: Path
    name: str  # in the tar


def pack(request: PackRequest) -> PackSummary:
    """Write `NAME_dataset.tar` (or `NAME.tar`) and its index. Subfolders and symbolic links are followed.

    Raises `UserError` when the folder is missing or without images, holds region features beside them, a link is
    broken, a file cannot be read, or a tar of other content is there and `force` is not set.
    """
    if not request.name:
        raise UserError("the tar must have a name; give one with --name")
    index_request = IndexRequest(request.tar, request.output, request.name, request.suffix, command=request.command)
    index_request.check()
    samples, skipped = _samples_in(request.folder)
    was_there = request.tar.exists() and _holds(request.tar, samples)
    if not was_there:
        if request.tar.exists() and not request.force:
            raise UserError(
                f"{request.tar} is there and holds something else than {request.folder}; "
                "choose another --name or --output, or replace it with --force"
            )
        _write(request.tar, samples)
    index = None if was_there and _is_indexed(index_request, len(samples)) else build_index(index_request)
    return PackSummary(len(samples), skipped, was_there, index)


def _samples_in(folder: Path) -> tuple[list[_Sample], Mapping[str, int]]:
    """The images or the region features below a folder, sorted by path, and how many other files there are by kind."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    skipped: Counter[str] = Counter()
    root = os.path.basename(os.path.abspath(folder)) or "images"
    samples = []
    for path in files_below(folder, skipped):
        if path.suffix.lower() not in (*IMAGE_SUFFIXES, REGION_SUFFIX):
            skipped["files that are not images"] += 1
        elif not path.exists():
            raise UserError(f"{printable(str(path))} is a broken link; mend or delete it")
        elif path.stat().st_size == 0:
            skipped["empty files"] += 1
        else:
            samples.append(_Sample(path, f"{root}/{path.relative_to(folder).as_posix()}"))
    if not samples:
        found = ", ".join(f"{count:,} {kind}" for kind, count in skipped.items()) or "nothing"
        raise UserError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}): found {found}")
    _demand_one_kind(folder, samples)
    return sorted(samples, key=lambda sample: os.fsencode(sample.name)), skipped


def _demand_one_kind(folder: Path, samples: Sequence[_Sample]) -> None:
    num_regions = sum(sample.path.suffix.lower() == REGION_SUFFIX for sample in samples)
    if 0 < num_regions < len(samples):
        raise UserError(
            f"{folder} holds {len(samples) - num_regions:,} images and {num_regions:,} region features "
            f"({REGION_SUFFIX}), which no data set mixes; pack them from two folders"
        )


def _write(tar: Path, samples: Sequence[_Sample]) -> None:
    try:
        with written_aside(tar) as aside, aside.open("wb") as file:
            _write_tar(file, progress(samples, f"packing {tar.name}", unit="files"))
    except OSError as error:
        raise UserError(f"cannot write {tar}: {error.strerror or error}") from error


def _holds(tar: Path, samples: Sequence[_Sample]) -> bool:
    """Whether the tar is, byte for byte, what packing the samples gives."""
    try:
        with tar.open("rb") as file:
            _write_tar(_Comparison(file), progress(samples, f"comparing {tar.name}", unit="files"))
            return not file.read(1)
    except _Differs:
        return False
    except OSError as error:
        raise UserError(f"cannot read {tar}: {error.strerror or error}") from error


def _write_tar(file: "BinaryIO | _Comparison", samples: Iterator[_Sample]) -> None:
    """Owner, mode and time of the files stay out, so that the bytes depend on names and content alone."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            content = _content(sample)
            member = tarfile.TarInfo(sample.name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _content(sample: _Sample) -> bytes:
    try:
        return sample.path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {printable(str(sample.path))}: {error.strerror or error}") from error


class _Differs(Exception):
    """The bytes written are not those that are there."""


class _Comparison(io.RawIOBase):
    """A file to write to that only compares what is written with what is there."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def write(self, content: Any) -> int:
        if self._file.read(len(content)) != content:
            raise _Differs
        return len(content)

    def tell(self) -> int:
        return self._file.tell()


def _is_indexed(request: IndexRequest, num_samples: int) -> bool:
    """Whether the index of this very tar is there."""
    try:
        side_car = read_side_car(request.files.side_car)
    except UserError:
        return False
    status = request.tarball_path.stat()
    return (
        side_car is not None
        and request.files.entries.is_file()
        and request.files.file_indices.is_file()
        and side_car.num_entries == num_samples
        and (side_car.tar_size_bytes, side_car.tar_mtime_ns) == (status.st_size, status.st_mtime_ns)
    )
