"""Features of a data set: each sample's own, the same bytes whoever extracts them and whatever happens meanwhile."""

import csv
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from pathfm.batch import normalise_crops
from pathfm.data.concat import ConcatRequest, concat
from pathfm.data.datasets import KNN, Dataset, Pathology, PathologyFoundation
from pathfm.data.decode import decode
from pathfm.data.labelled import at_side
from pathfm.data.pack import PackRequest, pack
from pathfm.dist.env import ALONE, Ranks
from pathfm.errors import UserError
from pathfm.features import dataset_features
from pathfm.features.dataset_features import Wanted, extract_dataset, key_of, open_features
from pathfm.models.config import StudentConfig
from pathfm.models.pretrained import Pretrained
from pathfm.models.vit import ViT
from tests.features.small import make_regions
from tests.labelled import CLASSES, make_labelled
from tests.several_ranks import on_ranks

CPU = torch.device("cpu")
SIDE, PATCH, WIDTH = 32, 16, 48
BLOCK_ROWS, BATCH = 8, 3  # 21 samples: three blocks, of three batches and two
EVERYTHING = Wanted(SIDE, ("cls", "mean_patch", "patches"), last_blocks=2)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def tiles(root: Path) -> KNN:
    return KNN(root, "test")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(dataset_features, "_BLOCK_ROWS", BLOCK_ROWS)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As ranks have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def undisturbed(tiles, one_thread, tmp_path) -> dict[str, bytes]:
    return contents(extracted(tiles, EVERYTHING, tmp_path / "undisturbed"))


def tiny(seed: int = 0, scale: float = 1.0) -> Pretrained:
    torch.manual_seed(seed)
    vit = ViT(image_size=SIDE, patch_size=PATCH, width=WIDTH, num_heads=3, drop_path_rates=[0.0, 0.0], layerscale=0.5)
    with torch.no_grad():
        vit.norm.weight.mul_(scale)
    student = StudentConfig(arch="vit_tiny", patch_size=PATCH)
    return Pretrained(vit.eval().requires_grad_(False), student, Path("tiny.pth"), f"sha256 of {seed}, {scale}", {})


def extracted(dataset: Dataset, wanted: Wanted, folder: Path, model: Pretrained | None = None, **options: Any) -> Path:
    assert extract_dataset(dataset, model or tiny(), wanted, folder, ALONE, CPU, batch_size=BATCH, **options)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def until(asked: int, end: Callable[[], bool] = lambda: False) -> Callable[[], bool]:
    """Goes on until it is asked for the nth time."""
    times = 0

    def go_on() -> bool:
        nonlocal times
        times += 1
        return times < asked or end()

    return go_on


def test_every_row_is_what_the_model_says_of_its_sample(tiles, tmp_path):
    features = open_features(extracted(tiles, EVERYTHING, tmp_path))
    assert features.rows.tolist() == list(range(len(tiles)))
    model = tiny()
    for row in range(len(tiles)):
        tile = torch.from_numpy(at_side(decode(tiles.read_bytes(row)), SIDE)).permute(2, 0, 1)[None]
        for number, layer in enumerate(model.vit.intermediate_layers(normalise_crops(tile), 2)):
            expected = (layer.cls[0], layer.patches[0].mean(0), layer.patches[0])
            for part, array in zip(expected, (features.cls, features.mean_patch, features.patches), strict=True):
                torch.testing.assert_close(torch.tensor(array[row, number]), part, atol=1e-5, rtol=1e-4)


def test_names_and_labels_are_those_of_the_rows(tiles, tmp_path):
    extracted(tiles, Wanted(SIDE), tmp_path)
    with (tmp_path / "names.csv").open() as file:
        found = [(int(row["row"]), row["file"], int(row["label"]), row["class"]) for row in csv.DictReader(file)]
    labels = tiles.labels.tolist()
    assert found == [(row, tiles.name_of(row), label, CLASSES[label]) for row, label in enumerate(labels)]


