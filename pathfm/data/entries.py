"""The .npy files beside tars: entries, names of files, cohorts and classes, and the side-car that says which tars."""

import json
import pickle
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.lib import format as npy_format

from pathfm.errors import UserError, listed
from pathfm.files import write_json, written_aside

Built = TypeVar("Built")

# One sample per row; the file holds plain uint64 [N, 4], the names are a view of it.
ENTRY = np.dtype(
    [("class_index", "<u8"), ("file_index", "<u8"), ("start_offset", "<u8"), ("end_offset", "<u8")]
)  # bytes of a sample in its tar: [start_offset, end_offset)
COHORT_ENTRY = np.dtype([*ENTRY.descr, ("cohort_index", "<u8")])  # of concatenated indices, uint64 [N, 5]
FORMAT_VERSION = 1

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}


@dataclass(frozen=True)
class IndexFiles:
    """Where the files of an index are: `{name}_entries_{suffix}.npy` and so on, or `entries.npy` without a name."""

    folder: Path
    name: str = ""
    suffix: str = ""

    @property
    def entries(self) -> Path:
        return self._file("entries", self.suffix, ".npy")

    @property
    def file_indices(self) -> Path:
        """Names of all files of the tar, the same for every suffix."""
        return self._file("file_indices", "", ".npy")

    @property
    def class_ids(self) -> Path:
        return self.folder / "class-ids.npy"

    @property
    def cohort_indices(self) -> Path:
        """Names of the cohorts of concatenated entries, the same for every suffix."""
        return self.folder / "cohort_indices.npy"

    @property
    def side_car(self) -> Path:
        """One per entries file: subsets may be made at other times than the whole, from another tar."""
        return self._file("index", self.suffix, ".json")

    def other_side_cars(self) -> list[Path]:
        """Side-cars of the same name with other suffixes."""
        stem = self._file("index", "", "").name
        return sorted(path for path in self.folder.glob(f"{escape(stem)}*.json") if path != self.side_car)

    def _file(self, what: str, suffix: str, ending: str) -> Path:
        return self.folder / ("_".join(part for part in (self.name, what, suffix) if part) + ending)


@dataclass(frozen=True)
class SideCar:
    """Which tar an entries file describes, so that a rebuilt or truncated tar is noticed."""

    tar: str  # its file name
    tar_size_bytes: int
    tar_mtime_ns: int
    num_entries: int
    num_files: int  # regular files in the tar
    command: str
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class CohortTar:
    """The tar that a cohort's rows of concatenated entries describe; the fields mean what they mean in `SideCar`."""

    cohort: str
    tar: str
    tar_size_bytes: int
    tar_mtime_ns: int
    num_entries: int


@dataclass(frozen=True)
class ConcatSideCar:
    """Which tars a concatenated entries file describes."""

    cohorts: tuple[CohortTar, ...]  # in the order of their index
    command: str
    format_version: int = FORMAT_VERSION


def new_entries(
    class_index: np.ndarray, file_index: np.ndarray, start_offset: np.ndarray, end_offset: np.ndarray
) -> np.ndarray:
    """Columns [N] as one structured array [N] of dtype `ENTRY`."""
    entries = np.empty(len(file_index), ENTRY)
    entries["class_index"], entries["file_index"] = class_index, file_index
    entries["start_offset"], entries["end_offset"] = start_offset, end_offset
    return entries


def write_entries(path: Path, entries: np.ndarray) -> None:
    """Write structured entries [N] as the plain uint64 [N, 4] that everybody reads."""
    plain = entries.view(np.uint64).reshape(len(entries), len(ENTRY.names or ()))
    with written_aside(path) as aside, aside.open("wb") as file:
        np.save(file, plain, allow_pickle=False)


