"""The .npy files beside a tar: entries, file names, class names, and the side-car that says which tar they describe."""

import json
import pickle
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy_format

from pathfm.errors import UserError
from pathfm.files import write_json, written_aside

# One sample per row; the file holds plain uint64 [N, 4], the names are a view of it.
ENTRY = np.dtype(
    [("class_index", "<u8"), ("file_index", "<u8"), ("start_offset", "<u8"), ("end_offset", "<u8")]
)  # bytes of a sample in its tar: [start_offset, end_offset)
COLUMNS = tuple(ENTRY.names or ())
FORMAT_VERSION = 1


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
    plain = entries.view(np.uint64).reshape(len(entries), len(COLUMNS))
    with written_aside(path) as aside, aside.open("wb") as file:
        np.save(file, plain, allow_pickle=False)


def open_entries(path: Path) -> np.ndarray:
    """The entries as a read-only memory map with named columns: `open_entries(path)["start_offset"]`, shape [N].

    Raises `UserError` when the file is missing, cut, or not uint64 [N, 4].
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        plain = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a whole .npy file of numbers: {error}") from error
    if (
        not isinstance(plain, np.ndarray)
        or plain.dtype != np.uint64
        or plain.ndim != 2
        or plain.shape[1] != len(COLUMNS)
    ):
        found = f"{plain.dtype} {list(plain.shape)}" if isinstance(plain, np.ndarray) else "an .npz archive"
        raise UserError(f"{path} must hold uint64 [N, {len(COLUMNS)}] ({', '.join(COLUMNS)}), but holds {found}")
    return np.ascontiguousarray(plain).view(ENTRY)[:, 0]


def write_file_indices(path: Path, names: Sequence[str]) -> None:
    """Write `{0: names[0], 1: names[1], ...}` as a pickled dict."""
    _write_object(path, np.array(dict(enumerate(names)), dtype=object))


def read_file_indices(path: Path) -> dict[int, str]:
    """File index -> basename, with the keys as they are written (old files count from 1)."""
    content = _read_object(path)
    names = content.item() if content.shape == () else None
    if type(names) is not dict or not all(type(key) is int and type(name) is str for key, name in names.items()):
        raise UserError(f"{path} must hold a dictionary from file index to file name")
    return names


def write_class_ids(path: Path, class_names: Mapping[int, str]) -> None:
    """Write [C, 2] rows of (label, class name) in the mapping's order."""
    rows = np.empty((len(class_names), 2), dtype=object)
    for row, (label, name) in enumerate(class_names.items()):
        rows[row] = label, name
    _write_object(path, rows)


def read_class_ids(path: Path) -> dict[int, str]:
    """Label -> class name, in the file's order."""
    rows = _read_object(path)
    if rows.ndim != 2 or rows.shape[1] != 2 or not all(type(row[0]) is int and type(row[1]) is str for row in rows):
        raise UserError(f"{path} must hold an object array [C, 2] of labels and class names")
    return {row[0]: row[1] for row in rows}


def write_side_car(path: Path, side_car: SideCar) -> None:
    write_json(path, {key: printable(v) if isinstance(v, str) else v for key, v in asdict(side_car).items()})


def read_side_car(path: Path) -> SideCar | None:
    """The side-car, or None where there is none (ancestors' files have none)."""
    if not path.is_file():
        return None
    try:
        return SideCar(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); make the index again or delete this file") from error


def index_command(tar: Path, files: IndexFiles) -> str:
    """What to type to make this index: what its side-car recorded, else as far as the names tell."""
    side_car = read_side_car(files.side_car)
    if side_car is not None and side_car.command:
        return side_car.command
    words = ["pathfm", "index", "--tarball_path", str(tar), "--output_root", str(files.folder)]
    words += ["--name", files.name] if files.name else []
    words += ["--suffix", files.suffix, "--keep", "LIST"] if files.suffix else []
    return shlex.join(words)


def pack_command(tar: Path) -> str:
    """What to type to make this tar."""
    name = tar.name.removesuffix("_dataset.tar")
    return shlex.join(["pathfm", "pack", "FOLDER", "--name", name, "--output", str(tar.parent)])


def printable(text: str) -> str:
    """A file name as it can be printed and stored anywhere, bytes that are no UTF-8 as escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _write_object(path: Path, content: np.ndarray) -> None:
    with written_aside(path) as aside, aside.open("wb") as file:
        np.save(file, content, allow_pickle=True)


def _read_object(path: Path) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            _skip_header(file)
            content = _PlainUnpickler(file).load()
    except MemoryError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise UserError(f"{path} is not a whole .npy file of a plain dictionary or table: {error}") from error
    if not isinstance(content, np.ndarray) or content.dtype != object:
        raise UserError(f"{path} must hold a pickled object array, but holds {type(content).__name__}")
    return content


def _skip_header(file: BinaryIO) -> None:
    version = npy_format.read_magic(file)
    read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    _, _, dtype = read_header(file)
    if not dtype.hasobject:
        raise ValueError(f"it holds {dtype}, not objects")


class _PlainUnpickler(pickle.Unpickler):
    """Builds dict, list, int, str and ndarray, and refuses every other name, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        rebuild_array = np.empty(0).__reduce__()[0]
        allowed = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("numpy._core.multiarray", "_reconstruct"): rebuild_array,
            ("numpy.core.multiarray", "_reconstruct"): rebuild_array,  # written by numpy 1
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it wants to load {module}.{name}, which an index has no use for")
        return allowed[module, name]