def test_what_is_not_wanted_is_not_there(tiles, tmp_path):
    features = open_features(extracted(tiles, Wanted(SIDE, ("mean_patch",)), tmp_path))
    assert (features.cls, features.patches) == (None, None)
    assert features.mean_patch.shape == (21, 1, WIDTH)
    assert sorted(contents(tmp_path)) == ["features.json", "mean_patch.npy", "names.csv", "rows.npy"]


def test_arrays_are_not_loaded_and_cannot_be_written(tiles, tmp_path):
    for number, format in enumerate(("npy", "safetensors")):
        features = open_features(extracted(tiles, EVERYTHING, tmp_path / str(number), format=format))
        for array in (features.cls, features.mean_patch, features.patches, features.rows):
            assert isinstance(array, np.memmap)
            assert not array.flags.writeable


def on_this_rank(root: Path, folder: Path, leave_after: int | None = None) -> bool:
    dataset_features._BLOCK_ROWS = BLOCK_ROWS
    world = torch.distributed.get_world_size(), torch.distributed.get_rank()
    dataset, ranks = KNN(root, "test"), Ranks(world[1], world[0])
    go_on = until(leave_after) if leave_after and ranks.rank == 1 else lambda: True
    return extract_dataset(dataset, tiny(), EVERYTHING, folder, ranks, CPU, batch_size=BATCH, go_on=go_on)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_extracts_the_same_bytes(ranks, root, undisturbed, tmp_path):
    assert on_ranks(ranks, on_this_rank, root, tmp_path / "out") == [True] * ranks
    assert contents(tmp_path / "out") == undisturbed  # a block that comes twice is an AssertionError


def test_all_ranks_leave_when_one_is_told_to_and_another_number_goes_on(root, tiles, undisturbed, tmp_path):
    assert on_ranks(2, on_this_rank, root, tmp_path / "out", 5) == [False] * 2
    assert len(list((tmp_path / "out" / ".features").glob("block_*"))) == 2
    assert contents(extracted(tiles, EVERYTHING, tmp_path / "out")) == undisturbed


def killed(root: Path, folder: Path, asked: int) -> None:
    dataset_features._BLOCK_ROWS = BLOCK_ROWS
    torch.set_num_threads(1)
    go_on = until(asked, lambda: os.kill(os.getpid(), signal.SIGKILL) or True)
    extracted(KNN(root, "test"), EVERYTHING, folder, go_on=go_on)


def test_killed_while_it_computes_and_while_it_writes_it_goes_on_to_the_same_bytes(root, tiles, undisturbed, tmp_path):
    out = tmp_path / "out"
    for asked, blocks, published in ((5, 1, []), (14, 3, ["names.csv", "rows.npy"])):
        process = multiprocessing.get_context("spawn").Process(target=killed, args=(root, out, asked))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list((out / ".features").glob("block_*"))) == blocks
        assert sorted(path.name for path in out.iterdir() if not path.name.startswith(".")) == published
    with pytest.raises(UserError, match="an extraction was left there, which goes on when started again"):
        open_features(out)
    assert contents(extracted(tiles, EVERYTHING, out)) == undisturbed


def test_it_may_be_left_at_any_question(tiles, undisturbed, tmp_path):
    model, asked, is_done = tiny(), 1, False
    while not is_done:
        assert asked < 40
        out = tmp_path / str(asked)
        is_done = extract_dataset(tiles, model, EVERYTHING, out, ALONE, CPU, batch_size=BATCH, go_on=until(asked))
        assert (out / "features.json").exists() == is_done
        assert contents(extracted(tiles, EVERYTHING, out, model)) == undisturbed
        asked += 2
    assert asked > 15


def test_workers_read_what_one_process_reads(tiles, undisturbed, tmp_path):
    assert contents(extracted(tiles, EVERYTHING, tmp_path / "out", num_workers=2)) == undisturbed


def test_what_is_there_is_left_alone(tiles, tmp_path, monkeypatch):
    extracted(tiles, Wanted(SIDE), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")}
    monkeypatch.setattr(ViT, "intermediate_layers", None)
    extracted(tiles, Wanted(SIDE), tmp_path, go_on=lambda: False)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("[!.]*")} == before


