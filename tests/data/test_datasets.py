import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch

from pathfm.data.concat import ConcatRequest, concat
from pathfm.data.datasets import KNN, Pathology, PathologyFoundation, Regions, open_dataset
from pathfm.data.index import IndexRequest, build_index
from pathfm.errors import UserError


def bytes_by_name(*tars):
    """Basename -> bytes, as Python's own module reads them."""
    contents = {}
    for path in tars:
        with tarfile.open(path) as tar:
            contents |= {m.name.rpartition("/")[2]: tar.extractfile(m).read() for m in tar if m.isfile()}
    return contents


def string(name, **options):
    return ":".join([name, *(f"{key}={value}" for key, value in options.items())])


@pytest.fixture
def cohorts_root(tmp_path, write_tar, tile):
    """Two cohorts of 4 and 3 tiles, concatenated."""
    root = tmp_path / "cohorts"
    for name, tiles in {"a": range(4), "b": range(10, 13)}.items():
        write_tar(root / f"{name}.tar", {f"{n}.png": tile(n) for n in tiles})
        build_index(IndexRequest(root / f"{name}.tar", root, name))
    concat(ConcatRequest(root, root))
    return root


@pytest.fixture
def downstream_root(golden_dir, tmp_path):
    """The recorded query and test splits beside their tar."""
    source = golden_dir / "tar_npy"
    for path in [*source.glob("query_*.npy"), *source.glob("test_*.npy"), source / "class-ids.npy"]:
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "downstream_dataset.tar").symlink_to(source / "pretrain_dataset.tar")
    return tmp_path


@pytest.fixture
def regions_root(tmp_path):
    """Three regions of 256 patches, 384 features each."""
    generator = torch.Generator().manual_seed(0)
    for name in ("slide_2_b", "slide_1", "slide_2_a"):
        torch.save(torch.randn(256, 384, generator=generator), tmp_path / f"{name}.pt")
    return tmp_path


# ---- Pathology


def test_an_unlabelled_set_is_one_cohort(tiles_root):
    dataset = open_dataset(f"Pathology:root={tiles_root}")
    assert (dataset.name, dataset.cohorts, dataset.cohort_of(7)) == ("Pathology", {"pretrain": range(23)}, "pretrain")
    assert dataset.tar_of(7) == tiles_root / "pretrain_dataset.tar"


def test_neighbours_are_the_rows_that_follow_round_and_round(tiles_root):
    dataset = Pathology(tiles_root)
    assert dataset.neighbours(21, 4) == [22, 0, 1, 2]
    assert dataset.neighbours(0, 99) == list(range(1, 23))
    assert dataset.neighbours(0, 0) == []


# ---- PathologyFoundation


def test_the_recorded_concatenation_is_read_byte_for_byte(golden_dir, warnings_logged):
    source = golden_dir / "tar_npy"
    dataset = open_dataset(string("PathologyFoundation", root=source / "cohorts", extra=source / "concatenated"))
    oracle = bytes_by_name(source / "cohorts" / "cohort_a.tar", source / "cohorts" / "cohort_b.tar")
    assert len(dataset) == len(oracle) == 70
    assert {dataset.name_of(n): dataset.read_bytes(n) for n in range(70)} == oracle
    assert dataset.cohorts == {"cohort_a": range(35), "cohort_b": range(35, 70)}
    assert [dataset.cohort_of(n) for n in (0, 34, 35, 69)] == ["cohort_a", "cohort_a", "cohort_b", "cohort_b"]
    assert ["pretrain_index.json is not there" in message for message in warnings_logged] == [True]


def test_neighbours_stay_in_their_cohort(cohorts_root):
    dataset = PathologyFoundation(cohorts_root)
    assert dataset.neighbours(2, 16) == [3, 0, 1]
    assert dataset.neighbours(6, 1) == [4]


