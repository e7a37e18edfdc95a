"""What tar headers say, one member at a time, however odd: GNU and PAX extensions, old tars, and what is wrong."""

from collections.abc import Mapping
from pathlib import Path
from posixpath import basename
from typing import NamedTuple, NoReturn

from pathfm.data.entries import printable
from pathfm.data.tar.file_bytes import TarBytes
from pathfm.errors import UserError

RECORD = 512  # bytes; headers are one record long, data are padded to whole records
_MOST_TEXT_BYTES = 64 << 20  # of an extended header; real ones are of a few hundred
_TAIL_BYTES = 1 << 20  # what follows the end mark is looked through in pieces of this

FILE, _OLD_FILE, _CONTIGUOUS_FILE = b"0", b"\0", b"7"
HARD_LINK, SYMBOLIC_LINK, DIRECTORY = b"1", b"2", b"5"
GNU_LONG_NAME, _GNU_LONG_LINK, _GNU_SPARSE, _GNU_CONTINUED = b"L", b"K", b"S", b"M"
PAX_MEMBER, _PAX_SOLARIS, _PAX_GLOBAL = b"x", b"X", b"g"
REGULAR = (FILE, _OLD_FILE, _CONTIGUOUS_FILE)
_EXTENSIONS = (GNU_LONG_NAME, _GNU_LONG_LINK, PAX_MEMBER, _PAX_SOLARIS, _PAX_GLOBAL)
_WITHOUT_DATA = (HARD_LINK, SYMBOLIC_LINK, b"3", b"4", DIRECTORY, b"6")

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


class Header(NamedTuple):
    """What a tar says of a member, GNU and PAX extensions applied; its bytes are [start_offset, end_offset)."""

    kind: bytes
    path: str
    link: str
    offset: int  # of the header that precedes the data
    start_offset: int
    end_offset: int

    @property
    def last_path(self) -> str:
        return self.path

    @property
    def next_offset(self) -> int:
        """Where the header behind this member begins."""
        return padded(self.end_offset)


class HeaderReader:
    """Reads members of one tar in their order; raises `UserError` for what would make byte offsets wrong."""

    def __init__(self, path: Path, size_bytes: int, tar: TarBytes) -> None:
        self._path = path
        self._size_bytes = size_bytes
        self._tar = tar
        self._global_pax: dict[str, str] = {}  # what the tar has said so far of all members that follow

    @property
    def are_altered(self) -> bool:
        """Whether the tar has said of all members what otherwise their own headers say."""
        return "path" in self._global_pax or alters_bytes(self._global_pax)

    def member_at(self, offset: int, behind: str | None = None) -> Header | None:
        """The member whose first header, extended or not, is at `offset`; None where the archive ends.

        `behind`: the path of the member before, for messages.
        """
        extended = _Extended()
        while (record := self._record_at(offset, behind)) is not None:
            kind = record[156:157]
            start = offset + RECORD
            end = start + self._size_of(record, offset)
            if kind not in _EXTENSIONS:
                return self._extended_header(extended, record, offset, end)
            self._demand_bytes_until(end, offset, "an extended header")
            if end - start > _MOST_TEXT_BYTES:
                raise UserError(f"{self._path} is damaged: the header at byte {offset} has {end - start} bytes of text")
            self._extend(extended, kind, self._tar.read(start, end - start), offset)
            offset = padded(end)
        if extended.used:
            raise UserError(f"{self._path}: the tar ends at byte {offset}, between an extended header and its member")
        self._demand_nothing_behind(offset)
        return None

    def _extended_header(self, extended: "_Extended", record: bytes, offset: int, end: int) -> Header:
        kind = record[156:157]
        pax = {**self._global_pax, **extended.pax}
        path = pax.get("path") or extended.long_name or name_of(record)
        link = pax.get("linkpath") or extended.long_link or text_of(record[157:257])
        if kind == _OLD_FILE and path.endswith("/"):
            kind = DIRECTORY  # as tars from before 1988 say it
        self._refuse_pieces(kind, pax, path, offset)
        start = offset + RECORD
        if pax.get("size"):
            end = start + self._pax_size(pax["size"], offset)
        if kind in _WITHOUT_DATA:
            end = start
        self._demand_bytes_until(end, offset, f"member {shown(path)}")
        return Header(kind, path.rstrip("/"), link, offset, start, end)

    def _record_at(self, offset: int, behind: str | None) -> bytes | None:
        """The header at `offset`, checked; None at the zeros that end an archive."""
        record = self._tar.read(offset, RECORD)
        if is_header(record):
            return record
        if record == bytes(RECORD):
            return None
        if offset == 0:
            self._refuse_as_no_tar(record)
        member = f" (behind member {shown(behind)})" if behind is not None else ""
        if len(record) < RECORD:
            raise UserError(
                f"{self._path} {_CUT}: it ends at byte {self._size_bytes}{member}, "
                f"without the zeros that end every tar; {_MEND_CUT}"
            )
        raise UserError(
            f"{self._path} is damaged: there is no valid tar header at byte {offset}{member}; copy or make it again"
        )

    def _refuse_as_no_tar(self, record: bytes) -> NoReturn:
        path = self._path
        for magic, what in _COMPRESSIONS.items():
            if record.startswith(magic):
                raise UserError(
                    f"{path} is {what} (byte 0 of member 0), so byte offsets into it mean nothing; "
                    f"unpack it and make a plain tar with 'tar -chf {path.stem.removesuffix('.tar')}.tar folder'"
                )
        if not record:
            raise UserError(f"{path} is empty (0 bytes); make it again with 'tar -chf {path.name} folder'")
        raise UserError(f"{path} is not a tar file: there is no valid tar header at byte 0")

    def _refuse_pieces(self, kind: bytes, pax: dict[str, str], path: str, offset: int) -> None:
        if kind == _GNU_SPARSE or _is_sparse(pax):
            path = pax.get("GNU.sparse.name") or path  # that of its header is made up
            raise UserError(
                f"{self._path}: member {shown(path)} at byte {offset} is sparse, so its bytes are not in one piece; "
                "repack the folder with 'tar -chf' without --sparse"
            )
        if kind == _GNU_CONTINUED:
            raise UserError(
                f"{self._path}: member {shown(path)} at byte {offset} continues another volume; join the volumes first"
            )

    def _extend(self, extended: "_Extended", kind: bytes, content: bytes, offset: int) -> None:
        extended.used = extended.used or kind != _PAX_GLOBAL
        if kind == GNU_LONG_NAME:
            extended.long_name = text_of(content)
        elif kind == _GNU_LONG_LINK:
            extended.long_link = text_of(content)
        elif (records := pax_records(content)) is None:
            raise UserError(f"{self._path} is damaged: the PAX header at byte {offset} cannot be read")
        else:
            (self._global_pax if kind == _PAX_GLOBAL else extended.pax).update(records)

    def _size_of(self, record: bytes, offset: int) -> int:
        size = number(record[124:136])
        if size is None or size < 0:
            raise UserError(f"{self._path} is damaged: the header at byte {offset} does not say how long its member is")
        return size

    def _pax_size(self, text: str, offset: int) -> int:
        if not (text.isascii() and text.isdigit()):
            raise UserError(f"{self._path} is damaged: the member at byte {offset} claims a size of {shown(text)}")
        return int(text)

    def _demand_bytes_until(self, end: int, offset: int, what: str) -> None:
        if end > self._size_bytes:
            raise UserError(
                f"{self._path} {_CUT}: {what}, whose header is at byte {offset}, should end at byte {end}, "
                f"but the file ends at byte {self._size_bytes}; {_MEND_CUT}"
            )

    def _demand_nothing_behind(self, end_mark: int) -> None:
        """Other data behind the end mark mean that tars were joined with 'cat', or that a hole swallowed members."""
        offset = end_mark
        while tail := self._tar.read(offset, _TAIL_BYTES):
            if tail.count(0) != len(tail):
                raise UserError(
                    f"{self._path}: the archive ends at byte {end_mark}, but other data follow: either tars were "
                    "joined with 'cat' or the file is damaged; repack the folder into one tar with 'tar -chf'"
                )
            offset += len(tail)