def test_a_sample_that_cannot_be_decoded_is_left_out_and_named(tiles, tmp_path, monkeypatch):
    whole = open_features(extracted(tiles, EVERYTHING, tmp_path / "whole"))
    read = KNN.read_bytes
    monkeypatch.setattr(KNN, "read_bytes", lambda self, row: read(self, row)[: 20 if row in (4, 20) else None])
    features = open_features(extracted(tiles, EVERYTHING, tmp_path / "damaged"))
    assert features.rows.tolist() == [row for row in range(21) if row not in (4, 20)]
    assert [(one.row, one.name) for one in features.left_out] == [(row, tiles.name_of(row)) for row in (4, 20)]
    assert all(one.reason and one.name not in one.reason for one in features.left_out)
    assert features.manifest["num_left_out"] == 2
    for found, expected in ((features.cls, whole.cls), (features.patches, whole.patches)):
        assert np.isnan(found[[4, 20]]).all()
        np.testing.assert_allclose(found[features.rows], expected[features.rows], atol=1e-5)


def test_a_data_set_that_is_all_damaged_is_one_line(tiles, tmp_path, monkeypatch):
    monkeypatch.setattr(KNN, "read_bytes", lambda self, row: b"no picture")
    with pytest.raises(UserError, match="none of 21 samples can be decoded; the first: "):
        extracted(tiles, Wanted(SIDE), tmp_path)


def test_fp16_is_fp32_rounded_and_half_as_large(tiles, tmp_path):
    single = open_features(extracted(tiles, EVERYTHING, tmp_path / "fp32"))
    half = open_features(extracted(tiles, replace(EVERYTHING, dtype="fp16"), tmp_path / "fp16"))
    assert half.patches.dtype == np.float16
    for one, other in ((single.cls, half.cls), (single.mean_patch, half.mean_patch), (single.patches, half.patches)):
        assert np.array_equal(one.astype(np.float16), other)


def test_numbers_that_exceed_fp16_are_refused(tiles, tmp_path):
    large = tiny(scale=1e6)
    with pytest.raises(UserError, match=r"tiny.pth gives features that are no finite numbers; .*take fp32"):
        extracted(tiles, Wanted(SIDE, dtype="fp16"), tmp_path, large)
    assert np.abs(open_features(extracted(tiles, Wanted(SIDE), tmp_path / "fp32", large)).cls).max() > 1e5


def test_bf16_computes_nearly_the_same(tiles, tmp_path):
    exact = open_features(extracted(tiles, Wanted(SIDE), tmp_path / "fp32")).cls
    about = open_features(extracted(tiles, Wanted(SIDE, precision="bf16"), tmp_path / "bf16")).cls
    assert 0 < np.abs(exact - about).max() < 0.1


def test_safetensors_hold_what_npy_files_hold(tiles, tmp_path):
    in_files = open_features(extracted(tiles, EVERYTHING, tmp_path / "npy"))
    in_one = open_features(extracted(tiles, EVERYTHING, tmp_path / "one", format="safetensors"))
    by_the_library = load_file(tmp_path / "one" / "features.safetensors")
    assert sorted(by_the_library) == ["cls", "mean_patch", "patches", "rows"]
    for name, array in by_the_library.items():
        assert np.array_equal(array, getattr(in_files, name))
        assert np.array_equal(array, getattr(in_one, name))


@pytest.mark.parametrize(
    ("change", "what"),
    [({"side": 48}, "side: 32 then, 48 now"), ({"dtype": "fp16"}, "dtype: fp32"), ({"last_blocks": 2}, "last_blocks")],
)
def test_other_features_are_not_mixed_with_those_that_are_there(change, what, tiles, tmp_path):
    extract_dataset(tiles, tiny(), Wanted(SIDE), tmp_path, ALONE, CPU, batch_size=BATCH, go_on=until(4))
    for _ in ("begun", "done"):
        with pytest.raises(UserError, match=rf"holds another extraction \({what}.*; choose another folder"):
            extracted(tiles, replace(Wanted(SIDE), **change), tmp_path)
        extracted(tiles, Wanted(SIDE), tmp_path)


