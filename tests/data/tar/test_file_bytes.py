import os
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathfm.data.tar.file_bytes import TarBytes, read_at


@pytest.fixture(params=["in memory", "on the disk"])
def place(request, monkeypatch):
    """Where the bytes lie: the kernel says of none that it is in memory, or of all."""
    whole_preadv = os.preadv

    def preadv(descriptor, buffers, offset, flags=0):
        if flags and request.param == "on the disk":
            raise BlockingIOError
        return whole_preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=5000),
    block_bytes=st.integers(1, 2000),
    reads=st.lists(st.tuples(st.booleans(), st.integers(0, 6000), st.integers(1, 3000)), max_size=8),
)
def test_bytes_are_those_of_the_file_wherever_they_lie(tmp_path, place, content, block_bytes, reads):
    (tmp_path / "f").write_bytes(content)
    with (tmp_path / "f").open("rb") as file:
        tar = TarBytes(file.fileno(), block_bytes)
        for is_block, offset, size in sorted(reads, key=lambda read: read[1]):
            if is_block:
                assert bytes(tar.block_from(offset)) == content[offset : offset + block_bytes]
            assert tar.read(offset, size) == content[offset : offset + size]
            assert read_at(file.fileno(), size, offset) == content[offset : offset + size]


@pytest.fixture
def requests(tmp_path, monkeypatch):
    """What is asked of the disk when blocks at 0, 1 and 2 MB and then a record at 50 MB are read, 4 MB ahead."""
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, offset, size, advice: asked.append((offset, offset + size)))
    path = tmp_path / "f"
    path.touch()
    os.truncate(path, 100 << 20)
    with path.open("rb") as file:
        tar = TarBytes(file.fileno(), 1 << 20, ahead_bytes=4 << 20)
        for offset in (0, 1 << 20, 2 << 20):
            tar.block_from(offset)
        tar.read(50 << 20, 512)
    return asked


@pytest.mark.parametrize("place", ["on the disk"], indirect=True)
def test_the_disk_is_asked_ahead_of_the_reading_and_not_across_big_jumps(place, requests):
    *ahead, last = requests
    assert (ahead[0][0], ahead[-1][1]) == (0, 7 << 20)
    assert all(end == begin for (_, end), (begin, _) in pairwise(ahead))
    assert last == (50 << 20, (50 << 20) + (128 << 10))


@pytest.mark.parametrize("place", ["in memory"], indirect=True)
def test_nothing_is_asked_for_what_is_in_memory(place, requests):
    assert requests == []