def test_the_fingerprint_knows_the_cohorts_by_name_wherever_they_lie(cohorts_root, tmp_path_factory):
    before = PathologyFoundation(cohorts_root).fingerprint()
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(cohorts_root, copy, dirs_exist_ok=True)
    assert PathologyFoundation(copy).fingerprint() == before
    (copy / "b.tar").rename(copy / "c.tar")
    np.save(copy / "cohort_indices.npy", np.array({0: "a", 1: "c"}, dtype=object), allow_pickle=True)
    (copy / "pretrain_index.json").unlink()
    assert PathologyFoundation(copy).fingerprint() != before


# ---- KNN


@pytest.mark.parametrize("split", ["query", "test"])
def test_the_recorded_splits_are_read_with_their_labels(downstream_root, golden_dir, split):
    dataset = open_dataset(string("KNN", root=downstream_root, split=split))
    recorded = np.load(golden_dir / "tar_npy" / f"{split}_entries.npy")
    content = (downstream_root / "downstream_dataset.tar").read_bytes()
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == recorded[:, 0].tolist()  # which are 0..6 already
    assert [dataset.read_bytes(n) for n in range(35)] == [content[start:end] for _, _, start, end in recorded.tolist()]
    assert [dataset.label(n) for n in range(35)] == dataset.labels.tolist()
    assert dataset.class_names[:2] == ["adipose", "lymphocytes"]
    assert (dataset.cohorts, dataset.cohort_of(3)) == ({"downstream": range(35)}, "downstream")


def downstream(root, write_tar, tile, csv):
    """Six tiles, the first three in the query split, with the labels of a CSV."""
    write_tar(root / "downstream_dataset.tar", {f"{n}.png": tile(n) for n in range(6)})
    (root / "labels.csv").write_text(csv)
    for split, tiles in {"query": range(3), "test": range(3, 6)}.items():
        (root / f"{split}.txt").write_text("\n".join(f"{n}.png" for n in tiles))
        tar, keep = root / "downstream_dataset.tar", root / f"{split}.txt"
        build_index(IndexRequest(tar, root, split, keep=keep, csv=root / "labels.csv"))
    return root


CSV = """filename,label,class
0.png,7,tumour
1.png,40,stroma
2.png,7,tumour
3.png,40,stroma
4.png,12,fat
5.png,7,tumour
"""


@pytest.mark.parametrize("with_class_ids", [True, False])
def test_classes_are_the_same_in_both_splits_though_one_lacks_some(tmp_path, write_tar, tile, with_class_ids):
    """Labels 7, 12, 40 become 0, 1, 2 although the query split has no 12."""
    root = downstream(tmp_path, write_tar, tile, CSV)
    if not with_class_ids:
        (root / "class-ids.npy").unlink()
    query, test = (KNN(root, split) for split in ("query", "test"))
    assert query.class_labels == test.class_labels == [7, 12, 40]
    names = ["tumour", "fat", "stroma"] if with_class_ids else ["class_7", "class_12", "class_40"]
    assert query.class_names == test.class_names == names
    assert (query.labels.tolist(), test.labels.tolist()) == ([0, 2, 0], [2, 1, 0])


def test_a_label_without_a_class_is_an_error(tmp_path, write_tar, tile):
    root = downstream(tmp_path, write_tar, tile, CSV)
    entries = np.load(root / "test_entries.npy")
    entries[1:, 0] = [5, 99]
    np.save(root / "test_entries.npy", entries)
    with pytest.raises(UserError, match=r"no class for the labels 5, 99 of 2 samples of split test .* row 1"):
        KNN(root, "test")


def test_a_subset_of_a_split_is_read(downstream_root):
    np.save(downstream_root / "query_entries_few.npy", np.load(downstream_root / "query_entries.npy")[:2])
    assert len(open_dataset(string("KNN", root=downstream_root, split="query", subset="few"))) == 2


