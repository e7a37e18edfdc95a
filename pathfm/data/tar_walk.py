"""A walk over the headers of an uncompressed tar: every regular file with the bytes it occupies, in tar order.

The tar is read once, front to back, in big blocks; nothing is extracted. What would make byte offsets wrong
(compression, sparse members, a cut or damaged file) is refused with the member and the byte.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from posixpath import basename, normpath
from typing import NamedTuple, NoReturn

from pathfm.data.entries import printable
from pathfm.errors import UserError

RECORD = 512  # bytes; headers are one record long, data are padded to whole records
_BLOCK_BYTES = 4 << 20
_EXTENSIONS_BYTES = 16 * RECORD  # how far before its header a member's extended headers are looked for
_SHORT_BLOCK_BYTES = 64 << 10  # after a jump over a big member: most likely the next one is big too

_REGULAR = (b"0", b"\0", b"7")
_HARD_LINK, _SYMBOLIC_LINK, _DIRECTORY = b"1", b"2", b"5"
_GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE, _GNU_CONTINUED = b"L", b"K", b"S", b"M"
_PAX_MEMBER, _PAX_SOLARIS, _PAX_GLOBAL = b"x", b"X", b"g"
_EXTENSIONS = (_GNU_LONG_NAME, _GNU_LONG_LINK, _PAX_MEMBER, _PAX_SOLARIS, _PAX_GLOBAL)
_WITHOUT_DATA = (_HARD_LINK, _SYMBOLIC_LINK, b"3", b"4", _DIRECTORY, b"6")

_CUT = "is truncated, or still being written"  # which look the same
_MEND_CUT = "copy or make it again, or wait until it is complete"

_COMPRESSIONS = {
    b"\x1f\x8b": "gzip-compressed",
    b"\x1f\x9d": "compressed (.Z)",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ\0": "xz-compressed",
    b"\x5d\0\0": "lzma-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"\x04\x22\x4d\x18": "lz4-compressed",
    b"LZIP": "lzip-compressed",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
}


class TarMember(NamedTuple):
    """A regular file in a tar; its bytes are [start_offset, end_offset) of the tar."""

    path: str
    start_offset: int
    end_offset: int
    file_index: int  # counts regular files in tar order from 0


class Header(NamedTuple):
    """What a tar says of a member, GNU and PAX extensions applied; its bytes are [start_offset, end_offset)."""

    kind: bytes
    path: str
    link: str
    offset: int  # of the header that precedes the data
    start_offset: int
    end_offset: int


class TarWalk:
    """Iterate over the regular files of a tar; afterwards `skipped` counts, by kind, what was passed over.

    Hard links stand for the bytes of the member they point to and are counted as files of their own.
    Raises `UserError` when the file is missing, compressed, cut, damaged or holds sparse members.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped: Counter[str] = Counter()
        if not path.is_file():
            raise UserError(f"there is no file {path}")
        status = path.stat()
        self.size_bytes, self.mtime_ns = status.st_size, status.st_mtime_ns

    def __iter__(self) -> Iterator[TarMember]:
        self.skipped.clear()
        places: dict[str, tuple[int, int] | None] | None = None  # built at the first hard link: most tars have none
        file_index = 0
        for header in self._headers():
            place = (header.start_offset, header.end_offset) if header.kind in _REGULAR else None
            kind_skipped = _skipped_kind(header)
            if header.kind == _HARD_LINK:
                places = self._places_before(header.offset) if places is None else places
                place, kind_skipped = self._target_of(header, places)
            if places is not None:
                places[normpath(header.path)] = place
            if kind_skipped or place is None:
                self.skipped[kind_skipped] += 1
                continue
            yield TarMember(header.path, *place, file_index)
            file_index += 1

    def header_of(self, start_offset: int) -> Header | None:
        """The header, found before them, of the member whose bytes begin at `start_offset`; None: no member's do."""
        with self.path.open("rb") as file:
            blocks = _BigBlocks(file.fileno())
            farthest = max(0, start_offset - _EXTENSIONS_BYTES)  # extensions stand before the header that they extend
            for offset in range(farthest, min(start_offset, self.size_bytes), RECORD):
                if not _is_header(blocks.read(offset, RECORD)):
                    continue
                with suppress(UserError):
                    header = next(self._headers_from(blocks, offset), None)
                    if header is not None and header.start_offset == start_offset:
                        return header
        return None

    def _places_before(self, offset: int) -> dict[str, tuple[int, int] | None]:
        """Where the bytes of every member before `offset` are; None for what is not a regular file."""
        places: dict[str, tuple[int, int] | None] = {}
        for header in self._headers():
            if header.offset >= offset:
                break
            if header.kind != _HARD_LINK:
                places[normpath(header.path)] = (
                    (header.start_offset, header.end_offset) if header.kind in _REGULAR else None
                )
        return places

    def _target_of(
        self, header: Header, places: dict[str, tuple[int, int] | None]
    ) -> tuple[tuple[int, int] | None, str]:
        target = normpath(header.link)
        if target not in places:
            raise UserError(
                f"{self.path}: member {_shown(header.path)} at byte {header.offset} is a hard link to "
                f"{_shown(header.link)}, which does not precede it in the tar; repack the folder with 'tar -chf'"
            )
        if places[target] is None:
            return None, "symbolic links"  # tar stores a second name of a symbolic link as a hard link to it
        return places[target], _skipped_kind(header)

    def _headers(self) -> Iterator[Header]:
        """Every member's header."""
        with self.path.open("rb") as file:
            yield from self._headers_from(_BigBlocks(file.fileno()), 0)

    def _headers_from(self, blocks: "_BigBlocks", offset: int) -> Iterator[Header]:
        last_path: str | None = None
        global_pax: dict[str, str] = {}
        extended = _Extended()
        while (record := self._record_at(blocks, offset, last_path)) is not None:
            kind = record[156:157]
            size = self._size_of(record, offset)
            start = offset + RECORD
            if kind in _EXTENSIONS:
                self._demand_bytes_until(start + size, offset, "an extended header")
                self._extend(extended, global_pax, kind, blocks.read(start, size), offset)
                offset = start + _padded(size)
                continue
            pax = {**global_pax, **extended.pax}
            path = pax.get("path") or extended.long_name or _name_of(record)
            link = pax.get("linkpath") or extended.long_link or _text(record[157:257])
            if kind == b"\0" and path.endswith("/"):
                kind = _DIRECTORY  # as tars from before 1988 say it
            self._refuse_pieces(kind, pax, path, offset)
            if "size" in pax:
                size = self._pax_size(pax["size"], offset)
            if kind in _WITHOUT_DATA:
                size = 0
            self._demand_bytes_until(start + size, offset, f"member {_shown(path)}")
            yield Header(kind, path.rstrip("/"), link, offset, start, start + size)
            offset = start + _padded(size)
            last_path, extended = path, _Extended()
        if extended.used:
            raise UserError(f"{self.path}: the tar ends at byte {offset}, between an extended header and its member")
        self._demand_nothing_behind(blocks, offset)

    def _record_at(self, blocks: "_BigBlocks", offset: int, last_path: str | None) -> bytes | None:
        """The header at `offset`, checked; None at the zeros that end an archive."""
        record = blocks.read(offset, RECORD)
        if record == bytes(RECORD):
            return None
        if _is_header(record):
            return record
        if offset == 0:
            self._refuse_as_no_tar(record)
        behind = f" (behind member {_shown(last_path)})" if last_path is not None else ""
        if len(record) < RECORD:
            raise UserError(
                f"{self.path} {_CUT}: it ends at byte {self.size_bytes}{behind}, "
                f"without the zeros that end every tar; {_MEND_CUT}"
            )
        raise UserError(
            f"{self.path} is damaged: there is no valid tar header at byte {offset}{behind}; copy or make it again"
        )

    def _refuse_as_no_tar(self, record: bytes) -> NoReturn:
        for magic, what in _COMPRESSIONS.items():
            if record.startswith(magic):
                raise UserError(
                    f"{self.path} is {what} (byte 0 of member 0), so byte offsets into it mean nothing; "
                    f"unpack it and make a plain tar with 'tar -chf {self.path.stem.removesuffix('.tar')}.tar folder'"
                )
        if not record:
            raise UserError(f"{self.path} is empty (0 bytes); make it again with 'tar -chf {self.path.name} folder'")
        raise UserError(f"{self.path} is not a tar file: there is no valid tar header at byte 0")

    def _refuse_pieces(self, kind: bytes, pax: dict[str, str], path: str, offset: int) -> None:
        if kind == _GNU_SPARSE or any(key.startswith("GNU.sparse.") for key in pax):
            raise UserError(
                f"{self.path}: member {_shown(path)} at byte {offset} is sparse, so its bytes are not in one piece; "
                "repack the folder with 'tar -chf' without --sparse"
            )
        if kind == _GNU_CONTINUED:
            raise UserError(
                f"{self.path}: member {_shown(path)} at byte {offset} continues another volume; join the volumes first"
            )

    def _extend(
        self, extended: "_Extended", global_pax: dict[str, str], kind: bytes, content: bytes, offset: int
    ) -> None:
        extended.used = extended.used or kind != _PAX_GLOBAL
        if kind == _GNU_LONG_NAME:
            extended.long_name = _text(content)
        elif kind == _GNU_LONG_LINK:
            extended.long_link = _text(content)
        elif kind == _PAX_GLOBAL:
            global_pax.update(self._pax_records(content, offset))
        else:
            extended.pax.update(self._pax_records(content, offset))

    def _pax_records(self, content: bytes, offset: int) -> dict[str, str]:
        """Records 'LENGTH key=value\\n' of a PAX header; an empty value takes a key back."""
        records = {}
        at = 0
        while at < len(content) and content[at] != 0:
            length_text, space, _ = content[at : at + 20].partition(b" ")
            length = int(length_text) if space and length_text.isdigit() else 0
            record = content[at + len(length_text) + 1 : at + length]
            key, equals, value = record.partition(b"=")
            if not equals or at + length > len(content) or not record.endswith(b"\n"):
                raise UserError(f"{self.path} is damaged: the PAX header at byte {offset} cannot be read")
            records[_decoded(key)] = _decoded(value[:-1])
            at += length
        return records

    def _size_of(self, record: bytes, offset: int) -> int:
        size = number(record[124:136])
        if size is None or size < 0:
            raise UserError(f"{self.path} is damaged: the header at byte {offset} does not say how long its member is")
        return size

    def _pax_size(self, text: str, offset: int) -> int:
        if not (text.isascii() and text.isdigit()):
            raise UserError(f"{self.path} is damaged: the member at byte {offset} claims a size of {_shown(text)}")
        return int(text)

    def _demand_bytes_until(self, end: int, offset: int, what: str) -> None:
        if end > self.size_bytes:
            raise UserError(
                f"{self.path} {_CUT}: {what}, whose header is at byte {offset}, should end at byte {end}, "
                f"but the file ends at byte {self.size_bytes}; {_MEND_CUT}"
            )

    def _demand_nothing_behind(self, blocks: "_BigBlocks", offset: int) -> None:
        """Other data behind the end mark mean that tars were joined with 'cat', or that a hole swallowed members."""
        end_mark = offset
        while block := blocks.read(offset, _BLOCK_BYTES, up_to=True):
            if block.count(0) != len(block):
                raise UserError(
                    f"{self.path}: the archive ends at byte {end_mark}, but other data follow: either tars were "
                    "joined with 'cat' or the file is damaged; repack the folder into one tar with 'tar -chf'"
                )
            offset += len(block)


