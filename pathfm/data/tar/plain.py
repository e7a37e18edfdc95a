"""Plain tar headers by the thousand: sizes, checksums and names of a whole stretch of a tar at once.

Plain is a regular file of the usual formats (ustar, GNU, PAX), alone or behind one short extended header that gives its
path or nothing that matters. All else is passed over here and left to `headers`, which knows it, one at a time.
"""

from typing import NamedTuple

import numpy as np

from pathfm.data.tar.headers import (
    FILE,
    GNU_LONG_NAME,
    PAX_MEMBER,
    RECORD,
    alters_bytes,
    is_companion,
    name_of,
    padded,
    pax_records,
    text_of,
)

# N records, H headers, E extended headers of them, M plain members. Numbers are octal digits and an end.
_FIELDS = np.dtype(
    {
        "names": ["name", "size", "checksum", "kind", "magic", "format", "prefix"],
        "formats": ["S100", ("u1", 12), ("u1", 8), "u1", "S5", "u1", "u1"],
        "offsets": [0, 124, 148, 156, 257, 262, 345],
        "itemsize": RECORD,
    }
)
_FILE, _LONG_NAME, _PAX = ord(FILE), ord(GNU_LONG_NAME), ord(PAX_MEMBER)
_BLANK, _ZERO, _NEWLINE = b" 0\n"
_TIME, _TIMES = np.frombuffer(b"time=", np.uint8), np.frombuffer(b"mac", np.uint8)  # mtime, atime, ctime


class Members(NamedTuple):
    """Regular files of a tar, in tar order; the bytes of member i are [start_offsets[i], end_offsets[i]) of the tar."""

    paths: list[str]
    start_offsets: np.ndarray  # int64 [M]
    end_offsets: np.ndarray

    @property
    def last_path(self) -> str:
        return self.paths[-1]

    @property
    def next_offset(self) -> int:
        """Where the header behind the last member begins."""
        return padded(int(self.end_offsets[-1]))

    def without_companions(self) -> "Members":
        """Those that are no macOS companions of others."""
        if "._" not in "\0".join(self.paths):  # one look at all is quicker than one at each
            return self
        rows = [row for row, path in enumerate(self.paths) if not is_companion(path)]
        return Members([self.paths[row] for row in rows], self.start_offsets[rows], self.end_offsets[rows])


