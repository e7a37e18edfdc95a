import os
import tarfile

import numpy as np
import pytest

from pathfm.data.concat import ConcatRequest, concat
from pathfm.data.datasets import Pathology, PathologyFoundation, Regions
from pathfm.data.pack import PackRequest, pack
from pathfm.errors import UserError


@pytest.fixture
def folder(tmp_path, tile):
    """Images in two folders, a link, and much that is no image."""
    root = tmp_path / "tiles"
    (root / "slide_2").mkdir(parents=True)
    (root / ".cache").mkdir()
    for number, name in enumerate(["b.png", "a.PNG", "slide_2/c.png", "ä.png"]):
        (root / name).write_bytes(tile(number))
    (tmp_path / "elsewhere.png").write_bytes(tile(9))
    (root / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (root / "notes.txt").write_text("not an image")
    (root / "empty.png").touch()
    (root / "._a.PNG").write_bytes(b"mac")
    (root / ".cache" / "d.png").write_bytes(tile(8))
    return root


def request(folder, tmp_path, **options):
    return PackRequest(folder, "pretrain", tmp_path / "out", **options)


def test_a_packed_folder_opens_as_a_data_set(folder, tmp_path, tile):
    summary = pack(request(folder, tmp_path))
    dataset = Pathology(tmp_path / "out")
    assert [dataset.name_of(n) for n in range(len(dataset))] == ["a.PNG", "b.png", "link.png", "c.png", "ä.png"]
    assert [dataset.read_bytes(n) for n in range(len(dataset))] == [tile(n) for n in (1, 0, 9, 2, 3)]
    assert summary.num_samples == 5
    assert summary.skipped == {"hidden files and folders": 2, "files that are not images": 1, "empty files": 1}


def test_a_cohort_is_packed_into_the_tar_that_concat_takes(folder, tmp_path):
    pack(PackRequest(folder, "tcga", tmp_path / "out", cohort=True))
    summary = concat(ConcatRequest(tmp_path / "out", tmp_path / "out"))
    assert [(cohort.cohort, cohort.tar) for cohort in summary.cohorts] == [("tcga", "tcga.tar")]
    assert len(PathologyFoundation(tmp_path / "out")) == 5


def test_region_features_are_packed_and_never_mixed_with_images(tmp_path, folder, capsys, warnings_logged):
    regions = tmp_path / "regions"
    regions.mkdir()
    for name in ("b.pt", "a.pt"):
        (regions / name).write_bytes(name.encode())
    pack(PackRequest(regions, "regions", tmp_path / "out"))
    dataset = Regions(tmp_path / "out")
    assert [dataset.name_of(n) for n in range(len(dataset))] == ["a.pt", "b.pt"]
    assert not warnings_logged
    (folder / "c.pt").write_bytes(b"c")
    with pytest.raises(UserError, match=r"holds 5 images and 1 region features \(.pt\).*pack them from two folders"):
        pack(request(folder, tmp_path))


def test_members_lie_under_the_folders_name(folder, tmp_path):
    pack(request(folder, tmp_path))
    with tarfile.open(tmp_path / "out" / "pretrain_dataset.tar") as tar:
        assert "tiles/slide_2/c.png" in tar.getnames()


def test_the_same_images_give_the_same_bytes_whatever_their_dates(folder, tmp_path):
    pack(request(folder, tmp_path))
    os.utime(folder / "b.png", (1, 1))
    (folder / "b.png").chmod(0o600)
    pack(PackRequest(folder, "pretrain", tmp_path / "again"))
    first, again = ((tmp_path / name / "pretrain_dataset.tar").read_bytes() for name in ("out", "again"))
    assert first == again


def test_packing_again_says_that_it_is_there_and_writes_nothing(folder, tmp_path):
    pack(request(folder, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    summary = pack(request(folder, tmp_path))
    assert summary.was_there
    assert summary.index is None
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("lost", ["pretrain_index.json", "pretrain_entries.npy", "pretrain_file_indices.npy"])
def test_a_lost_index_is_made_again(folder, tmp_path, lost):
    pack(request(folder, tmp_path))
    (tmp_path / "out" / lost).unlink()
    summary = pack(request(folder, tmp_path))
    assert summary.was_there
    assert len(summary.index.written) == 3
    assert len(Pathology(tmp_path / "out")) == 5


@pytest.mark.parametrize("change", ["content", "more", "less"])
def test_a_tar_of_other_content_is_kept_unless_forced(folder, tmp_path, tile, change):
    pack(request(folder, tmp_path))
    tar = tmp_path / "out" / "pretrain_dataset.tar"
    before = tar.read_bytes()
    if change == "less":
        (folder / "ä.png").unlink()
    else:
        (folder / ("b.png" if change == "content" else "z.png")).write_bytes(tile(77))
    with pytest.raises(UserError, match=r"holds something else than .*--force"):
        pack(request(folder, tmp_path))
    assert tar.read_bytes() == before
    pack(request(folder, tmp_path, force=True))
    assert tar.read_bytes() != before
    assert len(Pathology(tmp_path / "out")) == {"content": 5, "more": 6, "less": 4}[change]


def test_a_suffix_names_the_entries(folder, tmp_path):
    pack(request(folder, tmp_path, suffix="all"))
    assert np.load(tmp_path / "out" / "pretrain_entries_all.npy").shape == (5, 4)


def test_folders_without_images_missing_ones_and_broken_links_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").touch()
    with pytest.raises(UserError, match=r"holds no images .*found nothing"):
        pack(request(tmp_path / "empty", tmp_path))
    with pytest.raises(UserError, match="found 1 files that are not images"):
        pack(request(tmp_path / "texts", tmp_path))
    with pytest.raises(UserError, match="there is no folder"):
        pack(request(tmp_path / "nowhere", tmp_path))
    (folder / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"gone.png is a broken link"):
        pack(request(folder, tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_link_to_a_folder_above_is_refused_instead_of_followed_for_ever(folder, tmp_path):
    (folder / "slide_2" / "up").symlink_to(folder)
    with pytest.raises(UserError, match="links back to"):
        pack(request(folder, tmp_path))


def test_a_disk_that_is_full_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(UserError, match=r"cannot write .*pretrain_dataset.tar: No space left"):
        pack(request(folder, tmp_path))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("name", "message"), [("a/b", "must not hold a '/'"), ("", "give one with --name")])
def test_a_name_that_makes_no_file_name_is_refused_before_anything_is_written(folder, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        pack(PackRequest(folder, name, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
