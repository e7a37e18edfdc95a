"""Arrays that may be larger than memory: written piece by piece to .npy files or one .safetensors, read as memory maps.

Both formats are a header and the bytes, row by row. safetensors' own writer wants all of them in memory at once.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np

from pathfm.errors import UserError
from pathfm.files import written_aside

ArrayFormat = Literal["npy", "safetensors"]
FORMATS: tuple[ArrayFormat, ...] = get_args(ArrayFormat)
SAFETENSORS = "features.safetensors"
_CODES = {"float32": "F32", "float16": "F16", "int64": "I64"}
_DTYPES = {code: name for name, code in _CODES.items()}
_Start = Callable[[BinaryIO, Mapping[str, "Array"]], None]  # writes a header
_LENGTH_BYTES, _ALIGNMENT = 8, 8  # of a .safetensors: before the header, and of what comes after it


@dataclass(frozen=True)
class Array:
    """What is to be written: `pieces`, one below the other, make an array of this shape."""

    shape: tuple[int, ...]
    dtype: str  # numpy's name
    pieces: Iterable[np.ndarray]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def array_files(folder: Path, format: ArrayFormat, names: Iterable[str]) -> list[Path]:
    """Where arrays of these names lie."""
    return [folder / SAFETENSORS] if format == "safetensors" else [folder / f"{name}.npy" for name in names]


def write_arrays(folder: Path, format: ArrayFormat, arrays: Mapping[str, Array]) -> Iterator[None]:
    """Comes back after every piece. A file is published, by a rename, once all of it is there.

    In a .safetensors the arrays lie in this order: those of the widest numbers first, so that all are aligned.
    """
    if format == "npy":
        for name, array in arrays.items():
            yield from _write(folder / f"{name}.npy", {name: array}, _start_npy)
    else:
        yield from _write(folder / SAFETENSORS, arrays, _start_safetensors)


def open_arrays(folder: Path, format: ArrayFormat, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read-only memory maps. Raises `UserError` for a file that is not there, cut, or not what it should be."""
    try:
        if format == "safetensors":
            return _open_safetensors(folder / SAFETENSORS, names)
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the arrays in {folder} cannot be read ({error}); extract them again") from error


def _write(path: Path, arrays: Mapping[str, Array], start: _Start) -> Iterator[None]:
    with written_aside(path) as aside, aside.open("wb") as file:
        start(file, arrays)
        begins = file.tell()
        for array in arrays.values():
            for piece in array.pieces:
                assert piece.dtype == array.dtype, (piece.dtype, array.dtype)
                file.write(np.ascontiguousarray(piece).data)
                yield
        assert file.tell() - begins == sum(array.num_bytes for array in arrays.values()), path


def _start_npy(file: BinaryIO, arrays: Mapping[str, Array]) -> None:
    (array,) = arrays.values()
    descr = np.lib.format.dtype_to_descr(np.dtype(array.dtype))
    header = {"descr": descr, "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, header)


def _start_safetensors(file: BinaryIO, arrays: Mapping[str, Array]) -> None:
    described, end = {}, 0
    for name, array in arrays.items():
        start, end = end, end + array.num_bytes
        described[name] = {"dtype": _CODES[array.dtype], "shape": list(array.shape), "data_offsets": [start, end]}
    header = json.dumps(described, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    file.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)


def _open_safetensors(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        described = json.loads(file.read(length))
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        dtype, shape = _DTYPES[described[name]["dtype"]], tuple(described[name]["shape"])
        offset = _LENGTH_BYTES + length + described[name]["data_offsets"][0]
        arrays[name] = np.memmap(path, dtype, "r", offset, shape)
    return arrays