def test_a_subset_without_class_ids_has_the_classes_of_the_whole(tmp_path, write_tar, tile):
    root = downstream(tmp_path, write_tar, tile, CSV)
    (root / "class-ids.npy").unlink()
    np.save(root / "query_entries_few.npy", np.load(root / "query_entries.npy")[1:2])
    few = KNN(root, "query", subset="few")
    assert (few.class_labels, few.labels.tolist()) == ([7, 12, 40], [2])


def test_there_is_no_other_split(downstream_root):
    with pytest.raises(UserError, match="split=query or split=test, not split=train"):
        open_dataset(string("KNN", root=downstream_root, split="train"))


# ---- Regions


def test_regions_come_in_the_order_of_their_names(regions_root):
    (regions_root / "notes.txt").touch()
    (regions_root / ".slide_0.pt").touch()
    dataset = open_dataset(string("Regions", root=regions_root))
    assert [dataset.name_of(n) for n in range(len(dataset))] == ["slide_1.pt", "slide_2_a.pt", "slide_2_b.pt"]
    assert dataset.read_bytes(1) == (regions_root / "slide_2_a.pt").read_bytes()
    assert dataset.entries["end_offset"][1] == (regions_root / "slide_2_a.pt").stat().st_size
    assert dataset.cohorts == {"regions": range(3)}


def test_packed_regions_are_the_same_samples(regions_root, tmp_path_factory):
    from pathfm.data.pack import PackRequest, pack

    out = tmp_path_factory.mktemp("packed")
    pack(PackRequest(regions_root, "regions", out))
    loose, packed = Regions(regions_root), Regions(out)
    assert [packed.name_of(n) for n in range(3)] == [loose.name_of(n) for n in range(3)]
    assert [packed.read_bytes(n) for n in range(3)] == [loose.read_bytes(n) for n in range(3)]


def test_a_subset_of_regions_needs_the_packed_form(regions_root):
    with pytest.raises(UserError, match=r"no tar .*regions_dataset.tar; make it with: pathfm pack FOLDER"):
        Regions(regions_root, subset="train")


def test_other_regions_have_another_fingerprint(regions_root):
    before = Regions(regions_root).fingerprint()
    assert Regions(regions_root).fingerprint() == before
    (regions_root / "slide_1.pt").rename(regions_root / "slide_3.pt")
    assert Regions(regions_root).fingerprint() != before


def test_regions_that_are_not_there_are_one_line(tmp_path, regions_root):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no \.pt files; set root="):
        Regions(tmp_path / "empty")
    with pytest.raises(UserError, match="there is no folder"):
        Regions(tmp_path / "nowhere")
    dataset = Regions(regions_root)
    (regions_root / "slide_1.pt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*slide_1.pt: No such file"):
        dataset.read_bytes(0)


# ---- all of them


def test_every_kind_travels_by_pickle(tiles_root, cohorts_root, downstream_root, regions_root):
    kinds = [
        Pathology(tiles_root),
        PathologyFoundation(cohorts_root),
        KNN(downstream_root, "test"),
        Regions(regions_root),
    ]
    for dataset in kinds:
        first = dataset.read_bytes(0)
        copy = pickle.loads(pickle.dumps(dataset))
        assert (copy.name, len(copy), copy.read_bytes(0)) == (dataset.name, len(dataset), first)
        assert copy.fingerprint() == dataset.fingerprint()


def test_a_concatenation_and_an_index_of_one_tar_are_not_taken_for_each_other(cohorts_root, tiles_root):
    with pytest.raises(UserError, match=r"must hold uint64 \[N, 5\] .* but holds uint64 \[23, 4\] \(the index of one"):
        PathologyFoundation(cohorts_root, extra=tiles_root)
    with pytest.raises(
        UserError, match=r"must hold uint64 \[N, 4\] .* but holds uint64 \[7, 5\] .*PathologyFoundation"
    ):
        Pathology(tiles_root, extra=cohorts_root)
