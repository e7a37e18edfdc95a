import bz2
import gzip
import lzma
import os
import shutil
import subprocess
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pathfm.data.tar.walk import TarWalk
from pathfm.errors import UserError
from tests.data.tar.archives import (
    FORMATS,
    archive,
    by_tarfile,
    long_paths,
    random_members,
    regular,
    short_ascii,
    special,
    walked,
)


@pytest.mark.parametrize("style", ["gnu", "pax"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=random_members(long_paths))
def test_random_archives_with_long_names_agree_with_tarfile(tmp_path, style, members):
    path = archive(tmp_path / "random.tar", members, format=FORMATS[style])
    assert walked(path) == by_tarfile(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=random_members(short_ascii))
def test_random_ustar_archives_agree_with_tarfile(tmp_path, members):
    path = archive(tmp_path / "random.tar", members, format=tarfile.USTAR_FORMAT)
    assert walked(path) == by_tarfile(path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.binary(max_size=1500), min_size=1, max_size=4), data=st.data())
def test_a_tar_that_is_cut_anywhere_before_its_end_mark_is_refused(tmp_path, contents, data):
    whole = archive(tmp_path / "whole.tar", [regular(f"{n}.jpg", content) for n, content in enumerate(contents)])
    end_mark = -(-walked(whole)[-1].end_offset // 512) * 512
    cut = data.draw(st.integers(1, end_mark + 511))
    path = tmp_path / "cut.tar"
    path.write_bytes(whole.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"truncated, or still being written|not a tar"):
        walked(path)
    path.write_bytes(whole.read_bytes()[: end_mark + 512])
    assert walked(path) == walked(whole)


@pytest.mark.parametrize("cut", [1028, 1280, 1536])
def test_a_tar_that_ends_behind_a_member_names_it_and_what_to_do(tmp_path, cut):
    path = archive(tmp_path / "t.tar", [regular("a.jpg", b"a" * 516), regular("b.jpg")])
    os.truncate(path, cut)
    with pytest.raises(UserError, match=rf"{cut} \(behind member 'a.jpg'\), without the zeros.*wait until it is"):
        walked(path)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=random_members(long_paths), style=st.sampled_from(["gnu", "pax"]))
def test_every_members_header_is_found_from_where_its_bytes_begin(tmp_path, members, style):
    walk = TarWalk(archive(tmp_path / "random.tar", members, format=FORMATS[style]))
    with tarfile.open(walk.path) as tar:
        for member in tar:
            found = walk.header_of(member.offset_data)
            assert (found.path, found.end_offset - found.start_offset) == (member.name, member.size * member.isreg())
            assert walk.header_of(member.offset_data + 256) is None


def test_the_prefix_field_of_ustar_is_part_of_the_path(tmp_path):
    name = "/".join(["folder" * 5] * 4) + "/tile.jpg"
    path = archive(tmp_path / "ustar.tar", [regular(name)], format=tarfile.USTAR_FORMAT)
    assert walked(path)[0].path == name


