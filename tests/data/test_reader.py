import errno
import json
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pathfm.__main__ import main
from pathfm.data import cohorts, fit, reader
from pathfm.data.concat import ConcatRequest, concat
from pathfm.data.datasets import Pathology, PathologyFoundation, open_dataset
from pathfm.data.entries import open_entries, read_cohort_indices, write_cohort_indices
from pathfm.data.index import IndexRequest, build_index
from pathfm.errors import UserError


def test_every_sample_has_its_bytes_name_and_label(tiles_root, tile):
    dataset = open_dataset(f"Pathology:root={tiles_root}")
    assert len(dataset) == 23
    for sample in range(23):
        assert dataset.read_bytes(sample) == tile(sample)
        assert dataset.name_of(sample) == f"{sample:02}.png"
        assert dataset.label(sample) == 0


def test_a_subset_may_lie_in_another_folder(tiles_root, tmp_path, tile):
    (tmp_path / "keep.txt").write_text("03.png\n11.png\n")
    tar = tiles_root / "pretrain_dataset.tar"
    build_index(IndexRequest(tar, tmp_path / "extra", "pretrain", "train", keep=tmp_path / "keep.txt"))
    dataset = open_dataset(f"Pathology:root={tiles_root}:extra={tmp_path / 'extra'}:subset=train")
    assert [dataset.read_bytes(n) for n in range(len(dataset))] == [tile(3), tile(11)]
    assert dataset.name_of(1) == "11.png"


def test_the_ancestors_files_are_read_with_a_warning(golden_dir, warnings_logged):
    dataset = Pathology(golden_dir / "tar_npy", subset="train")
    content = (golden_dir / "tar_npy" / "pretrain_dataset.tar").read_bytes()
    recorded = np.load(golden_dir / "tar_npy" / "pretrain_entries_train.npy")
    kept = (golden_dir / "tar_npy" / "train.txt").read_text().split()
    for sample, (_, _, start, end) in enumerate(recorded.tolist()):
        assert dataset.read_bytes(sample) == content[start:end]
    assert sorted(dataset.name_of(n) for n in range(len(dataset))) == sorted(kept)
    assert any("pretrain_index_train.json is not there" in message for message in warnings_logged)


@pytest.mark.parametrize("count_from", [0, 1])
def test_a_subsets_names_are_right_wherever_old_files_count_from(tiles_root, tile, count_from):
    """Names and entries of the tiles 3, 4 and 11; names count from 1, entries from 0 or from 1."""
    names = np.array({n + 1: f"{n:02}.png" for n in range(23)}, dtype=object)
    np.save(tiles_root / "pretrain_file_indices.npy", names, allow_pickle=True)
    entries = np.load(tiles_root / "pretrain_entries.npy")[[3, 4, 11]]
    entries[:, 1] += np.uint64(count_from)
    np.save(tiles_root / "pretrain_entries_few.npy", entries)
    dataset = Pathology(tiles_root, subset="few")
    assert [dataset.name_of(n) for n in range(3)] == ["03.png", "04.png", "11.png"]


def test_the_npy_of_names_is_not_needed(tiles_root, tile):
    (tiles_root / "pretrain_file_indices.npy").unlink()
    dataset = Pathology(tiles_root)
    assert (dataset.read_bytes(2), dataset.name_of(2)) == (tile(2), "02.png")


def test_long_names_and_sizes_in_pax_records_are_understood(tmp_path):
    names = [f"{'slide' * 40}/{n}{'n' * 150}.png" for n in range(3)]
    with (tmp_path / "pretrain_dataset.tar").open("wb") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.pax_headers = {"size": "4"}  # the plain header says 0, as it does beyond 8 GiB
            tar.write(member.tobuf(tarfile.PAX_FORMAT) + b"tile".ljust(512, b"\0"))
        tar.write(bytes(1024))
    build_index(IndexRequest(tmp_path / "pretrain_dataset.tar", tmp_path, "pretrain"))
    dataset = Pathology(tmp_path)
    assert [dataset.read_bytes(n) for n in range(3)] == [b"tile"] * 3
    assert [dataset.name_of(n) for n in range(3)] == [name.rpartition("/")[2] for name in names]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("pretrain_dataset.tar", "pathfm pack FOLDER --name pretrain --output .*"),
        ("pretrain_entries.npy", "pathfm index --tarball_path .* --name pretrain"),
    ],
)
def test_a_missing_file_is_named_with_the_command_that_makes_it(tiles_root, missing, message):
    (tiles_root / missing).unlink()
    with pytest.raises(UserError, match=rf"{missing}; make it with: {message}"):
        Pathology(tiles_root)