def open_entries(path: Path, row_type: np.dtype = ENTRY) -> np.ndarray:
    """The entries as a read-only memory map with named columns: `open_entries(path)["start_offset"]`, shape [N].

    `row_type`: `ENTRY`, or `COHORT_ENTRY` for concatenated entries. Nothing is read but the header, however many rows.
    Raises `UserError` when the file is missing, cut, or not uint64 with these columns.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        plain = npy_format.open_memmap(path, mode="r")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged header can raise anything
        raise UserError(f"{path} is not a whole .npy file of numbers: {error}") from error
    columns = row_type.names or ()
    if plain.dtype != np.uint64 or plain.ndim != 2 or plain.shape[1] != len(columns):
        expected = f"uint64 [N, {len(columns)}] ({', '.join(columns)})"
        raise UserError(f"{path} must hold {expected}, but holds {_kind_of(plain)}")
    if not plain.flags.c_contiguous:
        raise UserError(f"{path} is stored column by column; save it again from np.ascontiguousarray(...)")
    return plain.view(np.ndarray).view(row_type)[:, 0]


def write_file_indices(path: Path, names: Sequence[str]) -> None:
    """Write `{0: names[0], 1: names[1], ...}` as a pickled dict."""
    _write_names(path, names)


def read_file_indices(path: Path) -> dict[int, str]:
    """File index -> basename, with the keys as they are written (old files count from 1)."""
    return _read_names(path, "file")


def write_cohort_indices(path: Path, cohorts: Sequence[str]) -> None:
    """Write `{0: cohorts[0], 1: cohorts[1], ...}` as a pickled dict."""
    _write_names(path, cohorts)


def read_cohort_indices(path: Path) -> list[str]:
    """Names of the cohorts by cohort index."""
    names = _read_names(path, "cohort")
    if sorted(names) != list(range(len(names))) or len(set(names.values())) != len(names):
        raise UserError(f"{path} must name different cohorts by 0, 1, 2, ..., but says {_shortened(names)}")
    return [names[index] for index in range(len(names))]


def write_class_ids(path: Path, class_names: Mapping[int, str]) -> None:
    """Write [C, 2] rows of (label, class name) in the mapping's order."""
    rows = np.empty((len(class_names), 2), dtype=object)
    for row, (label, name) in enumerate(class_names.items()):
        rows[row] = label, name
    _write_object(path, rows)


def read_class_ids(path: Path) -> dict[int, str]:
    """Label -> class name, in the file's order."""
    rows = _read_object(path)
    if rows.ndim != 2 or rows.shape[1] != 2 or not len(rows) or not all(map(_is_class, rows)):
        raise UserError(f"{path} must hold an object array [C, 2] of labels (0 or more) and class names")
    return {row[0]: row[1] for row in rows}


def write_side_car(path: Path, side_car: SideCar | ConcatSideCar) -> None:
    write_json(path, _printable_strings(asdict(side_car)))


def read_side_car(path: Path) -> SideCar | None:
    """The side-car, or None where there is none (ancestors' files have none)."""
    return _read_side_car(path, lambda fields: SideCar(**fields))


def read_concat_side_car(path: Path) -> ConcatSideCar | None:
    """The side-car of concatenated entries, or None where there is none."""
    return _read_side_car(
        path,
        lambda fields: ConcatSideCar(**{**fields, "cohorts": tuple(CohortTar(**row) for row in fields["cohorts"])}),
    )


def index_command(tar: Path, files: IndexFiles, side_car: SideCar | None) -> str:
    """What to type to make this index: what its side-car recorded, else as far as the names tell."""
    words = ["pathfm", "index", "--tarball_path", str(tar), "--output_root", str(files.folder)]
    words += ["--name", files.name] if files.name else []
    words += ["--suffix", files.suffix, "--keep", "LIST"] if files.suffix else []
    return _recorded(side_car) or shlex.join(words)


def concat_command(root: Path, files: IndexFiles, side_car: ConcatSideCar | None) -> str:
    """What to type to make these concatenated entries: what their side-car recorded, else as far as the names tell."""
    words = ["pathfm", "concat", "--root", str(root), "--output_root", str(files.folder)]
    words += ["--suffix", files.suffix] if files.suffix else []
    return _recorded(side_car) or shlex.join(words)


