"""A walk over the headers of an uncompressed tar: every regular file with the bytes it occupies, in tar order.

The tar is read once, front to back; nothing is extracted. Small members are read in big blocks, of big ones the headers
alone. Stretches of plain headers are understood at once, all other members one by one. What would make byte offsets
wrong (compression, sparse members, a cut or damaged file) is refused with the member and the byte.
"""

from array import array
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from posixpath import normpath

import numpy as np

from pathfm.data.tar.file_bytes import TarBytes
from pathfm.data.tar.headers import (
    DIRECTORY,
    FILE,
    HARD_LINK,
    RECORD,
    REGULAR,
    SYMBOLIC_LINK,
    Header,
    HeaderReader,
    is_companion,
    is_header,
    padded,
    shown,
)
from pathfm.data.tar.plain import Members, PlainMembers, is_extended, plain_members, size_on_trust
from pathfm.errors import UserError

_BLOCK_BYTES = 1 << 20
_FAR_BYTES = 16 << 10  # from one header to the next; from here on headers are read alone
_NUM_LONE_RECORDS = 1024
_BATCH_MEMBERS = 4096
_COMPANIONS = "macOS companions (._)"
_EXTENSIONS_BYTES = 16 * RECORD  # how far before its header a member's extended headers are looked for


class TarWalk:
    """Iterate over the regular files of a tar, many at a time; then `skipped` counts, by kind, what was passed over.

    Hard links stand for the bytes of the member they point to and are counted as files of their own.
    Raises `UserError` when the file is missing, compressed, cut, damaged or holds sparse members.
    """

    def __init__(self, path: Path, block_bytes: int = _BLOCK_BYTES) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        status = path.stat()
        self.size_bytes, self.mtime_ns = status.st_size, status.st_mtime_ns
        self._block_bytes = block_bytes

    def __iter__(self) -> Iterator[Members]:
        self.skipped.clear()
        batch = _Batch()
        places: _Places | None = None  # looked for at the first hard link: most tars have none
        for piece in self._pieces():
            if isinstance(piece, Header) and piece.kind == HARD_LINK:
                places = self._places_before(piece.offset) if places is None else places
                piece = self._resolved(piece, places)
            if places is not None:
                places.note(piece)
            if isinstance(piece, Members):
                files = piece.without_companions()
                batch.extend(files)
                if num_companions := len(piece.paths) - len(files.paths):
                    self.skipped[_COMPANIONS] += num_companions
            elif kind_skipped := _skipped_kind(piece):
                self.skipped[kind_skipped] += 1
            else:
                batch.append(piece)
            if len(batch) >= _BATCH_MEMBERS:
                yield batch.members()
                batch = _Batch()
        if len(batch):
            yield batch.members()

    def header_of(self, start_offset: int) -> Header | None:
        """The header, found before them, of the member whose bytes begin at `start_offset`; None: no member's do."""
        if start_offset > self.size_bytes:  # perhaps further than any file reaches
            return None
        farthest = max(0, start_offset - _EXTENSIONS_BYTES)  # extensions stand before the header that they extend
        with self.path.open("rb", buffering=0) as file:
            tar = TarBytes(file.fileno(), _EXTENSIONS_BYTES, ahead_bytes=0)
            tar.block_from(farthest)
            for offset in range(farthest, min(start_offset, self.size_bytes), RECORD):
                if not is_header(tar.read(offset, RECORD)):
                    continue
                with suppress(UserError):
                    header = HeaderReader(self.path, self.size_bytes, tar).member_at(offset)
                    if header is not None and header.start_offset == start_offset:
                        return header
        return None

    def _pieces(self) -> Iterator[Members | Header]:
        """All members in tar order: runs of plain ones at once, the headers of others one by one."""
        with self.path.open("rb", buffering=0) as file:
            tar = TarBytes(file.fileno(), self._block_bytes)
            headers = HeaderReader(self.path, self.size_bytes, tar)
            plain = self._plain_from(tar, 0, alone=False)
            offset, behind = 0, None
            while True:
                run = None if headers.are_altered else plain.run_from(offset)
                piece = run or headers.member_at(offset, behind)
                if piece is None:
                    return
                yield piece
                offset, behind = piece.next_offset, piece.last_path
                if offset >= plain.until:
                    plain = self._plain_from(tar, offset, alone=plain.mean_distance_bytes > _FAR_BYTES)

    def _plain_from(self, tar: TarBytes, offset: int, *, alone: bool) -> PlainMembers:
        """The plain members of the next stretch of the tar, the whole of which is read, or its headers alone."""
        records, offsets = _lone_records(tar, offset) if alone else _block_of_records(tar, offset)
        return plain_members(records, offsets, self.size_bytes)

    def _places_before(self, offset: int) -> "_Places":
        places = _Places()
        for piece in self._pieces():
            if isinstance(piece, Header) and piece.offset >= offset:
                break
            places.note(piece)
        return places

    def _resolved(self, link: Header, places: "_Places") -> Header:
        """A hard link as the file, or the symbolic link, that it is another name of."""
        target = normpath(link.link)
        if target not in places:
            raise UserError(
                f"{self.path}: member {shown(link.path)} at byte {link.offset} is a hard link to "
                f"{shown(link.link)}, which does not precede it in the tar; repack the folder with 'tar -chf'"
            )
        if (place := places[target]) is None:
            return link._replace(kind=SYMBOLIC_LINK)  # tar stores a second name of a symbolic link as a hard link to it
        return link._replace(kind=FILE, start_offset=place[0], end_offset=place[1])


