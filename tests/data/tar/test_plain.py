import tarfile
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pathfm.data.tar import walk as tar_walk
from pathfm.data.tar.plain import PlainMembers
from pathfm.data.tar.walk import TarWalk
from pathfm.errors import UserError
from tests.data.tar.archives import by_tarfile, mixed_archives, regular, special, summed, walked

block_bytes = st.integers(1, 40).map(lambda records: 512 * records)
far_bytes = st.sampled_from([0, 2000, 1 << 40])  # between headers: read alone almost always, at times, never
decisive_bytes = st.sampled_from([0, 99, 124, 134, 135, 148, 153, 154, 155, 156, 257, 262, 345, 511])
telling_values = st.sampled_from(b"\0 019xLg/u\xff")
quickly = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def outcome(path, block_bytes=1 << 20):
    """What a walk finds and skips, or its last words."""
    walk = TarWalk(path, block_bytes)
    try:
        return walked(walk), walk.skipped
    except UserError as error:
        return str(error)


def outcome_one_by_one(path):
    """The oracle: no header is taken for a plain one."""
    with patch.object(PlainMembers, "run_from", lambda self, offset: None):
        return outcome(path)


@settings(max_examples=100, **quickly)
@given(content=mixed_archives(), block_bytes=block_bytes, far_bytes=far_bytes)
def test_plain_headers_at_once_and_all_headers_one_by_one_agree_with_tarfile(tmp_path, content, block_bytes, far_bytes):
    path = tmp_path / "random.tar"
    path.write_bytes(content)
    with patch.object(tar_walk, "_FAR_BYTES", far_bytes):
        found = outcome(path, block_bytes)
    assert found == outcome_one_by_one(path)
    assert found[0] == by_tarfile(path)


@settings(max_examples=100, **quickly)
@given(content=mixed_archives(), block_bytes=block_bytes, far_bytes=far_bytes, data=st.data())
def test_an_archive_that_is_cut_anywhere_is_taken_or_refused_alike_both_ways(
    tmp_path, content, block_bytes, far_bytes, data
):
    path = tmp_path / "cut.tar"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with patch.object(tar_walk, "_FAR_BYTES", far_bytes):
        found = outcome(path, block_bytes)
    assert found == outcome_one_by_one(path)


@pytest.mark.parametrize("far_bytes", [0, 1 << 40])
def test_a_small_archive_that_is_cut_at_any_byte_is_refused_alike_both_ways(tmp_path, far_bytes):
    content = b"".join([whole("a.jpg", 1.25), whole("b.jpg" * 40), whole("c.jpg", 1.25)])
    path = tmp_path / "cut.tar"
    for cut in range(0, len(content), 64):
        path.write_bytes(content[:cut])
        with patch.object(tar_walk, "_FAR_BYTES", far_bytes):
            found = outcome(path, block_bytes=1536)
        assert isinstance(found, str)
        assert found == outcome_one_by_one(path)


@settings(max_examples=200, **quickly)
@given(
    style=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    damage=st.dictionaries(decisive_bytes, telling_values, max_size=3),
    is_summed=st.booleans(),
    is_extended=st.booleans(),
)
def test_a_damaged_header_between_two_whole_ones_is_taken_or_refused_alike_both_ways(
    tmp_path, style, damage, is_summed, is_extended
):
    odd, _ = regular("odd.jpg")
    odd.mtime = 1.25 * is_extended
    *extended, header = records_of(odd.tobuf(style))
    header = bytearray(header)
    for at, value in damage.items():
        header[at] = value
    path = tmp_path / "damaged.tar"
    path.write_bytes(b"".join([whole("a.jpg"), *extended, summed(header) if is_summed else header, bytes(512)]))
    with path.open("ab") as file:
        file.write(whole("b.jpg") + bytes(1024))
    assert outcome(path) == outcome_one_by_one(path)


pax_texts = st.sampled_from(
    [
        b"27 mtime=1700000000.123456\n",
        b"18 atime=17000000\n",
        b"10 ctime=\n",
        b"12 comment=x\n",
        b"13 comment=x\n",
        b"14 path=q.jpg\n",
        b"15 path=q.jpg\n",
        b"16 path=._q.jpg\n",
        b"10 size=5\n",
        b"8 path=\n",
        b"18 mtime=1.2\n",
        b"24 GNU.sparse.major=1.0\n",
        b"07 mtime=1.25\n",
        b"mtime=1.25\n",
        b"\0",
        b"14 mtime=1.25",
        b"12 mtime=1.2\n",
    ]
)


@settings(max_examples=300, **quickly)
@given(texts=st.lists(pax_texts, min_size=1, max_size=4), kind=st.sampled_from(b"xL"), extra=st.integers(-3, 3))
@example(texts=[b"12 mtime=1.2\n"], kind=ord("x"), extra=-1)
def test_whatever_an_extended_header_says_is_understood_alike_both_ways(tmp_path, texts, kind, extra):
    text = b"".join(texts)
    extended = tarfile.TarInfo("extended")
    extended.type, extended.size = bytes([kind]), len(text) + extra
    path = tmp_path / "extended.tar"
    behind = text.ljust(512, b"\0") + whole("b.jpg") + whole("c.jpg") + bytes(1024)
    path.write_bytes(whole("a.jpg") + extended.tobuf(tarfile.GNU_FORMAT) + behind)
    assert outcome(path) == outcome_one_by_one(path)


def test_an_extended_header_without_text_belongs_to_whatever_follows_it(tmp_path):
    folder = special("folder", tarfile.DIRTYPE)[0].tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "t.tar"
    path.write_bytes(whole("a.jpg") + extending(0) + folder + whole("b.jpg") + bytes(1024))
    assert outcome(path) == outcome_one_by_one(path)
    assert [place.path for place in walked(path)] == ["a.jpg", "b.jpg"]


def test_a_header_within_the_text_of_an_extended_header_is_no_member(tmp_path):
    text = b"1030 comment=".ljust(512, b".") + whole("within.jpg")[:517] + b"\n"
    path = tmp_path / "t.tar"
    path.write_bytes(extending(1030) + text.ljust(1536, b"\0") + whole("a.jpg") + bytes(1024))
    assert [place.path for place in walked(path)] == ["a.jpg"]


def extending(size: int) -> bytes:
    """The header of a PAX text of this many bytes."""
    extended = tarfile.TarInfo("extended")
    extended.type, extended.size = tarfile.XHDTYPE, size
    return extended.tobuf(tarfile.GNU_FORMAT)


def records_of(headers: bytes) -> list[bytes]:
    return [headers[at : at + 512] for at in range(0, len(headers), 512)]


def whole(name: str, mtime: float = 0) -> bytes:
    """A small member, headers and data; a time with a fraction needs an extended header."""
    member, content = regular(name)
    member.mtime = mtime
    return member.tobuf(tarfile.PAX_FORMAT) + content.ljust(512, b"\0")
