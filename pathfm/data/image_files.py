"""Encoded images by number, wherever they lie: files of a folder, members of a tar, samples of a data set."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from posixpath import basename, normpath

import numpy as np

from pathfm.data.datasets import open_dataset
from pathfm.data.decode import IMAGE_SUFFIXES, open_image
from pathfm.data.entries import printable
from pathfm.data.files_below import files_below
from pathfm.data.strings import is_dataset_string
from pathfm.data.tar.file_bytes import read_at
from pathfm.data.tar.walk import TarWalk
from pathfm.errors import UserError, listed

_HEADER_BYTES = 256 << 10  # of an image, enough to know its size but for rare ones with big metadata
_WHOLE = -1


class ImageFiles:
    """Images in the order of their source, each with its path there. Nothing stays open between two reads."""

    def __init__(
        self, source: str, paths: Sequence[str], places: Sequence[Path], place_of: np.ndarray, spans: np.ndarray
    ) -> None:
        """`places`: files and tars; `place_of` [N]: which; `spans` [N, 2]: first byte and number of bytes, or whole."""
        self.source, self.paths = source, paths
        self._places, self._place_of, self._spans = places, place_of, spans

    def __len__(self) -> int:
        return len(self.paths)

    def read_bytes(self, number: int) -> bytes:
        """The encoded image. Raises `UserError` when it is not there any more."""
        start, size = self._spans[number].tolist()
        content = self._read(number, start, size)
        if size != _WHOLE and len(content) < size:
            raise UserError(f"{self.name_for_people(number)} was cut: it should end at byte {start + size}")
        return content

    def size_px(self, number: int) -> tuple[int, int] | None:
        """Height and width by the header alone; None when that does not tell, for whatever reason."""
        start, size = self._spans[number].tolist()
        head = self._read(number, start, _HEADER_BYTES if size == _WHOLE else min(size, _HEADER_BYTES))
        try:
            with open_image(head) as image:
                return image.height, image.width
        except Exception:  # Pillow's plugins raise whatever cut bytes lead them to
            return None

    def number_of(self, name: str) -> int:
        """Which image a name means: a file name or, with a '/' in it, a path. Raises `UserError` for none, or two."""
        found = self._numbers.get(_path_key(name) if "/" in name else name, [])
        if len(found) == 1:
            return found[0]
        if not found:
            raise UserError(f"there is no image '{printable(name)}' in {self.source}")
        places = listed(printable(self.paths[number]) for number in found)
        raise UserError(f"'{printable(name)}' is {len(found)} images of {self.source}; name it by its path: {places}")

    def name_for_people(self, number: int) -> str:
        return f"{printable(self.paths[number])} in {self.source}"

    def _read(self, number: int, start: int, size: int) -> bytes:
        place = self._places[self._place_of[number]]
        try:
            descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
            try:
                return read_at(descriptor, os.fstat(descriptor).st_size if size == _WHOLE else size, start)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(f"cannot read {printable(str(place))}: {error.strerror or error}") from error

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        """By file name and, with a '/' in front, by path."""
        numbers: dict[str, list[int]] = {}
        for number, path in enumerate(self.paths):
            numbers.setdefault(basename(path), []).append(number)
            numbers.setdefault(_path_key(path), []).append(number)
        return numbers


def open_images(source: str) -> ImageFiles:
    """`source`: a folder, also with subfolders; an uncompressed tar; or a data set string. Raises `UserError`."""
    if is_dataset_string(source):
        return _of_dataset(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path)
    if path.is_file():
        return _of_tars(source, [path], None)
    raise UserError(f"there is no folder or tar {source}; a data set is named like Pathology:root=FOLDER")


def _of_folder(folder: Path) -> ImageFiles:
    files = [path for path in files_below(folder, Counter()) if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    spans = np.tile(np.array([0, _WHOLE]), (len(files), 1))
    paths = [file.relative_to(folder).as_posix() for file in files]
    return ImageFiles(str(folder), paths, files, np.arange(len(files)), spans)


def _of_dataset(text: str) -> ImageFiles:
    """The samples that the index lists, by the paths that their tars say."""
    dataset = open_dataset(text)
    if dataset.name == "Regions":
        raise UserError(f"{text} holds features already; name the images of the regions")
    tars = [dataset.tar_of(rows.start) for rows in dataset.cohorts.values() if rows]
    starts = {
        tar: set(dataset.entries["start_offset"][rows.start : rows.stop].tolist())
        for tar, rows in zip(tars, (rows for rows in dataset.cohorts.values() if rows), strict=True)
    }
    return _of_tars(text, tars, starts)


def _of_tars(source: str, tars: Sequence[Path], starts: dict[Path, set[int]] | None) -> ImageFiles:
    """All images of tars, or those whose bytes begin at one of `starts`."""
    paths: list[str] = []
    place_of, spans = [], []
    for number, tar in enumerate(tars):
        for members in TarWalk(tar):
            ranges = zip(members.paths, members.start_offsets.tolist(), members.end_offsets.tolist(), strict=True)
            for path, start, end in ranges:
                if path.lower().endswith(IMAGE_SUFFIXES) if starts is None else start in starts[tar]:
                    paths.append(path)
                    place_of.append(number)
                    spans.append((start, end - start))
    if not paths:
        raise UserError(f"{source} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return ImageFiles(source, paths, tars, np.array(place_of), np.array(spans))


def distinct_stems(paths: Iterable[str]) -> list[str]:
    """A name for each image: its file name without suffix or, where two share one, its path with '_' for '/'.

    Raises `UserError` when two still share one.
    """
    full = [path.removeprefix("./").rpartition(".")[0] or path for path in paths]
    names = list(map(basename, full))
    if len(set(names)) < len(names):
        names = [path.strip("/").replace("/", "_") for path in full]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"images that differ in their suffix alone would share a name: {listed(map(printable, twice))}")
    return names


def _path_key(path: str) -> str:
    """'./a/b', 'a//b' and '/a/b' are one path; the key begins with '/' as no file name does."""
    return "/" + normpath(path).lstrip("/")