def test_the_commands_that_are_advised_make_what_is_missing(tiles_root, tmp_path, tile, capsys):
    folder = tmp_path / "my tiles"
    folder.mkdir()
    (folder / "a.png").write_bytes(tile(0))
    index = ["pretrain_entries.npy", "pretrain_index.json"]
    for missing in (["pretrain_dataset.tar"], index[:1], index):
        for name in missing:
            (tiles_root / name).unlink()
        with pytest.raises(UserError) as caught:
            Pathology(tiles_root)
        advice = re.search(r"make it with: pathfm (.*), or set", str(caught.value))
        assert main([str(folder) if word == "FOLDER" else word for word in shlex.split(advice[1])]) == 0
        assert len(Pathology(tiles_root)) == 1


def test_a_subset_is_advised_to_be_made_as_its_side_car_says_it_was(tiles_root, tmp_path):
    (tmp_path / "my list.txt").write_text("03.png\n11.png\n")
    tar = tiles_root / "pretrain_dataset.tar"
    command = ["index", "--tarball_path", str(tar), "--output_root", str(tiles_root), "--name", "pretrain"]
    assert main([*command, "--suffix", "few", "--keep", str(tmp_path / "my list.txt")]) == 0
    (tiles_root / "pretrain_entries_few.npy").unlink()
    with pytest.raises(UserError, match=rf"make it with: pathfm index .* --keep '{tmp_path}/my list.txt', or set"):
        Pathology(tiles_root, subset="few")
    (tiles_root / "pretrain_index_few.json").unlink()
    with pytest.raises(UserError, match=r"make it with: pathfm index .* --suffix few --keep LIST, or set"):
        Pathology(tiles_root, subset="few")


def test_the_index_of_another_tar_is_refused(tiles_root, write_tar, tile):
    write_tar(tiles_root / "pretrain_dataset.tar", {f"{n}.png": tile(n) for n in range(40)})
    with pytest.raises(UserError, match=r"index of another tar: .* had \d+ bytes.*pathfm index"):
        Pathology(tiles_root)


def test_the_index_of_another_tar_is_noticed_without_a_side_car(tiles_root, write_tar):
    (tiles_root / "pretrain_index.json").unlink()
    write_tar(tiles_root / "pretrain_dataset.tar", {f"{n}.png": b"x" * 700 * n for n in range(40)})
    with pytest.raises(UserError, match=r"index of another tar: row \d+ says bytes"):
        Pathology(tiles_root)


def test_a_tar_of_the_same_size_in_another_order_is_noticed(tiles_root, write_tar):
    write_tar(tiles_root / "pretrain_dataset.tar", {f"{n}": b"x" * (513 + n) for n in range(23)})
    build_index(IndexRequest(tiles_root / "pretrain_dataset.tar", tiles_root, "pretrain"))
    write_tar(tiles_root / "pretrain_dataset.tar", {f"{n}": b"x" * (513 + n) for n in reversed(range(23))})
    with pytest.raises(UserError, match="index of another tar: row"):
        Pathology(tiles_root)


def test_a_truncated_tar_is_refused(tiles_root):
    side_car = tiles_root / "pretrain_index.json"
    os.truncate(tiles_root / "pretrain_dataset.tar", 9000)
    with pytest.raises(UserError, match="index of another tar"):
        Pathology(tiles_root)
    side_car.unlink()
    with pytest.raises(UserError, match=r"reaches to byte \d+, but .* ends at byte 9000"):
        Pathology(tiles_root)


def test_a_copied_tar_is_read_with_a_warning(tiles_root, warnings_logged):
    os.utime(tiles_root / "pretrain_dataset.tar", (1, 1))
    Pathology(tiles_root)
    assert "not as old as its index says" in warnings_logged[0]


