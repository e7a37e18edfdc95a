import json
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pytest

from pathfm.data.entries import open_entries
from pathfm.data.index import IndexRequest, build_index
from pathfm.data.pathology import Pathology, open_dataset
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


@pytest.mark.parametrize("entries_count_from", [0, 1])
def test_old_names_that_count_from_one_are_understood(tiles_root, entries_count_from):
    np.save(
        tiles_root / "pretrain_file_indices.npy",
        np.array({n + 1: f"{n:02}.png" for n in range(23)}, dtype=object),
        allow_pickle=True,
    )
    entries = np.load(tiles_root / "pretrain_entries.npy")
    entries[:, 1] += np.uint64(entries_count_from)
    np.save(tiles_root / "pretrain_entries.npy", entries)
    assert Pathology(tiles_root).name_of(5) == "05.png"


def test_without_file_names_the_images_can_be_read_all_the_same(tiles_root, tile, warnings_logged):
    (tiles_root / "pretrain_file_indices.npy").unlink()
    dataset = Pathology(tiles_root)
    assert dataset.read_bytes(2) == tile(2)
    assert dataset.name_of(2) == "file 2"
    assert "file names are not known" in warnings_logged[0]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("pretrain_dataset.tar", "pathfm pack"),
        ("pretrain_entries.npy", "pathfm index --tarball_path .* --name pretrain"),
    ],
)
def test_a_missing_file_is_named_with_the_command_that_makes_it(tiles_root, missing, message):
    (tiles_root / missing).unlink()
    with pytest.raises(UserError, match=rf"{missing}; make it with: {message}"):
        Pathology(tiles_root)


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


def test_a_data_set_travels_by_pickle_without_its_files(tiles_root, tile):
    dataset = Pathology(tiles_root)
    dataset.read_bytes(0)
    dataset.name_of(0)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1500
    assert pickle.loads(pickled).read_bytes(7) == tile(7)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_other_processes_read_the_same_bytes(tiles_root, tile, method):
    dataset = Pathology(tiles_root)
    dataset.read_bytes(0)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(dataset.read_bytes, range(23)) == [tile(n) for n in range(23)]


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
    assert {dataset.name_of(n) for n in range(2)} == {"a.png", "b.png"}
    assert len(open_entries(tmp_path / "pretrain_entries.npy")) == 2