@pytest.mark.parametrize("style", ["gnu", "pax"])
def test_members_beyond_eight_gigabytes_are_stepped_over(tmp_path, style):
    size = (8 << 30) + 513
    huge = tarfile.TarInfo("huge.tif")
    huge.size = size
    header = huge.tobuf(FORMATS[style])
    small = archive(tmp_path / "small.tar", [regular("small.jpg")]).read_bytes()
    path = tmp_path / "huge.tar"
    with path.open("wb") as file:
        file.write(header)
        file.seek(len(header) + -(-size // 512) * 512)
        file.write(small)
    members = walked(path)
    assert [member.path for member in members] == ["huge.tif", "small.jpg"]
    assert members[0].end_offset - members[0].start_offset == size
    with path.open("rb") as file:
        file.seek(members[1].start_offset)
        assert file.read(4) == b"tile"


def test_members_larger_than_a_block_and_tiny_ones_are_found_alike(tmp_path):
    contents = [b"a" * 5_000_000, b"b", b"c" * 3_000_000, b"", b"d" * 4_200_000] + [b"e" * 9000] * 600
    path = archive(tmp_path / "mixed.tar", [regular(f"{n}.jpg", content) for n, content in enumerate(contents)])
    assert walked(path) == by_tarfile(path)


def test_global_pax_headers_apply_until_a_member_says_otherwise(tmp_path):
    path = archive(tmp_path / "g.tar", [regular("a.jpg"), regular("b.jpg")], pax_headers={"comment": "scanner 3"})
    assert [member.path for member in walked(path)] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("said", [{"path": "same.jpg"}, {"size": "3"}])
def test_what_a_global_pax_header_says_of_all_members_goes_before_their_own_headers(tmp_path, said):
    path = archive(tmp_path / "g.tar", [regular("a.jpg"), regular("b.jpg")], pax_headers=said)
    assert walked(path) == by_tarfile(path)


def test_an_empty_pax_value_gives_back_what_the_header_says(tmp_path):
    (member, content) = regular("a.jpg")
    member.pax_headers = {"path": "", "size": ""}
    path = archive(tmp_path / "g.tar", [(member, content)])
    assert walked(path) == [("a.jpg", 1536, 1540)]


def test_names_that_are_no_utf8_survive(tmp_path):
    path = archive(tmp_path / "latin.tar", [regular("t\udce4.jpg")], format=tarfile.GNU_FORMAT)
    assert walked(path)[0].path == "t\udce4.jpg"


def test_what_is_skipped_is_counted(tmp_path):
    members = [
        special("tiles", tarfile.DIRTYPE),
        regular("tiles/a.jpg"),
        regular("tiles/._a.jpg"),
        special("tiles/link.jpg", tarfile.SYMTYPE, "a.jpg"),
        special("tiles/pipe", tarfile.FIFOTYPE),
    ]
    walk = TarWalk(archive(tmp_path / "t.tar", members))
    assert [member.path for member in walked(walk)] == ["tiles/a.jpg"]
    assert walk.skipped == {
        "directories": 1,
        "macOS companions (._)": 1,
        "symbolic links": 1,
        "special files": 1,
    }


def test_a_hard_link_means_the_latest_file_of_its_name_before_it(tmp_path):
    link = special("b", tarfile.LNKTYPE, "./a")
    members = [regular("a", b"old"), regular("a", b"newer"), link, regular("a", b"last")]
    path = archive(tmp_path / "t.tar", members)
    found = walked(path)[2]
    assert (found.path, path.read_bytes()[found.start_offset : found.end_offset]) == ("b", b"newer")


def test_a_hard_link_to_nothing_is_refused(tmp_path):
    path = archive(tmp_path / "t.tar", [special("b.jpg", tarfile.LNKTYPE, "a.jpg"), regular("a.jpg")])
    with pytest.raises(UserError, match=r"'b.jpg' at byte 0 is a hard link to 'a.jpg'.*tar -chf"):
        walked(path)


def test_a_hard_link_to_a_symbolic_link_is_skipped_with_it(tmp_path):
    members = [special("s", tarfile.SYMTYPE, "x"), special("b", tarfile.LNKTYPE, "s"), regular("a")]
    walk = TarWalk(archive(tmp_path / "t.tar", members))
    assert [member.path for member in walked(walk)] == ["a"]
    assert walk.skipped == {"symbolic links": 2}


@pytest.mark.skipif(not shutil.which("tar"), reason="there is no tar command")
def test_archives_of_the_tar_command_agree_with_tarfile(tmp_path):
    folder = tmp_path / "tiles"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"a" * 700)
    os.link(folder / "a.jpg", folder / "deep" / "again.jpg")
    os.symlink(folder / "a.jpg", folder / "link.jpg")
    (folder / ("long" * 40 + ".jpg")).write_bytes(b"b")
    for options in ([], ["--format=pax"], ["--format=v7", "--exclude=long*"]):
        path = tmp_path / "t.tar"
        subprocess.run(["tar", *options, "-chf", path, "-C", tmp_path, "tiles"], check=True, capture_output=True)
        assert walked(path) == by_tarfile(path)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, lambda _: b"\x28\xb5\x2f\xfd" * 200])
def test_compressed_tars_are_refused(tmp_path, compress):
    path = archive(tmp_path / "t.tar", [regular("a.jpg")])
    path.write_bytes(compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"t.tar is \w+-compressed .*byte 0.*tar -chf"):
        walked(path)


@pytest.mark.parametrize("style", ["gnu type", "pax keys"])
def test_sparse_members_are_refused_by_name(tmp_path, style):
    member, content = regular("holes.tif")
    if style == "gnu type":
        member.type = tarfile.GNUTYPE_SPARSE
        path = archive(tmp_path / "t.tar", [regular("a.jpg"), (member, content)], format=tarfile.GNU_FORMAT)
    else:
        member.name = "GNUSparseFile.1/holes.tif"
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "holes.tif", "GNU.sparse.realsize": "99"}
        path = archive(tmp_path / "t.tar", [regular("a.jpg"), (member, content)])
    with pytest.raises(UserError, match=r"'holes.tif' at byte \d+ is sparse"):
        walked(path)


def test_a_damaged_header_is_named_by_byte_and_by_the_member_before_it(tmp_path):
    path = archive(tmp_path / "t.tar", [regular("a.jpg"), regular("b.jpg")])
    content = bytearray(path.read_bytes())
    content[1024 + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged.*byte 1024 \(behind member 'a.jpg'\)"):
        walked(path)


def test_an_extended_header_without_end_is_refused_unread(tmp_path):
    member = tarfile.TarInfo("PaxHeaders/a.jpg")
    member.type, member.size = tarfile.XHDTYPE, 1 << 32
    (tmp_path / "t.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tmp_path / "t.tar", 1 << 33)
    with pytest.raises(UserError, match=r"damaged: the header at byte 0 has 4294967296 bytes of text"):
        walked(tmp_path / "t.tar")


def test_tars_joined_with_cat_are_refused(tmp_path):
    path = archive(tmp_path / "t.tar", [regular("a.jpg")])
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match="ends at byte 1024, but other data follow"):
        walked(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"\xff\xd8\xff\xe0" * 300, "not a tar"), (b"short", "not a tar")],
)
def test_what_is_no_tar_is_refused(tmp_path, content, message):
    path = tmp_path / "t.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        walked(path)


def test_a_missing_tar_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*nowhere.tar"):
        TarWalk(tmp_path / "nowhere.tar")


def test_an_archive_of_nothing_is_walked(tmp_path):
    assert walked(archive(tmp_path / "t.tar", [])) == []