class _Extended:
    """What GNU and PAX headers say about the member that follows them."""

    def __init__(self) -> None:
        self.long_name = self.long_link = ""
        self.pax: dict[str, str] = {}
        self.used = False


class _BigBlocks:
    """Bytes of a file by offset, fetched in big blocks: one request serves many small members."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._begin = 0
        self._block = b""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read(self, offset: int, size: int, up_to: bool = False) -> bytes:
        """`size` bytes, fewer only at the end of the file (or, with `up_to`, what the present block still holds)."""
        at = offset - self._begin
        held = len(self._block) - at
        if at < 0 or (held < size and not (up_to and held > 0)):
            gap = offset - (self._begin + len(self._block))
            block_bytes = _BLOCK_BYTES if gap < _BLOCK_BYTES else _SHORT_BLOCK_BYTES
            self._block = read_at(self._descriptor, max(size, block_bytes), offset)
            self._begin, at = offset, 0
        return self._block[at : at + size]


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes at `offset`; fewer only at the end of the file (one pread may return less on a network disk)."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
        content += more
    return content


def _is_header(record: bytes) -> bool:
    """Whether bytes are a tar header by their own checksum (unsigned, or signed as old tars summed)."""
    if len(record) < RECORD:
        return False
    claimed = number(record[148:156])
    unsigned = sum(record) - sum(record[148:156]) + 8 * ord(" ")
    if claimed == unsigned:
        return True
    high_bytes = sum(byte > 127 for byte in record[:148] + record[156:])
    return claimed == unsigned - 256 * high_bytes


def number(field: bytes) -> int | None:
    """A number field: octal text, or base-256 when the first bit is set. None when it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    text = field.partition(b"\0")[0].strip()
    if not text:
        return 0
    return int(text, 8) if text.isdigit() and b"8" not in text and b"9" not in text else None


def _skipped_kind(header: Header) -> str:
    """Under which heading a member is passed over; empty for files that count."""
    if header.kind == _DIRECTORY:
        return "directories"
    if header.kind == _SYMBOLIC_LINK:
        return "symbolic links"
    if header.kind not in _REGULAR and header.kind != _HARD_LINK:
        return "special files"
    return "macOS companions (._)" if basename(header.path).startswith("._") else ""


def _name_of(record: bytes) -> str:
    name = _text(record[:100])
    if record[257:263] == b"ustar\0" and record[345] != 0:  # GNU's magic ends in a blank: no prefix there
        return f"{_text(record[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    return _decoded(field.partition(b"\0")[0])


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // RECORD) * RECORD


def _shown(path: str) -> str:
    """A path as it can be printed anywhere."""
    return f"'{printable(path)}'"