def test_nor_are_those_of_other_weights_and_samples(root, tiles, tmp_path):
    extracted(tiles, Wanted(SIDE), tmp_path)
    with pytest.raises(UserError, match=r"holds another extraction \(weights_sha256: sha256 of 0"):
        extracted(tiles, Wanted(SIDE), tmp_path, tiny(seed=1))
    with pytest.raises(UserError, match=r"holds another extraction \(samples: 21 then, 36 now"):
        extracted(KNN(root, "query"), Wanted(SIDE), tmp_path)


def test_files_that_no_manifest_explains_are_not_written_over(tiles, tmp_path):
    (tmp_path / "cls.npy").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"cls.npy is there, and no features.json says what it is of"):
        extracted(tiles, Wanted(SIDE), tmp_path)


def test_a_key_is_that_of_the_content(root, tiles, tmp_path):
    key = key_of(tiles, tiny(), EVERYTHING)
    elsewhere = KNN(make_labelled(tmp_path), "test")
    assert key_of(elsewhere, tiny(), replace(EVERYTHING, parts=("patches", "cls", "mean_patch"))) == key
    others = {
        key_of(KNN(root, "query"), tiny(), EVERYTHING),
        key_of(tiles, tiny(seed=1), EVERYTHING),
        key_of(tiles, replace(tiny(), student=StudentConfig(patch_size=PATCH, qkv_bias=False)), EVERYTHING),
        *(key_of(tiles, tiny(), replace(EVERYTHING, **{name: value})) for name, value in OTHER_WISHES.items()),
    }
    assert len(others) == 3 + len(OTHER_WISHES)
    assert key not in others
    assert open_features(extracted(tiles, EVERYTHING, tmp_path / "out")).manifest["key"] == key


OTHER_WISHES = {"side": 48, "parts": ("cls",), "last_blocks": 1, "dtype": "fp16", "precision": "bf16"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"side": 40}, "a side of 40 px is no whole number of the 16 px patches of tiny.pth; take 32"),
        ({"last_blocks": 3}, "tiny.pth has 2 blocks; features of its last 3 are not there"),
        ({"parts": ()}, "features are some of cls, mean_patch, patches, not none"),
    ],
)
def test_what_cannot_be_had_is_one_line_before_anything_is_written(change, reason, tiles, tmp_path):
    with pytest.raises(UserError, match=reason):
        extracted(tiles, replace(EVERYTHING, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unlabelled_data_sets_of_one_cohort_and_of_many_are_extracted_too(tmp_path):
    for cohort in ("a", "b"):
        pack(PackRequest(make_regions(tmp_path / cohort), cohort, tmp_path / "packed"))
    pack(PackRequest(tmp_path / "a", "pretrain", tmp_path / "one"))
    concat(ConcatRequest(tmp_path / "packed", tmp_path / "packed"))
    one = open_features(extracted(Pathology(tmp_path / "one"), Wanted(SIDE), tmp_path / "of_one"))
    both = open_features(extracted(PathologyFoundation(tmp_path / "packed"), Wanted(SIDE), tmp_path / "of_both"))
    np.testing.assert_allclose(both.cls, np.concatenate([one.cls, one.cls]), atol=1e-5)
    with (tmp_path / "of_both" / "names.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["cohort"] for row in rows] == ["a"] * 6 + ["b"] * 6
    assert {row["label"] for row in rows} == {""}


def test_a_folder_without_features_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no features of a data set: it has no features.json$"):
        open_features(tmp_path)


def test_an_array_that_was_cut_is_named(tiles, tmp_path):
    for format, file in (("npy", "cls.npy"), ("safetensors", "features.safetensors")):
        path = extracted(tiles, Wanted(SIDE), tmp_path / format, format=format) / file
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match=r"the arrays in .* cannot be read .*; extract them again"):
            open_features(tmp_path / format)