def pack_command(tar: Path) -> str:
    """What to type to make this tar."""
    words = ["pathfm", "pack", "FOLDER", "--name", tar.name.removesuffix(".tar").removesuffix("_dataset")]
    words += [] if tar.name.endswith("_dataset.tar") else ["--cohort"]
    return shlex.join([*words, "--output", str(tar.parent)])


def printable(text: str) -> str:
    """A file name on one line as it can be printed and stored anywhere, controls and no UTF-8 as escapes."""
    return text.encode("utf-8", "backslashreplace").decode().translate(_CONTROLS)


def _kind_of(table: np.ndarray) -> str:
    """What a table with other columns than were asked for is."""
    kinds = {4: " (the index of one tar)", 5: " (a concatenation of cohorts, for PathologyFoundation)"}
    return f"{table.dtype} {list(table.shape)}{kinds.get(table.shape[-1], '') if table.ndim == 2 else ''}"


def _is_class(row: np.ndarray) -> bool:
    return type(row[0]) is int and row[0] >= 0 and type(row[1]) is str


def _recorded(side_car: SideCar | ConcatSideCar | None) -> str:
    """The command that made an index; empty where nobody knows."""
    return side_car.command if side_car else ""


def _read_side_car(path: Path, build: Callable[[dict[str, Any]], Built]) -> Built | None:
    if not path.is_file():
        return None
    try:
        return build(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); make the index again or delete this file") from error


def _printable_strings(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _printable_strings(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_printable_strings(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _write_names(path: Path, names: Sequence[str]) -> None:
    _write_object(path, np.array(dict(enumerate(names)), dtype=object))


def _read_names(path: Path, what: str) -> dict[int, str]:
    content = _read_object(path)
    names = content.item() if content.shape == () else None
    if type(names) is not dict or not all(type(key) is int and type(name) is str for key, name in names.items()):
        raise UserError(f"{path} must hold a dictionary from {what} index to {what} name")
    return names


def _shortened(names: Mapping[int, str]) -> str:
    return listed(f"{index}: {printable(name)}" for index, name in names.items())


def _write_object(path: Path, content: np.ndarray) -> None:
    with written_aside(path) as aside, aside.open("wb") as file:
        np.save(file, content, allow_pickle=True)


def _read_object(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            _skip_header(file)
            pickled = _PlainUnpickler(file).load()
            content = pickled.content if isinstance(pickled, _ObjectArray) else None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = error if str(error) else type(error).__name__
        raise UserError(f"{path} is not a whole .npy file of a plain dictionary or table: {reason}") from error
    if content is None:
        raise UserError(f"{path} must hold a pickled object array, but holds {type(pickled).__name__}")
    return content


def _skip_header(file: BinaryIO) -> None:
    version = npy_format.read_magic(file)
    read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    _, _, dtype = read_header(file)
    if not dtype.hasobject:
        raise ValueError(f"it holds {dtype}, not objects")


class _Ignored:
    """Stands for a type that the pickle of an object array names; an array of anything else fails in its place."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _ObjectArray:
    """Filled with what a pickled array holds. Not by numpy, which a damaged pickle brings down with the process."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, list[object]]) -> None:
        _, shape, _, _, items = state
        flat = np.empty(len(items), dtype=object)
        for place, item in enumerate(items):
            flat[place] = item
        self.content = flat.reshape(shape)


class _PlainUnpickler(pickle.Unpickler):
    """Builds dict, list, int, str and arrays of them, and refuses every other name, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            ("numpy", "ndarray"): _Ignored,
            ("numpy", "dtype"): _Ignored,
            ("numpy._core.multiarray", "_reconstruct"): _ObjectArray,
            ("numpy.core.multiarray", "_reconstruct"): _ObjectArray,  # written by numpy 1
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which an index has no use for")
        return allowed[module, name]