class _Extended:
    """What GNU and PAX headers say about the member that follows them."""

    def __init__(self) -> None:
        self.long_name = self.long_link = ""
        self.pax: dict[str, str] = {}
        self.used = False


def is_header(record: bytes) -> bool:
    """Whether bytes are a tar header by their own checksum (unsigned, or signed as old tars summed)."""
    if len(record) < RECORD:
        return False
    claimed = number(record[148:156])
    if claimed is None:
        return False
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


def pax_records(content: bytes) -> dict[str, str] | None:
    """Records 'LENGTH key=value\\n' of a PAX header, a key to its value, which is empty to take an earlier one back.

    None when they cannot be read.
    """
    records = {}
    at = 0
    while at < len(content) and content[at] != 0:
        length_text, space, _ = content[at : at + 20].partition(b" ")
        length = int(length_text) if space and length_text.isdigit() else 0
        record = content[at + len(length_text) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if not equals or at + length > len(content) or not record.endswith(b"\n"):
            return None
        records[_decoded(key)] = _decoded(value[:-1])
        at += length
    return records


def alters_bytes(pax: Mapping[str, str]) -> bool:
    """Whether PAX records say other things of a member's bytes than its header does."""
    return "size" in pax or _is_sparse(pax)


def _is_sparse(pax: Mapping[str, str]) -> bool:
    return any(key.startswith("GNU.sparse.") for key in pax)


def name_of(record: bytes) -> str:
    """The path that a header gives by itself."""
    name = text_of(record[:100])
    if record[257:263] == b"ustar\0" and record[345] != 0:  # GNU's magic ends in a blank: no prefix there
        return f"{text_of(record[345:500])}/{name}"
    return name


def text_of(field: bytes) -> str:
    """The text of a field, up to its first zero."""
    return _decoded(field.partition(b"\0")[0])


def is_companion(path: str) -> bool:
    """Whether this is a macOS companion of a file, which holds its resource fork."""
    return basename(path).startswith("._")


def padded(size: int) -> int:
    """Rounded up to whole records."""
    return -(-size // RECORD) * RECORD


def shown(path: str) -> str:
    """A path as it can be printed anywhere."""
    return f"'{printable(path)}'"


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