def test_rows_that_the_side_car_does_not_count_are_refused(tiles_root):
    side_car = json.loads((tiles_root / "pretrain_index.json").read_text())
    (tiles_root / "pretrain_index.json").write_text(json.dumps({**side_car, "num_entries": 22}))
    with pytest.raises(UserError, match="has 23 rows, but its side-car counts 22"):
        Pathology(tiles_root)


def test_an_index_of_nothing_is_refused(tiles_root):
    np.save(tiles_root / "pretrain_entries.npy", np.zeros((0, 4), np.uint64))
    with pytest.raises(UserError, match="lists no samples"):
        Pathology(tiles_root)


def test_a_tar_that_is_cut_while_it_is_read_is_an_error_and_no_crash(tiles_root):
    dataset = Pathology(tiles_root)
    dataset.read_bytes(0)
    os.truncate(tiles_root / "pretrain_dataset.tar", 2000)
    with pytest.raises(UserError, match=r"was cut while it was read: sample 22 should end at byte \d+"):
        dataset.read_bytes(22)


def test_a_tar_that_was_replaced_before_the_first_read_is_noticed(tiles_root, write_tar):
    dataset = Pathology(tiles_root)
    write_tar(tiles_root / "pretrain_dataset.tar", {"a.png": b"a"})
    with pytest.raises(UserError, match="changed since"):
        dataset.read_bytes(0)


@pytest.mark.parametrize("read", [Pathology.read_bytes, Pathology.name_of, lambda data, row: data.will_need([row])])
def test_a_tar_that_vanished_is_named(tiles_root, read):
    dataset = Pathology(tiles_root)
    (tiles_root / "pretrain_dataset.tar").unlink()
    with pytest.raises(UserError, match=r"pretrain_dataset.tar"):
        read(dataset, 0)


def test_a_disk_that_fails_is_one_line_that_names_the_tar(tiles_root, monkeypatch):
    dataset = Pathology(tiles_root)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(UserError, match=r"^cannot read .*pretrain_dataset.tar: Input/output error$"):
        dataset.read_bytes(0)
    with pytest.raises(UserError, match=r"^cannot read the tars of .*pretrain_entries.npy: Input/output error$"):
        Pathology(tiles_root)


def test_a_data_set_travels_by_pickle_without_its_files(tiles_root, tile):
    dataset = Pathology(tiles_root)
    dataset.read_bytes(0)
    dataset.name_of(0)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1500
    assert pickle.loads(pickled).read_bytes(7) == tile(7)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_other_processes_read_the_same_bytes(tiles_root, tile, method):
    dataset = Pathology(tiles_root)
    dataset.read_bytes(0)
    with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as pool:  # ends without a signal, unlike Pool
        assert list(pool.map(dataset.read_bytes, range(23))) == [tile(n) for n in range(23)]


def test_hard_links_are_samples_with_their_targets_bytes(tmp_path):
    if not shutil.which("tar"):
        pytest.skip("there is no tar command")
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "a.png").write_bytes(b"first")
    os.link(tmp_path / "tiles" / "a.png", tmp_path / "tiles" / "b.png")
    os.system(f"tar -chf {tmp_path}/pretrain_dataset.tar -C {tmp_path} tiles")
    build_index(IndexRequest(tmp_path / "pretrain_dataset.tar", tmp_path, "pretrain"))
    dataset = Pathology(tmp_path)
    assert [dataset.read_bytes(n) for n in range(2)] == [b"first", b"first"]
    target = dataset.name_of(0)
    assert target in ("a.png", "b.png")
    assert dataset.name_of(1) == target
    assert len(open_entries(tmp_path / "pretrain_entries.npy")) == 2


# ---- many tars, many rows


@pytest.fixture
def many_cohorts(tmp_path, write_tar, tile):
    """Twelve cohorts of two tiles each."""
    for number in range(12):
        tar = write_tar(tmp_path / f"c{number:02}.tar", {f"{n}.png": tile(2 * number + n) for n in range(2)})
        build_index(IndexRequest(tar, tmp_path, tar.stem))
    concat(ConcatRequest(tmp_path, tmp_path))
    return tmp_path


