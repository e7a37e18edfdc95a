"""`pathfm extract`: from pictures to what `Regions` opens, on any number of ranks, killed and continued."""

import csv
import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pathfm.batch import normalise_crops
from pathfm.data.datasets import Regions
from pathfm.data.pack import PackRequest, pack
from pathfm.data.region_features import RegionFeatures
from pathfm.errors import EXIT_INTERRUPTED, UserError
from pathfm.jobs import extract
from pathfm.jobs.extract import main
from tests.features.small import (
    CELLS,
    PATCH,
    SIDE,
    SIZES,
    STUDENT,
    WIDTH,
    make_regions,
    patch_backbone,
    picture,
    region_backbone,
    save_picture,
    saved_teacher,
)
from tests.jobs.journeys import environment, wait_until

NUM_REGIONS = 10  # three blocks
BY_SLIDE = ("--slide", r"slide_(.)_x(?P<x>\d+)_y(?P<y>\d+)")


@pytest.fixture(scope="module")
def regions(tmp_path_factory) -> Path:
    return make_regions(tmp_path_factory.mktemp("regions"), NUM_REGIONS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A run's export, with the run's recipe beside it."""
    run = tmp_path_factory.mktemp("run")
    (run / "recipe.yaml").write_text(f"student: {json.dumps(STUDENT.model_dump(mode='json'))}\n")
    return saved_teacher(run / "exports" / "teacher_00000007.pth", patch_backbone())


@pytest.fixture(scope="module")
def packed(regions: Path, weights: Path, tmp_path_factory) -> Path:
    """What one rank extracts that nobody disturbs."""
    output = tmp_path_factory.mktemp("packed") / "features"
    assert run(regions, weights, output, *BY_SLIDE) == 0
    return output


def run(regions: Path | str, weights: Path, output: Path, *options: str) -> int:
    return main(words(regions, weights, output, *options))


def words(regions: Path | str, weights: Path, output: Path, *options: str) -> list[str]:
    source = ["--regions", str(regions), "--weights", str(weights), "--output", str(output)]
    return [*source, *SIZES, "--device", "cpu", *options]


def by_hand(path: Path) -> torch.Tensor:
    """[CLS] of every patch."""
    pixels = normalise_crops(torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None])
    cells = [(row * PATCH, column * PATCH) for row in range(SIDE) for column in range(SIDE)]
    patches = torch.cat([pixels[:, :, top : top + PATCH, left : left + PATCH] for top, left in cells])
    return patch_backbone()([patches])[0].cls


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".pt", ".tar", ".npy")}


def test_every_region_is_one_tensor_of_its_patches_in_the_order_of_the_grid(regions, packed):
    dataset = Regions(packed)
    features = RegionFeatures(dataset)
    assert (len(features), features.width) == (NUM_REGIONS, WIDTH)
    for number in (0, 7, NUM_REGIONS - 1):
        expected = by_hand(regions / dataset.name_of(number).replace(".pt", ".png"))
        torch.testing.assert_close(features[number], expected, atol=1e-5, rtol=1e-4)


def test_the_manifest_says_what_was_done(regions, packed, weights):
    manifest = json.loads((packed / "extraction.json").read_text())
    identity = manifest["identity"]
    assert (identity["count"], identity["region_size"], identity["patch_size"]) == (NUM_REGIONS, 128, 32)
    assert identity["architecture"]["arch"] == "vit_tiny"
    assert identity["architecture"]["interpolate_offset"] == 0.0  # as the run's recipe says
    assert manifest["weights"] == str(weights)
    assert manifest["tensors_left_out"] == {"head": 1}
    assert manifest["features"]["shape"] == [CELLS, WIDTH]
    assert manifest["preprocessing"]["positions"] == "resampled to the patch's grid"
    assert manifest["slides"]["slide_b_x128_y0"] == {"slide": "b", "x": 128, "y": 0}
    assert manifest["versions"]["torch"] == version("torch")
    assert not (packed / ".extraction").exists()


def test_files_hold_what_the_tar_holds(regions, packed, weights, tmp_path):
    assert run(regions, weights, tmp_path, "--format", "files") == 0
    assert len(list(tmp_path.glob("*.pt"))) == NUM_REGIONS
    in_tar, in_files = Regions(packed), Regions(tmp_path)
    assert [in_tar.name_of(n) for n in range(NUM_REGIONS)] == [in_files.name_of(n) for n in range(NUM_REGIONS)]
    assert all(in_tar.read_bytes(n) == in_files.read_bytes(n) for n in range(NUM_REGIONS))


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_extracts_each_region_once_and_the_same_bytes(ranks, regions, packed, weights, tmp_path):
    done = on_ranks(ranks, words(regions, weights, tmp_path, *BY_SLIDE))
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(packed)  # a block that comes twice is an AssertionError
    assert done.stdout.count("regions of") == 1


def test_a_killed_extraction_goes_on_where_it_was_and_shows_nothing_half_written(weights, tmp_path):
    table, tiles = grids(tmp_path, NUM_REGIONS)
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "features"
    assert run(tiles, weights, undisturbed, "--table", str(table)) == 0
    stuck = tiles / "r5_0.png"  # of the second block: whoever reads it waits for ever
    tile = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)
    command = words(tiles, weights, output, "--table", str(table))
    process = subprocess.Popen([sys.executable, "-m", "pathfm", "extract", *command], env=environment())
    first = output / ".extraction" / "block_00000000.pt"
    wait_until(first.exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stuck.unlink()
    stuck.write_bytes(tile)
    assert [path.name for path in output.iterdir() if not path.name.startswith(".")] == []
    assert run(tiles, weights, output, "--table", str(table)) == 0  # a block that comes twice is an AssertionError
    assert contents(output) == contents(undisturbed)
    assert not (output / ".extraction").exists()


def test_whoever_is_told_to_leave_does_so_after_a_block_and_goes_on_later(
    regions, packed, weights, tmp_path, monkeypatch
):
    monkeypatch.setattr(extract, "noted", lambda: "SIGTERM")
    assert run(regions, weights, tmp_path, *BY_SLIDE) == EXIT_INTERRUPTED
    assert [path.name for path in (tmp_path / ".extraction").glob("block*")] == ["block_00000000.pt"]
    monkeypatch.undo()
    assert run(regions, weights, tmp_path, *BY_SLIDE) == 0
    assert contents(tmp_path) == contents(packed)


def test_a_finished_extraction_is_left_alone(regions, packed, weights, capsys):
    before = {path: path.stat().st_mtime_ns for path in packed.glob("[!.]*")}
    assert run(regions, weights, packed, *BY_SLIDE) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in packed.glob("[!.]*")} == before


def test_another_extraction_is_not_mixed_with_one_that_is_there(regions, packed, weights, tmp_path):
    with pytest.raises(UserError, match=r"holds another extraction \(other_sizes: refuse then, pad now\)"):
        run(regions, weights, packed, *BY_SLIDE, "--other-sizes", "pad")
    other = saved_teacher(tmp_path / "other.pth", patch_backbone(seed=5))
    with pytest.raises(UserError, match=r"holds another extraction .*weights_sha256"):
        run(regions, other, packed, *BY_SLIDE)


def test_what_is_there_without_a_manifest_is_not_written_over(regions, weights, tmp_path):
    torch.save(torch.zeros(1), tmp_path / "mine.pt")
    with pytest.raises(UserError, match=r"mine.pt is there, and no extraction.json says what it is of"):
        run(regions, weights, tmp_path)


def test_a_tar_and_its_index_give_what_their_folder_gives(regions, packed, weights, tmp_path):
    pack(PackRequest(regions, "pretrain", tmp_path))
    tar = tmp_path / "pretrain_dataset.tar"
    for number, source in enumerate([str(tar), f"Pathology:root={tmp_path}"]):
        assert run(source, weights, tmp_path / str(number)) == 0
        assert contents(tmp_path / str(number))["regions_dataset.tar"] == contents(packed)["regions_dataset.tar"]


def grids(folder: Path, number: int) -> tuple[Path, Path]:
    """The tiles of some regions, and the table that says where each lies."""
    rows = [["file", "region", "row", "column"]]
    for region in range(number):
        pixels = picture(region)
        for cell in reversed(range(CELLS)):
            top, left = (PATCH * place for place in divmod(cell, SIDE))
            save_picture(folder / "tiles" / f"r{region}_{cell}.png", pixels[top : top + PATCH, left : left + PATCH])
            rows.append([f"r{region}_{cell}.png", f"r{region}", *map(str, divmod(cell, SIDE))])
    with (folder / "table.csv").open("w") as file:
        csv.writer(file).writerows(rows)
    return folder / "table.csv", folder / "tiles"


def test_tiles_on_a_grid_give_what_the_picture_of_their_region_gives(packed, weights, tmp_path):
    table, tiles = grids(tmp_path, 2)
    assert run(tiles, weights, tmp_path / "out", "--table", str(table)) == 0
    whole, parts = Regions(packed), Regions(tmp_path / "out")
    numbers = {whole.name_of(number): number for number in range(NUM_REGIONS)}
    of_pictures = RegionFeatures(whole)[numbers["slide_b_x128_y0.pt"]]
    torch.testing.assert_close(RegionFeatures(parts)[1], of_pictures, atol=1e-5, rtol=1e-4)


def test_regions_of_another_size_are_all_named_before_the_first_is_decoded(weights, tmp_path):
    for number, width in enumerate([128, 96, 130]):
        save_picture(tmp_path / "regions" / f"r{number}.png", picture(number, width=width))
    with pytest.raises(UserError, match=r"2 images are not 128 x 128 px: r1.png \(96 x 128 px\), r2.png \(130 x 128"):
        run(tmp_path / "regions", weights, tmp_path / "out")
    assert not (tmp_path / "out" / ".extraction").exists()


def test_padding_is_noted_cell_by_cell(weights, tmp_path):
    for number, width in enumerate([128, 64]):
        save_picture(tmp_path / "regions" / f"r{number}.png", picture(number, width=width))
    assert run(tmp_path / "regions", weights, tmp_path / "out", "--other-sizes", "pad") == 0
    manifest = json.loads((tmp_path / "out" / "extraction.json").read_text())
    beyond = [cell for cell in range(CELLS) if cell % SIDE >= 2]
    assert manifest["padded"] == {"r1": {"size_px": [128, 64], "padding_cells": beyond}}


def test_slides_are_stacked_regions_with_their_names_and_places_beside_them(regions, packed, weights, tmp_path):
    assert run(regions, weights, tmp_path, *BY_SLIDE, "--slides") == 0
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["a.pt", "b.pt"]
    slide = torch.load(tmp_path / "b.pt", weights_only=True)
    assert slide.shape == (NUM_REGIONS // 2, CELLS, WIDTH)
    with (tmp_path / "slides.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["slide"] == "b"]
    assert [int(row["x"]) for row in rows] == [128, 384, 640, 896, 1152]  # from left to right, not by name
    dataset = Regions(packed)
    numbers = {dataset.name_of(number): number for number in range(NUM_REGIONS)}
    for row in rows:
        expected = RegionFeatures(dataset)[numbers[f"{row['name']}.pt"]]
        assert torch.equal(slide[int(row["row"])], expected)


def test_tiles_of_slides_are_stacked_too(weights, shared_data, tmp_path):
    folder = shared_data / "cmu1"
    command = ["--tiles", str(folder / "images"), "--table", str(folder / "tiles.csv"), "--slides"]
    command += ["--patch-size", "224", "--input-size", "32", "--slide", "^[^_]+", "--device", "cpu"]
    assert main([*command, "--weights", str(weights), "--output", str(tmp_path)]) == 0
    assert torch.load(tmp_path / "cmu1.pt", weights_only=True).shape == (173, WIDTH)
    with (tmp_path / "slides.csv").open() as file:
        places = [(int(row["y"]), int(row["x"])) for row in csv.DictReader(file)]
    assert places == sorted(places)
    manifest = json.loads((tmp_path / "extraction.json").read_text())
    assert manifest["preprocessing"]["patches"] == "resized to 32 px (bicubic, antialiased)"


def test_slides_must_be_known(regions, weights, tmp_path):
    with pytest.raises(UserError, match="no slide is known of slide_a_x0_y0, "):
        run(regions, weights, tmp_path, "--slides")


def test_real_regions(shared_data, weights, tmp_path):
    for path in (shared_data / "regions4096").glob("*.jpg"):
        save_picture(tmp_path / "regions" / f"{path.stem}.png", np.array(Image.open(path))[1024:1152, 1024:1152])
    assert run(tmp_path / "regions", weights, tmp_path / "out") == 0
    assert RegionFeatures(Regions(tmp_path / "out"))[1].std() > 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--patch-size", "24"], "a region of 128 px is not a whole number of 24 px patches"),
        (["--patch-size", "8"], r"8 px are no whole number of the 16 px patches .*--input-size 16"),
        (["--input-size", "40"], "40 px are no whole number of the 16 px patches .*--input-size 32"),
        (["--table", "nowhere.csv"], "cannot read nowhere.csv"),
        (["--config", "vits14"], r"does not fit the model .*missing: .*--config"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_written(options, reason, regions, weights, tmp_path):
    with pytest.raises(UserError, match=reason):
        run(regions, weights, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_weights_of_a_region_model_are_told_from_those_of_a_patch_model(regions, tmp_path):
    region = saved_teacher(tmp_path / "region.pth", region_backbone())
    with pytest.raises(UserError, match=r"region.pth reads patch features, not images"):
        run(regions, region, tmp_path / "out")


def test_tiles_alone_are_refused(regions, weights, tmp_path):
    with pytest.raises(UserError, match="add --slides"):
        main(["--tiles", str(regions), "--weights", str(weights), "--output", str(tmp_path)])


def on_ranks(number: int, command: list[str]) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    return subprocess.run(
        [*launcher, "-m", "pathfm", "extract", *command],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
    )
