"""Every kind of planted damage is found and named, and a whole data set has nothing said against it."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pathfm.data import cohorts
from pathfm.data.concat import ConcatRequest, concat
from pathfm.data.datasets import Pathology
from pathfm.data.decode import decode
from pathfm.data.index import IndexRequest, build_index
from pathfm.data.verification import samples as verified_samples
from pathfm.data.verification.findings import Check
from pathfm.data.verification.rows import check_rows
from pathfm.data.verification.slides import SlideNames
from pathfm.data.verification.verify import Verification, VerifyRequest, verify
from pathfm.errors import UserError

NUM_TILES = 100  # more than what is compared with its headers when a data set is opened


def found(*texts: str, num_decoded: int | None = None, slide: str | None = None) -> Verification:
    return verify(VerifyRequest(texts, num_decoded, SlideNames(slide), lambda dataset: decode))


def not_well(verification: Verification) -> list[tuple[str, str]]:
    return [(c.name, c.verdict) for checks in verification.checks.values() for c in checks if c.verdict != "ok"]


def the_check(verification: Verification, name: str) -> Check:
    (check,) = [c for checks in verification.checks.values() for c in checks if c.name == name and c.verdict != "ok"]
    return check


@pytest.fixture
def pack_tiles(write_tar, tile) -> Callable[..., Path]:
    """An indexed tar of tiles `{tar}_{n:02}.png`; `instead` replaces the content of some."""

    def pack(tar: Path, name: str, instead: dict[int, bytes] | None = None, number: int = NUM_TILES) -> Path:
        first = 1000 * sum(map(ord, tar.stem))  # tiles of different tars differ
        contents = {f"tiles/{tar.stem}_{n:02}.png": (instead or {}).get(n) or tile(first + n) for n in range(number)}
        write_tar(tar, contents)
        build_index(IndexRequest(tar, tar.parent, name))
        return tar

    return pack


@pytest.fixture
def root(tmp_path, pack_tiles) -> Path:
    pack_tiles(tmp_path / "pretrain_dataset.tar", "pretrain")
    return tmp_path


@pytest.fixture
def two_cohorts(tmp_path, pack_tiles) -> Path:
    folder = tmp_path / "cohorts"
    pack_tiles(folder / "brca.tar", "brca")
    pack_tiles(folder / "luad.tar", "luad", number=60)
    concat(ConcatRequest(folder, folder))
    return folder


def change_entries(path: Path, change: Callable[[np.ndarray], None]) -> None:
    entries = np.load(path)
    change(entries)
    np.save(path, entries)


def test_a_whole_data_set_has_nothing_said_against_it(root, two_cohorts):
    for text in (f"Pathology:root={root}", f"PathologyFoundation:root={two_cohorts}"):
        verification = found(text)
        assert not_well(verification) == []
        assert verification.verdict == "ok"


def test_an_offset_that_is_wrong_is_found_and_its_file_named(root):
    change_entries(root / "pretrain_entries.npy", lambda entries: entries.__setitem__((42, 2), entries[42, 2] + 512))
    verification = found(f"Pathology:root={root}")
    check = the_check(verification, "offsets")
    assert (check.verdict, verification.verdict) == ("damage", "damage")
    assert "cohort pretrain: 1 of 100 rows" in check.said
    assert len(check.cases) == 1
    assert check.cases[0].startswith("row 42 says bytes ")
    assert "its file pretrain_dataset_42.png is bytes " in check.cases[0]
    assert ("decoding", "damage") not in not_well(verification)  # what is known to be no file is not read


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(row=st.integers(0, NUM_TILES - 1), column=st.sampled_from([2, 3]), shift=st.integers(1, 2**63))
@example(row=59, column=2, shift=9_223_372_036_854_723_072)
def test_whatever_offset_is_changed_by_whatever_it_is_damage(root, row, column, shift):
    whole = np.load(root / "pretrain_entries.npy")

    def change(entries: np.ndarray) -> None:
        entries[row, column] += np.uint64(shift)

    change_entries(root / "pretrain_entries.npy", change)
    try:
        assert found(f"Pathology:root={root}", num_decoded=0).verdict == "damage"
    finally:
        np.save(root / "pretrain_entries.npy", whole)


def test_an_image_that_cannot_be_decoded_is_named_with_cohort_and_reason(two_cohorts, pack_tiles, tile):
    pack_tiles(two_cohorts / "luad.tar", "luad", {7: tile(1)[:60]}, number=60)
    concat(ConcatRequest(two_cohorts, two_cohorts))
    check = the_check(found(f"PathologyFoundation:root={two_cohorts}"), "decoding")
    assert check.verdict == "damage"
    assert check.said == "cohort luad: 1 cannot be decoded (160 of 160 samples read)"
    assert check.cases[0].startswith("luad_07.png (row 107): ")


def test_as_many_samples_are_read_as_are_asked_for(root):
    for number, said in ((0, ""), (10, "10 of 100 samples read"), (None, "100 of 100 samples read")):
        (checks,) = found(f"Pathology:root={root}", num_decoded=number).checks.values()
        assert "".join(c.said.partition(",")[0] for c in checks if c.name == "decoding") == said


def test_an_image_that_is_there_twice_is_named_with_its_copy(root, pack_tiles, tile):
    pack_tiles(root / "pretrain_dataset.tar", "pretrain", dict.fromkeys((3, 90, 91, 92), tile(1)))
    verification = found(f"Pathology:root={root}")
    assert not_well(verification) == [("duplicates", "warning")]
    check = the_check(verification, "duplicates")
    assert check.said == "3 of the 100 samples read are copies of another one"
    named = [f"pretrain_dataset_{row:02}.png (row {row})" for row in (3, 90, 91)]
    assert check.cases == (" = ".join(named) + " and 1 more",)


def test_large_samples_are_read_few_at_a_time_with_the_same_findings(root, pack_tiles, tile, monkeypatch):
    pack_tiles(root / "pretrain_dataset.tar", "pretrain", {3: tile(1), 50: tile(2), 60: tile(2), 90: tile(1)})
    expected = found(f"Pathology:root={root}")
    monkeypatch.setattr(verified_samples, "_BYTES_AHEAD", 3 * len(tile(1)))
    at_once = []

    def will_need(dataset, samples, announce=Pathology.will_need):
        at_once.append(len(samples))
        announce(dataset, samples)

    monkeypatch.setattr(Pathology, "will_need", will_need)
    assert found(f"Pathology:root={root}") == expected
    assert max(at_once) <= 4
    assert sum(at_once) == NUM_TILES
    (first, second) = the_check(expected, "duplicates").cases
    assert {first[-8:-1], second[-8:-1]} == {"(row 90", "(row 60"}


def test_a_row_that_is_listed_twice_is_warned_of(root):
    def repeat(entries: np.ndarray) -> None:
        entries[50] = entries[51]

    change_entries(root / "pretrain_entries.npy", repeat)
    check = the_check(found(f"Pathology:root={root}", num_decoded=0), "rows")
    assert check.said.startswith("cohort pretrain: 1 of 100 rows are the bytes of another one")


def test_file_indices_from_one_are_those_of_old_files_and_other_ones_are_warned_of(root):
    def count_from_one(entries: np.ndarray) -> None:
        entries[:, 1] += 1

    change_entries(root / "pretrain_entries.npy", count_from_one)
    assert not_well(found(f"Pathology:root={root}")) == []

    def exchange(entries: np.ndarray) -> None:
        entries[[0, 9], 1] = entries[[9, 0], 1]

    change_entries(root / "pretrain_entries.npy", exchange)
    check = the_check(found(f"Pathology:root={root}"), "rows")
    assert check.verdict == "warning"
    assert "2 of 100 file indices count another file" in check.said


@pytest.mark.parametrize("tiles", [NUM_TILES, NUM_TILES - 1])
def test_a_tar_that_was_replaced_is_damage(root, write_tar, tile, tiles):
    """By another of its size, whose files begin elsewhere, and by a shorter one."""
    tar = root / "pretrain_dataset.tar"
    contents = {f"tiles/{n}.png": tile(n) for n in range(tiles)}
    contents["tiles/0.png"] += bytes(512)
    os.replace(write_tar(root / "other.tar", contents), tar)
    verification = found(f"Pathology:root={root}")
    assert verification.verdict == "damage"
    (check,) = verification.checks[f"Pathology:root={root}"]
    assert (check.name, check.verdict) == ("index", "damage")
    assert "is the index of another tar" in check.said


def test_a_tar_that_was_touched_since_is_warned_of_and_so_is_a_missing_side_car(root, warnings_logged):
    os.utime(root / "pretrain_dataset.tar", (1, 1))
    assert not_well(found(f"Pathology:root={root}")) == [("index", "warning")]
    (root / "pretrain_index.json").unlink()
    check = the_check(found(f"Pathology:root={root}"), "index")
    assert "pretrain_index.json is not there" in check.said
    assert warnings_logged == []  # they are in the table


def test_a_tar_whose_headers_are_damaged_between_the_samples_is_damage(root):
    tar = root / "pretrain_dataset.tar"
    content = bytearray(tar.read_bytes())
    at = int(np.load(root / "pretrain_entries.npy")[42, 2]) - 400
    content[at] ^= 255
    tar.write_bytes(content)
    verification = found(f"Pathology:root={root}", num_decoded=0)
    assert verification.verdict == "damage"
    assert "there is no valid tar header at byte" in str(verification.checks)


def test_a_disk_that_fails_is_damage_of_the_tar_not_an_end_without_findings(root, monkeypatch):
    dataset = Pathology(root)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    (check,) = check_rows(dataset).checks
    assert (check.verdict, check.said) == (
        "damage",
        f"cohort pretrain: cannot read {root}/pretrain_dataset.tar: Input/output error",
    )


def test_bad_sectors_are_samples_that_cannot_be_decoded(root, monkeypatch):
    def read(dataset, sample, read_bytes=Pathology.read_bytes):
        if sample in (7, 70):
            raise UserError("cannot read the.tar: Input/output error")
        return read_bytes(dataset, sample)

    monkeypatch.setattr(Pathology, "read_bytes", read)
    verification = found(f"Pathology:root={root}")
    assert not_well(verification) == [("decoding", "damage")]
    assert the_check(verification, "decoding").cases == (
        "pretrain_dataset_07.png (row 7): cannot read the.tar: Input/output error",
        "pretrain_dataset_70.png (row 70): cannot read the.tar: Input/output error",
    )


def test_rows_of_a_wrong_cohort_are_damage_with_a_side_car_or_without(two_cohorts):
    def move_the_border(entries: np.ndarray) -> None:
        entries[99, 4] = 1

    change_entries(two_cohorts / "pretrain_entries.npy", move_the_border)
    text = f"PathologyFoundation:root={two_cohorts}"
    assert the_check(found(text), "index").verdict == "damage"
    (two_cohorts / "pretrain_index.json").unlink()
    check = the_check(found(text), "index")
    assert check.verdict == "damage"
    assert f"{two_cohorts / 'luad.tar'} ends at byte" in check.said


def test_rows_among_those_of_another_cohort_are_found_in_an_index_too_large_to_look_at_when_opened(
    two_cohorts, monkeypatch
):
    monkeypatch.setattr(cohorts, "FULL_CHECK_ROWS", 10)

    def mislabel(entries: np.ndarray) -> None:
        entries[42, 4] = 1

    change_entries(two_cohorts / "pretrain_entries.npy", mislabel)
    check = the_check(found(f"PathologyFoundation:root={two_cohorts}"), "offsets")
    assert "cohort brca: 1 of 100 rows" in check.said
    assert check.cases[0].startswith("row 42 ")


@pytest.fixture
def make_splits(tmp_path, write_tar, tile) -> Callable[..., tuple[str, str]]:
    """A KNN data set of 3 slides of 4 tiles each; returns the strings of its splits."""

    def make(query: list[str], test: list[str], contents: dict[str, bytes] | None = None) -> tuple[str, str]:
        names = [f"slide_{slide}_{x}_0.png" for slide in range(3) for x in range(4)]
        tiles = {name: tile(n) for n, name in enumerate(names)} | (contents or {})
        tar = write_tar(tmp_path / "downstream_dataset.tar", {f"tiles/{name}": tiles[name] for name in names})
        rows = [f"{name},{5 * int(name[6])},kind {name[6]}" for name in names]
        (tmp_path / "labels.csv").write_text("filename,label,class\n" + "\n".join(rows) + "\n")
        for split, slides in (("query", query), ("test", test)):
            (tmp_path / "keep.txt").write_text("\n".join(name for name in names if name.startswith(tuple(slides))))
            build_index(IndexRequest(tar, tmp_path, split, keep=tmp_path / "keep.txt", csv=tmp_path / "labels.csv"))
        return f"KNN:root={tmp_path}:split=query", f"KNN:root={tmp_path}:split=test"

    return make


def test_splits_that_share_nothing_have_nothing_said_about_what_they_share(make_splits):
    query, test = make_splits(["slide_0", "slide_1"], ["slide_2"])
    verification = found(query, test)
    assert [check.verdict for check in verification.checks[f"{query} and {test}"]] == ["ok", "ok"]
    slides, samples = (check.said for check in verification.checks[f"{query} and {test}"])
    assert slides == "none of 2 and 1 is in both (taken for a slide: 'slide_0' of slide_0_0_0.png)"
    assert samples == "none of the 8 and 4 samples read are in both"


def test_classes_are_counted_by_name_and_those_without_samples_warned_of(make_splits):
    query, _ = make_splits(["slide_0", "slide_1_1"], ["slide_2"])
    check = the_check(found(query), "labels")
    assert check.counts == {"kind 0": 4, "kind 1": 1, "kind 2": 0}
    assert (check.verdict, check.said, check.cases) == ("warning", "1 of 3 classes have no samples", ("kind 2",))


def test_a_slide_in_both_splits_is_leakage_and_named(make_splits):
    query, test = make_splits(["slide_0", "slide_1_0", "slide_1_1"], ["slide_1_2", "slide_1_3", "slide_2"])
    verification = found(query, test)
    assert verification.verdict == "leakage"
    check = the_check(verification, "slides")
    assert check.said.startswith("1 of 2 and 2 slides are in both")
    assert check.cases == ("slide_1: slide_1_0_0.png and slide_1_2_0.png",)
    assert ("bytes", "leakage") not in not_well(verification)
    assert found(query, test, slide=r"slide_\d+_\d+").verdict == "warning"  # so named, every tile is a slide of its own


def test_an_image_in_both_splits_is_leakage_whatever_it_is_called(make_splits, tile):
    query, test = make_splits(["slide_0", "slide_1"], ["slide_2"], {"slide_2_3_0.png": tile(5)})
    verification = found(query, test)
    assert verification.verdict == "leakage"
    check = the_check(verification, "bytes")
    assert check.said == "1 of the 8 and 4 samples read are in both"
    assert check.cases == ("slide_1_1_0.png = slide_2_3_0.png",)


def test_names_that_give_one_slide_for_all_say_nothing_about_leakage(tmp_path, write_tar, tile):
    for folder, first in (("a", 0), ("b", 50)):
        contents = {f"images/{n}.png": tile(n) for n in range(first, first + 5)}
        write_tar(tmp_path / folder / "pretrain_dataset.tar", contents)
        build_index(IndexRequest(tmp_path / folder / "pretrain_dataset.tar", tmp_path / folder, "pretrain"))
    verification = found(f"Pathology:root={tmp_path / 'a'}", f"Pathology:root={tmp_path / 'b'}")
    check = the_check(verification, "slides")
    assert (check.verdict, "--slide REGEX" in check.said) == ("warning", True)


def test_a_data_set_that_cannot_be_opened_is_damage_with_the_readers_own_line(tmp_path, root):
    moved = tmp_path / "moved"
    shutil.copytree(root, moved, ignore=shutil.ignore_patterns("moved"))
    (moved / "pretrain_dataset.tar").unlink()
    verification = found(f"Pathology:root={moved}", f"Pathology:root={root}")
    assert not_well(verification) == [("index", "damage")]
    assert the_check(verification, "index").said.startswith(f"there is no tar {moved}")
