"""From a tar to its index: every file, a listed subset, or labelled files, as the ancestors' infer_entries wrote it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from posixpath import basename, normpath

import numpy as np

from pathfm.data.decode import IMAGE_SUFFIXES
from pathfm.data.entries import (
    IndexFiles,
    SideCar,
    new_entries,
    printable,
    read_class_ids,
    read_side_car,
    write_class_ids,
    write_entries,
    write_file_indices,
    write_side_car,
)
from pathfm.data.folder_reader import REGION_SUFFIX
from pathfm.data.label_table import CLASS_NAME, LabelTable, read_labels
from pathfm.data.tar.plain import Members
from pathfm.data.tar.walk import TarWalk
from pathfm.errors import UserError, listed
from pathfm.log import get_logger, progress

_log = get_logger(__name__)

_NONE = -1  # no row


@dataclass(frozen=True)
class IndexRequest:
    """What to index and where the files go."""

    tarball_path: Path
    output_root: Path
    name: str = ""
    suffix: str = ""
    keep: Path | None = None  # a text file: only these names
    remove: Path | None = None  # a text file: all but these names
    csv: Path | None = None  # labels
    file_name: str = "filename"
    label_name: str = "label"
    class_name: str = CLASS_NAME
    command: str = ""  # recorded in the side-car

    @property
    def files(self) -> IndexFiles:
        return IndexFiles(self.output_root, self.name, self.suffix)

    def check(self) -> None:
        """Raises `UserError` when the request contradicts itself."""
        if self.keep and self.remove:
            raise UserError("give either a list of names to keep or one of names to remove, not both")
        for what, value in (("name", self.name), ("suffix", self.suffix)):
            if "/" in value:
                raise UserError(f"the {what} '{value}' must not hold a '/'; the output folder is an option of its own")


@dataclass(frozen=True)
class IndexSummary:
    """What came of it."""

    num_files: int  # regular files in the tar
    num_entries: int
    skipped: Mapping[str, int]  # members that are not files, by kind
    missing: Sequence[str]  # names of the keep or remove list that are not in the tar
    written: Sequence[Path]
    class_names: Mapping[int, str] = field(default_factory=dict)
    unused_labels: int = 0  # rows of the CSV whose file is not in the tar


def build_index(request: IndexRequest) -> IndexSummary:
    """Walk the tar once and write entries, file names, class names (with a CSV) and the side-car.

    Raises `UserError` for everything that is wrong with the tar, the lists or the labels; then nothing was written.
    """
    request.check()
    selection = _Selection.read(request)
    labels = _Labels.read(request)
    listing = _list_tar(request.tarball_path, with_paths=bool(selection or labels))
    selected = selection.select(listing) if selection else _Selected(np.arange(len(listing)))
    labelled = labels.label(selected.rows, listing) if labels else _Labelled(np.zeros(len(selected.rows), np.uint64))
    rows = selected.rows
    _warn_of_other_files([listing.names[row] for row in rows.tolist()])
    entries = new_entries(labelled.class_index, rows, listing.start_offsets[rows], listing.end_offsets[rows])
    return IndexSummary(
        num_files=len(listing),
        num_entries=len(entries),
        skipped=listing.skipped,
        missing=selected.missing,
        written=_write(request, listing, entries, labels),
        class_names=labels.class_names if labels else {},
        unused_labels=labelled.unused,
    )


@dataclass(frozen=True)
class _Listing:
    """Every regular file of a tar, in tar order; row i is file index i."""

    names: list[str]  # basenames
    paths: list[str]  # as the tar says them; empty when nobody asks for names
    start_offsets: np.ndarray
    end_offsets: np.ndarray
    skipped: Mapping[str, int]
    tar_size_bytes: int
    tar_mtime_ns: int

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        """For messages."""
        return printable(_path_key(self.paths[row])[1:])


def _list_tar(path: Path, with_paths: bool) -> _Listing:
    try:
        return _walked(TarWalk(path), with_paths)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _walked(walk: TarWalk, with_paths: bool) -> _Listing:
    names: list[str] = []
    paths: list[str] = []
    starts, ends = [], []
    for members in _with_progress(walk):
        names += map(basename, members.paths)
        starts.append(members.start_offsets)
        ends.append(members.end_offsets)
        if with_paths:
            paths += members.paths
    if not names:
        raise UserError(f"{walk.path} holds no files" + (f" (only {_counts(walk.skipped)})" if walk.skipped else ""))
    now = walk.path.stat()
    if (now.st_size, now.st_mtime_ns) != (walk.size_bytes, walk.mtime_ns):
        raise UserError(f"{walk.path} changed while it was read; index it again when it is complete")
    offsets = np.concatenate(starts), np.concatenate(ends)
    return _Listing(names, paths, *offsets, dict(walk.skipped), walk.size_bytes, walk.mtime_ns)


def _with_progress(walk: TarWalk) -> Iterator[Members]:
    return progress(
        walk,
        f"indexing {printable(walk.path.name)}",
        total=walk.size_bytes / 1e6,
        unit="MB",
        done=lambda members: members.next_offset / 1e6,
    )


def _key(name: str) -> str:
    """What a person wrote means a basename or, with a '/' in it, a full path in the tar."""
    return _path_key(name) if "/" in name else name


def _path_key(path: str) -> str:
    """'./a/b', 'a//b' and '/a/b' are the file 'a/b' of the tar; the key begins with '/' as no basename does."""
    return "/" + normpath(path).lstrip("/")


@dataclass(frozen=True)
class _Found:
    """Which file of the tar (row of the listing) a key means."""

    row_of: dict[str, int]
    repeated: dict[str, list[int]]  # keys that mean several files, with all their rows

    def demand_unique(self, keys: Iterable[str], listing: _Listing, source: Path) -> None:
        """A key that means two files of the tar is an error that lists them."""
        if twice := [key for key in keys if key in self.repeated]:
            places = (
                f"'{printable(key)}': " + ", ".join(listing.path(row) for row in self.repeated[key][:5])
                for key in twice
            )
            same_path = all("/" in key for key in twice)
            advice = "repack it so that every path is unique" if same_path else "name them by their full path in it"
            raise UserError(f"{source} names files that occur more than once in the tar; {advice}: {listed(places)}")


def _find(keys: Mapping[str, object], listing: _Listing) -> _Found:
    found = _Found({}, {})
    columns = [listing.names, map(_path_key, listing.paths)] if _are_paths(keys) else [listing.names]
    for column in columns:
        for row, key in enumerate(column):
            if key in keys and (first := found.row_of.setdefault(key, row)) != row:
                found.repeated.setdefault(key, [first]).append(row)
    return found


def _are_paths(keys: Iterable[str]) -> bool:
    """Whether some of the keys are full paths."""
    return any(key.startswith("/") for key in keys)


@dataclass(frozen=True)
class _Selected:
    rows: np.ndarray  # int64, in tar order
    missing: Sequence[str] = ()  # listed names that are not in the tar


class _Selection:
    """A list of files to keep, or to remove."""

    def __init__(self, source: Path, names: Iterable[str], *, keeps: bool) -> None:
        self._source, self._keeps = source, keeps
        self._name_of_key = {_key(name): name for name in names}

    @classmethod
    def read(cls, request: IndexRequest) -> "_Selection | None":
        source = request.keep or request.remove
        if source is None:
            return None
        names = [name for line in _read_text(source).split("\n") if (name := line.strip())]
        if not names:
            raise UserError(f"{source} is empty: it should list one file name per line")
        return cls(source, names, keeps=request.keep is not None)

    def select(self, listing: _Listing) -> _Selected:
        found = _find(self._name_of_key, listing)
        found.demand_unique(found.repeated, listing, self._source)
        listed = np.zeros(len(listing), bool)
        listed[list(found.row_of.values())] = True
        rows = np.flatnonzero(listed == self._keeps)
        missing = [name for key, name in self._name_of_key.items() if key not in found.row_of]
        if not found.row_of:
            raise UserError(
                f"none of the {len(missing)} names in {self._source} is in the tar: the list begins with "
                f"'{printable(missing[0])}', the tar with '{listing.path(0)}'"
            )
        if not len(rows):
            raise UserError(f"{self._source} removes every file of the tar")
        return _Selected(rows, missing)


@dataclass(frozen=True)
class _Labelled:
    class_index: np.ndarray  # uint64, one per selected row
    unused: int = 0  # labels of files that are not in the tar


class _Labels:
    """Labels and class names of a CSV."""

    def __init__(self, table: LabelTable) -> None:
        self.class_names = table.class_names
        self._table = table
        keys = [_key(name) for name in table.names]
        self._row_of_key = dict(zip(reversed(keys), reversed(range(len(keys))), strict=True))  # the first row of each
        if len(self._row_of_key) < len(keys):
            table.demand_one_label((self._row_of_key[key], row) for row, key in enumerate(keys))

    @classmethod
    def read(cls, request: IndexRequest) -> "_Labels | None":
        if request.csv is None:
            return None
        return cls(read_labels(request.csv, request.file_name, request.label_name, request.class_name))

    def label(self, rows: np.ndarray, listing: _Listing) -> _Labelled:
        """The label of every row; rows without one are an error that lists the files."""
        by_name = self._csv_rows(listing.names)
        by_path = np.full_like(by_name, _NONE)
        if _are_paths(self._row_of_key):
            by_path = self._csv_rows([_path_key(path) for path in listing.paths])
        csv_rows = np.where(by_path == _NONE, by_name, by_path)[rows]
        if len(without := rows[csv_rows == _NONE]):
            files = listed(map(listing.path, without.tolist()))
            raise UserError(f"{self._table.source} has no label for {len(without):,} files: {files}")
        files_of = np.bincount(np.concatenate([by_name, by_path]) - _NONE)[1:]  # how many each row of the CSV means
        if len(twice := csv_rows[files_of[csv_rows] > 1]):
            keys = dict.fromkeys(_key(self._table.names[row]) for row in twice.tolist())
            _find(keys, listing).demand_unique(keys, listing, self._table.source)
        both = rows[(by_name[rows] != _NONE) & (by_path[rows] != _NONE)]
        self._table.demand_one_label(zip(by_name[both].tolist(), by_path[both].tolist(), strict=True))
        unused = len(self._row_of_key) - int(np.count_nonzero(files_of))
        return _Labelled(self._table.class_index[csv_rows], unused)

    def _csv_rows(self, keys: Sequence[str]) -> np.ndarray:
        """Which row of the CSV is about each key, int64 [keys], or `_NONE`."""
        return np.fromiter(map(self._row_of_key.get, keys, repeat(_NONE)), np.int64, len(keys))


def _write(request: IndexRequest, listing: _Listing, entries: np.ndarray, labels: _Labels | None) -> list[Path]:
    """Write all files, the side-car last and the old one away first: a half-replaced index is never vouched for."""
    files = request.files
    side_car = SideCar(
        tar=request.tarball_path.name,
        tar_size_bytes=listing.tar_size_bytes,
        tar_mtime_ns=listing.tar_mtime_ns,
        num_entries=len(entries),
        num_files=len(listing),
        command=request.command,
    )
    try:
        files.folder.mkdir(parents=True, exist_ok=True)
        _warn_of_other_tars(files, side_car)
        files.side_car.unlink(missing_ok=True)
        write_entries(files.entries, entries)
        write_file_indices(files.file_indices, listing.names)
        if labels is not None:
            _warn_of_other_classes(files, labels.class_names)
            write_class_ids(files.class_ids, labels.class_names)
        write_side_car(files.side_car, side_car)
    except OSError as error:
        raise UserError(f"cannot write the index to {files.folder}: {error.strerror or error}") from error
    classes = [files.class_ids] if labels is not None else []
    return [files.entries, files.file_indices, *classes, files.side_car]


def _warn_of_other_tars(files: IndexFiles, side_car: SideCar) -> None:
    tar = (side_car.tar_size_bytes, side_car.tar_mtime_ns)
    for path in [files.side_car, *files.other_side_cars()]:
        try:
            other = read_side_car(path)
        except UserError:
            continue
        if other is None or (other.tar_size_bytes, other.tar_mtime_ns) == tar:
            continue
        if path == files.side_car:
            _log.warning("replacing %s, which described another tar (%s)", files.entries.name, other.tar)
        else:
            _log.warning("%s is about another tar (%s) than the index made now; make it again too", path, other.tar)


def _warn_of_other_classes(files: IndexFiles, class_names: Mapping[int, str]) -> None:
    """All splits in a folder share one file of classes."""
    with suppress(UserError):  # there is none, or none that can be read
        if read_class_ids(files.class_ids) != class_names:
            _log.warning("replacing %s, which had other classes; index every split with one CSV", files.class_ids)


def _warn_of_other_files(names: Sequence[str]) -> None:
    others = [name for name in names if not name.lower().endswith((*IMAGE_SUFFIXES, REGION_SUFFIX))]
    if others:
        _log.warning("%d of the files do not look like images: %s", len(others), listed(map(printable, others)))


def _read_text(path: Path) -> str:
    """A text file; bytes that are no UTF-8 stay as they are, so that odd file names still match the tar's."""
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _counts(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in skipped.items())
