"""Random archives as people and programs make them, and what Python's tarfile says of them."""

import io
import os
import tarfile
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

from pathfm.data.tar.walk import TarWalk

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
parts = st.text(st.characters(codec="utf-8", exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1)
paths = st.lists(parts.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3).map("/".join)
long_paths = st.builds(lambda path, repeat: f"{path}/{'lång name/' * repeat}x", paths, st.integers(0, 40))
short_ascii = st.from_regex(r"[a-z]{1,12}/[a-z0-9]{1,80}\.jpg", fullmatch=True)
no_utf8 = st.binary(min_size=1, max_size=60).map(
    lambda raw: raw.translate(None, b"/\0").decode("utf-8", "surrogateescape") + "~"
)
short_contents = st.binary(max_size=1500)
kinds = st.sampled_from(["file", "file", "file", "directory", "symlink", "hard link", "fifo", "companion"])
oddities = st.sampled_from(["", "", "", "", "v7", "signed checksum", "garbage", "blank behind size", "base 256"])
times = st.sampled_from([0, 0, 1_700_000_000.25, 1_700_000_000.123456789])


class Place(NamedTuple):
    """A file of a tar, and where its bytes are."""

    path: str
    start_offset: int
    end_offset: int


def walked(walk: Path | TarWalk) -> list[Place]:
    """All files of a tar as the walk finds them."""
    walk = walk if isinstance(walk, TarWalk) else TarWalk(walk)
    return [
        Place(*row)
        for members in walk
        for row in zip(members.paths, members.start_offsets.tolist(), members.end_offsets.tolist(), strict=True)
    ]


def by_tarfile(path: Path) -> list[Place]:
    """The oracle: Python's tarfile, hard links looked up among the members before them."""
    found: list[Place] = []
    places: dict[str, tuple[int, int] | None] = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            place = (member.offset_data, member.offset_data + member.size) if member.isreg() else None
            if member.islnk():
                place = places[os.path.normpath(member.linkname)]
            places[os.path.normpath(member.name)] = place
            if place is not None and not os.path.basename(member.name).startswith("._"):
                found.append(Place(member.name, *place))
    return found


def archive(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    return path


def regular(name: str, content: bytes = b"tile") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    return member, content


def special(name: str, kind: bytes, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member, b""


@st.composite
def random_members(draw, names, contents=short_contents):
    members = []
    for name in draw(st.lists(names, max_size=12)):
        kind = draw(kinds)
        files = [member.name for member, _ in members if member.isreg()]
        if kind == "hard link" and files:
            members.append(special(name, tarfile.LNKTYPE, draw(st.sampled_from(files))))
        elif kind == "symlink":
            members.append(special(name, tarfile.SYMTYPE, "elsewhere"))
        elif kind == "directory":
            members.append(special(name, tarfile.DIRTYPE))
        elif kind == "fifo":
            members.append(special(name, tarfile.FIFOTYPE))
        else:
            prefix, _, base = name.rpartition("/")
            name = f"{prefix}/._{base}" if kind == "companion" else name
            members.append(regular(name, draw(contents)))
    return members


@st.composite
def mixed_archives(draw):
    """The bytes of an archive whose members are of various formats and programs, and may be archives themselves."""
    inner = mixed_archives() if draw(st.booleans()) else st.nothing()
    contents = st.one_of(short_contents, st.integers(10_000, 60_000).map(bytes), inner)
    pieces = []
    for member, content in draw(random_members(st.one_of(short_ascii, short_ascii, long_paths, no_utf8), contents)):
        member.mtime = draw(times)
        style = "gnu" if not member.name.isprintable() else draw(st.sampled_from(["gnu", "pax"]))
        headers = member.tobuf(FORMATS[style], errors="surrogateescape")
        pieces += [headers[:-512], made_odd(headers[-512:], draw(oddities)), content, bytes(-len(content) % 512)]
    return b"".join(pieces) + bytes(1024)


def made_odd(header: bytes, oddity: str) -> bytes:
    """The same header as other programs write it."""
    fields = bytearray(header)
    if oddity == "v7" and not any(header[345:]):
        fields[257:265] = bytes(8)
    elif oddity == "garbage" and 0 in header[:99]:
        fields[header.index(0) + 1 : 100] = b"\xff" * (99 - header.index(0))
    elif oddity == "blank behind size":
        fields[135] = ord(" ")
    elif oddity == "base 256":
        fields[124:136] = b"\x80" + int(header[124:135], 8).to_bytes(11, "big")
    return summed(fields, signed=oddity == "signed checksum")


def summed(header: bytearray, signed: bool = False) -> bytes:
    """The header with the checksum that belongs to it."""
    header[148:156] = b" " * 8
    total = sum(header)
    below_zero = 256 * sum(byte > 127 for byte in header)
    header[148:156] = b"%06o\0 " % (total - below_zero if signed and below_zero < total else total)
    return bytes(header)