class _Batch:
    """Members that were found one after the other."""

    def __init__(self) -> None:
        self._paths: list[str] = []
        self._starts, self._ends = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._paths)

    def append(self, header: Header) -> None:
        self._paths.append(header.path)
        self._starts.append(header.start_offset)
        self._ends.append(header.end_offset)

    def extend(self, members: Members) -> None:
        self._paths += members.paths
        self._starts.frombytes(members.start_offsets.tobytes())
        self._ends.frombytes(members.end_offsets.tobytes())

    def members(self) -> Members:
        return Members(self._paths, np.array(self._starts), np.array(self._ends))


class _Places(dict[str, tuple[int, int] | None]):
    """Where the bytes of every path are, as far as a walk has come; None for what is not a regular file."""

    def note(self, piece: Members | Header) -> None:
        if isinstance(piece, Header):
            is_file = piece.kind in REGULAR
            self[normpath(piece.path)] = (piece.start_offset, piece.end_offset) if is_file else None
        else:
            places = zip(piece.start_offsets.tolist(), piece.end_offsets.tolist(), strict=True)
            self.update(zip(map(normpath, piece.paths), places, strict=True))


def _block_of_records(tar: TarBytes, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """All records [N, 512] of the next block, and where they begin."""
    block = tar.block_from(offset)
    num_records = len(block) // RECORD
    records = np.frombuffer(block, np.uint8, num_records * RECORD).reshape(num_records, RECORD)
    return records, offset + RECORD * np.arange(num_records)


def _lone_records(tar: TarBytes, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """The headers of the next members, with short texts of extended ones, and where they begin; none of their data."""
    records, offsets = bytearray(), array("q")
    record = bytearray(RECORD)
    is_text = False
    while len(offsets) < _NUM_LONE_RECORDS and tar.fill(record, offset) == RECORD:
        records += record
        offsets.append(offset)
        size = 0 if is_text else size_on_trust(record)
        if size is None:
            break
        is_text = 0 < size <= RECORD and is_extended(record)
        offset += RECORD if is_text else RECORD + padded(size)
    return np.frombuffer(records, np.uint8).reshape(-1, RECORD), np.array(offsets, np.int64)


def _skipped_kind(header: Header) -> str:
    """Under which heading a member is passed over; empty for files that count."""
    if header.kind == DIRECTORY:
        return "directories"
    if header.kind == SYMBOLIC_LINK:
        return "symbolic links"
    if header.kind not in REGULAR:
        return "special files"
    return _COMPANIONS if is_companion(header.path) else ""