class PlainMembers:
    """The plain members in a stretch of a tar, and where they follow each other with nothing else between.

    What merely looks like a member, as a tar within the tar does, is here too, but nothing leads to it.
    """

    def __init__(self, members: Members, first_headers: np.ndarray, until: int) -> None:
        """`first_headers` [M]: where each member's own or extended header begins, ascending; all are before `until`."""
        self.until = until
        self._members = members
        self._first_headers = first_headers
        self._next_headers = -(-members.end_offsets // RECORD) * RECORD
        self._run_ends = np.append(np.flatnonzero(self._next_headers[:-1] != first_headers[1:]) + 1, len(first_headers))

    @property
    def mean_distance_bytes(self) -> float:
        """From one header to the next."""
        return float((self._next_headers - self._first_headers).mean()) if len(self._first_headers) else 0.0

    def run_from(self, offset: int) -> Members | None:
        """The members from the header at `offset` on, up to the first thing that is no plain member."""
        begin = int(self._first_headers.searchsorted(offset))
        if begin == len(self._first_headers) or self._first_headers[begin] != offset:
            return None
        end = int(self._run_ends[self._run_ends.searchsorted(begin, side="right")])
        paths, start_offsets, end_offsets = self._members
        return Members(paths[begin:end], start_offsets[begin:end], end_offsets[begin:end])


def plain_members(records: np.ndarray, offsets: np.ndarray, tar_size_bytes: int) -> PlainMembers:
    """The plain members whose headers are among records [N, 512] uint8, which begin at byte `offsets` [N] of a tar."""
    headers = _headers_among(records, offsets)
    paths = _own_paths(headers.fields)
    first_headers = headers.offsets.copy()
    extended, path_of = _extended_files(records, headers)
    first_headers[extended] = headers.offsets[extended - 1]
    for row, path in path_of.items():
        paths[row] = path or paths[row]
    starts = headers.offsets + RECORD
    ends = starts + headers.sizes
    plain = np.flatnonzero((headers.fields["kind"] == _FILE) & (ends <= tar_size_bytes) & ~_end_in_slashes(paths))
    if len(plain) < len(paths):
        paths = [paths[row] for row in plain.tolist()]
    until = int(offsets[-1]) + RECORD if len(offsets) else 0
    return PlainMembers(Members(paths, starts[plain], ends[plain]), first_headers[plain], until)


def size_on_trust(header: bytes | bytearray) -> int | None:
    """What bytes that should be a header, and that nobody has checked, say of its size; None: no octal number."""
    try:
        size = int(header[124:135], 8)
    except ValueError:
        return None
    return size if size >= 0 else None


def is_extended(header: bytes | bytearray) -> bool:
    """Whether this is an extended header of the kinds that a plain member may have."""
    return header[156] in (_LONG_NAME, _PAX)


class _Headers(NamedTuple):
    rows: np.ndarray  # int64 [H]: which records they are
    offsets: np.ndarray  # int64 [H]: where they begin in the tar
    fields: np.ndarray  # [H] of dtype _FIELDS
    sizes: np.ndarray  # int64 [H]: bytes of data


def _headers_among(records: np.ndarray, offsets: np.ndarray) -> _Headers:
    """The records [N, 512] that are headers of plain members, by magic, kind and checksum."""
    kinds = records.view(_FIELDS)[:, 0]["kind"]
    is_of_kind = (kinds == _FILE) | (kinds == _PAX) | (kinds == _LONG_NAME)
    rows = np.flatnonzero(is_of_kind & (records.view(_FIELDS)[:, 0]["magic"] == b"ustar"))
    headers = records[rows]
    fields = headers.view(_FIELDS)[:, 0]
    checksum, size = fields["checksum"], fields["size"]
    # The sum is of all bytes, the checksum's own counted as blanks.
    sums = headers.sum(axis=1, dtype=np.uint32) - checksum.sum(axis=1, dtype=np.uint32) + checksum.shape[1] * _BLANK
    sizes = _octal(size[:, :-1])
    valid = (sums == _octal(checksum[:, :6])) & (checksum[:, 6] == 0)
    valid &= (sizes >= 0) & ((size[:, -1] == 0) | (size[:, -1] == _BLANK))
    found = _Headers(rows, offsets[rows], fields, sizes)
    return found if valid.all() else _Headers(*(column[valid] for column in found))


def _octal(digits: np.ndarray) -> np.ndarray:
    """The numbers [H] that octal digits [H, D] say; -1 where something else stands there."""
    values = digits - np.uint8(_ZERO)  # wraps around: what is below '0' is far above 7
    powers = 8.0 ** np.arange(digits.shape[1])[::-1]  # floats multiply faster, and 11 digits are exact in them
    return np.where((values < 8).all(axis=1), values @ powers, -1).astype(np.int64)


def _own_paths(fields: np.ndarray) -> list[str]:
    """The paths that headers [H] give by themselves."""
    names = fields["name"].tolist()
    joined = b"\0".join(names)
    if joined.count(0) >= max(len(names), 1):  # something stands behind the zero that ends a name
        joined = b"\0".join(name.partition(b"\0")[0] for name in names)
    paths = joined.decode("utf-8", "surrogateescape").split("\0") if names else []
    for row in np.flatnonzero((fields["format"] == 0) & (fields["prefix"] != 0)).tolist():
        paths[row] = name_of(fields[row].tobytes())
    return paths


def _extended_files(records: np.ndarray, headers: _Headers) -> tuple[np.ndarray, dict[int, str | None]]:
    """Which headers [H] are of files right behind an extended header that was understood, and the paths it gave."""
    is_file = headers.fields["kind"] == _FILE
    is_next = (np.diff(headers.rows) == 2) & (np.diff(headers.offsets) == 2 * RECORD)  # behind one record of text
    fits = (headers.sizes > 0) & (headers.sizes <= RECORD)
    extending = np.flatnonzero(~is_file[:-1] & fits[:-1] & is_next & is_file[1:])
    if not len(extending):
        return extending, {}
    texts, sizes = records[headers.rows[extending] + 1], headers.sizes[extending]
    is_pax = headers.fields["kind"][extending] == _PAX
    understood = is_pax & _tell_times(texts, sizes)
    others = np.flatnonzero(~understood)
    columns = is_pax[others], texts[others].view(f"S{RECORD}")[:, 0], sizes[others]
    paths = [_path_said(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    understood[others] = [path is not None for path in paths]
    return extending[understood] + 1, dict(zip((extending[others] + 1).tolist(), paths, strict=True))


def _path_said(is_pax: bool, record: bytes, size: int) -> str | None:
    """The path that an extended header's text gives its member, '' for none; None: it says more than this."""
    if not is_pax:
        return text_of(record[:size])
    pax = pax_records(record[:size])
    return None if pax is None or alters_bytes(pax) else pax.get("path", "")


def _tell_times(texts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which PAX texts [E, 512] hold times alone, bool [E]: up to three records such as '27 mtime=1700000000.25\\n'.

    Python's tarfile and 'tar --format=pax' write them for every member.
    """
    each = np.arange(len(texts))
    at = np.zeros(len(texts), np.int64)
    for _ in _TIMES:
        begin = texts[each[:, None], np.minimum(at[:, None] + np.arange(9), RECORD - 1)]
        tens, ones = (begin[:, :2] - np.uint8(_ZERO)).T
        end = at + 10 * tens.astype(np.int64) + ones
        is_time = (tens > 0) & (tens < 10) & (ones < 10)
        is_time &= (begin[:, 2] == _BLANK) & np.isin(begin[:, 3], _TIMES) & (begin[:, 4:] == _TIME).all(axis=1)
        is_time &= texts[each, np.minimum(end, RECORD) - 1] == _NEWLINE
        at = np.where(is_time, end, at)
        if (at == sizes).all():
            break
    return at == sizes


def _end_in_slashes(paths: list[str]) -> np.ndarray:
    """Which paths [H] are written as those of directories are."""
    if "/\0" not in "\0".join(paths) + "\0":  # one look at all is quicker than one at each
        return np.zeros(len(paths), bool)
    return np.array([path.endswith("/") for path in paths])
