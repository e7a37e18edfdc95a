import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathfm.data.tar.headers import number, pax_records


@given(st.integers(0, 8**11 - 1))
def test_octal_numbers_are_read(value):
    assert number(b"%011o\0" % value) == value
    assert number(b"%11o " % value) == value


@given(st.integers(0, 8**20))
def test_numbers_beyond_eight_gigabytes_are_read(value):
    assert number(b"\x80" + value.to_bytes(11, "big")) == value


@given(st.binary(min_size=12, max_size=12))
def test_any_field_is_a_number_or_none(field):
    value = number(field)
    assert value is None or isinstance(value, int)


@given(st.dictionaries(st.sampled_from(["path", "comment", "mtime"]), st.text(max_size=300)))
def test_pax_records_are_read_as_python_writes_them(records):
    member = tarfile.TarInfo("a.jpg")
    member.pax_headers = {key: value for key, value in records.items() if "\0" not in value}
    headers = member.tobuf(tarfile.PAX_FORMAT)
    text = headers[512:-512][: number(headers[124:136])] if len(headers) > 512 else b""
    assert pax_records(text) == member.pax_headers


@pytest.mark.parametrize("text", [b"8 path=a\n", b"11 path=a\n", b"path=a\n", b"7 path\n", b"10 path=ab", b"0 =\n"])
def test_pax_records_that_make_no_sense_are_none(text):
    assert pax_records(text) is None