def open_descriptors():
    return sum(Path(f"/proc/self/fd/{fd}").resolve().suffix == ".tar" for fd in os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted by /proc")
def test_however_many_cohorts_only_some_tars_are_open(many_cohorts, tile, monkeypatch):
    monkeypatch.setattr(reader, "_MAX_OPEN_TARS", 5)
    dataset = PathologyFoundation(many_cohorts)
    assert open_descriptors() == 0
    for row in [*range(24), *reversed(range(24)), *range(0, 24, 5)]:
        dataset.will_need([row])
        assert dataset.read_bytes(row) == tile(row)
        assert open_descriptors() <= 5
    del dataset
    assert open_descriptors() == 0


def test_the_tar_that_was_read_last_stays_open(many_cohorts, monkeypatch):
    monkeypatch.setattr(reader, "_MAX_OPEN_TARS", 2)
    opened = []
    monkeypatch.setattr(reader, "_OpenTar", lambda tar, make=reader._OpenTar: (opened.append(tar.stem), make(tar))[1])
    dataset = PathologyFoundation(many_cohorts)
    for cohort in (0, 1, 0, 2, 0, 1):
        dataset.read_bytes(2 * cohort)
    assert opened == ["c00", "c01", "c02", "c01"]


def test_every_cohorts_tar_is_checked(many_cohorts):
    (many_cohorts / "pretrain_index.json").unlink()
    os.truncate(many_cohorts / "c07.tar", 700)
    with pytest.raises(UserError, match=r"reaches to byte \d+, but .*c07.tar ends at byte 700"):
        PathologyFoundation(many_cohorts)
    (many_cohorts / "c07.tar").unlink()
    with pytest.raises(UserError, match=r"no tar .*c07.tar; make it with: pathfm pack FOLDER --name c07 --cohort"):
        PathologyFoundation(many_cohorts)


def test_tars_that_were_copied_are_one_warning(many_cohorts, warnings_logged):
    for number in range(12):
        os.utime(many_cohorts / f"c{number:02}.tar", (1, 1))
    PathologyFoundation(many_cohorts)
    (message,) = warnings_logged
    assert re.search(r"not as old as its index says.*c00.tar, .*c09.tar and 2 more$", message)


def test_a_cohorts_tar_that_changed_since_it_was_concatenated_is_refused(many_cohorts):
    os.truncate(many_cohorts / "c03.tar", 20480)
    with pytest.raises(UserError, match=r"c03.tar had \d+ bytes, .* has 20480; make the index again: pathfm concat"):
        PathologyFoundation(many_cohorts)


def rewritten(root, change):
    """The concatenated entries changed, without the side-car that would notice it."""
    entries = np.load(root / "pretrain_entries.npy")
    np.save(root / "pretrain_entries.npy", change(entries))
    (root / "pretrain_index.json").unlink()


@pytest.mark.parametrize(
    ("order", "row"), [([*range(2, 24), 0, 1], 22), ([0, 2, 1, *range(3, 24)], 2)], ids=["moved", "mixed"]
)
def test_rows_that_are_not_sorted_by_cohort_are_refused(many_cohorts, order, row):
    rewritten(many_cohorts, lambda entries: entries[order])
    with pytest.raises(UserError, match=rf"is not sorted by cohort: row {row} of cohort 0 .*pathfm concat"):
        PathologyFoundation(many_cohorts)


def test_unsorted_rows_of_a_big_index_are_refused_when_they_are_read(many_cohorts, monkeypatch):
    """No one looks at all rows of a big index, but every row that is read is one of its cohort's."""
    monkeypatch.setattr(cohorts, "FULL_CHECK_ROWS", 3)
    monkeypatch.setattr(fit, "_MAX_SPOT_CHECKS", 0)
    rewritten(many_cohorts, lambda entries: entries[[0, 5, 2, 3, 4, 1, *range(6, 24)]])
    with pytest.raises(UserError, match="is not sorted by cohort: row"):
        PathologyFoundation(many_cohorts).read_bytes(1)


@pytest.mark.parametrize("place", [(9000, 8000), (2**63 + 512, 2**63 + 600), (512, 10**9)])
def test_a_damaged_row_of_a_big_index_is_refused_when_it_is_read(many_cohorts, monkeypatch, place):
    monkeypatch.setattr(fit, "FULL_CHECK_ROWS", 3)

    def damage(entries):
        entries[0, 2:4] = place
        return entries

    monkeypatch.setattr(fit, "_MAX_SPOT_CHECKS", 0)
    rewritten(many_cohorts, damage)
    dataset = PathologyFoundation(many_cohorts)
    for read in (dataset.read_bytes, dataset.name_of, lambda row: dataset.will_need([row])):
        with pytest.raises(
            UserError, match=r"row 0 is bytes \d+ to \d+, which .*c00.tar has not; make the index again"
        ):
            read(0)


def test_cohorts_without_a_name_are_refused(many_cohorts):
    names = read_cohort_indices(many_cohorts / "cohort_indices.npy")
    write_cohort_indices(many_cohorts / "cohort_indices.npy", names[:11])
    (many_cohorts / "pretrain_index.json").unlink()
    with pytest.raises(UserError, match="row 22 is of cohort 11, but only 11 cohorts have names"):
        PathologyFoundation(many_cohorts)


def test_names_of_another_concatenation_are_refused(many_cohorts):
    names = read_cohort_indices(many_cohorts / "cohort_indices.npy")
    write_cohort_indices(many_cohorts / "cohort_indices.npy", names[::-1])
    with pytest.raises(UserError, match=r"cohort_indices.npy names other cohorts \(c11, .*than .*pretrain_index.json"):
        PathologyFoundation(many_cohorts)


def test_a_cohort_without_rows_needs_no_tar(many_cohorts):
    rewritten(many_cohorts, lambda entries: entries[entries[:, 4] != 4])
    (many_cohorts / "c04.tar").unlink()
    dataset = PathologyFoundation(many_cohorts)
    assert dataset.cohorts["c04"] == range(8, 8)
    assert dataset.cohorts["c05"] == range(8, 10)


@pytest.mark.parametrize("missing", ["pretrain_entries.npy", "cohort_indices.npy"])
def test_what_is_missing_of_a_concatenation_is_named_with_the_command_that_makes_it(many_cohorts, missing):
    (many_cohorts / missing).unlink()
    (many_cohorts / "pretrain_index.json").unlink()
    with pytest.raises(UserError, match=rf"no index .*{missing}; make it with: pathfm concat --root {many_cohorts} "):
        PathologyFoundation(many_cohorts)


def sparse_entries(path, num_rows, columns):
    """An index of zeros that takes no room on disk; returns the first rows, to be written."""
    with path.open("wb") as file:
        shape = {"descr": "<u8", "fortran_order": False, "shape": (num_rows, columns)}
        np.lib.format.write_array_header_1_0(file, shape)
        file.truncate(file.tell() + num_rows * columns * 8)
    return np.load(path, mmap_mode="r+")


def resident_bytes(path):
    """How much of a mapped file this process has touched."""
    sizes = Path("/proc/self/smaps").read_text().split("VmFlags")
    return sum(1024 * int(re.search(r"Rss: +(\d+) kB", part)[1]) for part in sizes if str(path) in part)


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="touched pages are counted by /proc")
@pytest.mark.parametrize("num_rows", [10**6 + 1, 10**8])
def test_opening_touches_no_more_of_a_bigger_index(tmp_path, write_tar, tile, num_rows):
    """300 cohorts; a sparse index of 4 GB. A sorted column is found by bisection, whatever lies between its edges."""
    tar = write_tar(tmp_path / "one.tar", {"a.png": tile(0)})
    names = [f"c{n:03}" for n in range(300)]
    for name in names:
        (tmp_path / f"{name}.tar").symlink_to(tar)
    write_cohort_indices(tmp_path / "cohort_indices.npy", names)
    rows = sparse_entries(tmp_path / "pretrain_entries.npy", num_rows, 5)
    rows[-300:, 4] = range(300)  # the others are of cohort 0
    rows[-300:, 2:4] = rows[0, 2:4] = 512, 512 + len(tile(0))
    del rows
    dataset = PathologyFoundation(tmp_path)
    assert dataset.cohorts["c000"] == range(num_rows - 299)
    assert dataset.cohorts["c299"] == range(num_rows - 1, num_rows)
    assert dataset.read_bytes(num_rows - 1) == tile(0)
    assert resident_bytes(tmp_path / "pretrain_entries.npy") < 8e6  # the kernel maps some pages around each touched one
