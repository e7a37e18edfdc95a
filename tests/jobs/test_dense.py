import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import jaccard_score

from pathfm.__main__ import main as pathfm
from pathfm.errors import EXIT_INTERRUPTED, UserError
from pathfm.evaluate.dense.fit import Truth
from pathfm.jobs import dense
from pathfm.jobs.dense import main
from pathfm.jobs.dense_plan import backbone_named
from pathfm.lifecycle import signals
from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig
from tests.evaluate.dense.small import hills, squares
from tests.features.small import save_picture

RECIPE = """student: {arch: vit4k_xs, patch_size: 8, layerscale: 0.0}
crops: {global_crops_size: 48, local_crops_size: 24}
"""
NAMES = "noise,bright,dark"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(RECIPE)
    return f"random:{tmp_path / 'small.yaml'}"


def _saved(root: Path, pictures: list[Truth], test: int) -> list[str]:
    """Folders and a CSV; the last `test` pictures are for the test, two of a slide."""
    rows = ["filename,part,slide"]
    for number, truth in enumerate(pictures):
        name, part = f"tile_{number:02d}", "test" if number >= len(pictures) - test else "train"
        save_picture(root / "images" / f"{name}.png", truth.image)
        if truth.target.is_floating_point():
            (root / "masks").mkdir(exist_ok=True)
            np.save(root / "masks" / f"{name}.npy", truth.target.numpy())
        else:
            save_picture(root / "masks" / f"{name}.png", truth.target.numpy())
        rows.append(f"{name}.png,{part},slide_{number // 2}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return [
        *("--images", str(root / "images"), "--masks", str(root / "masks"), "--device", "cpu"),
        *("--split", f"{root / 'labels.csv'}:part", "--group", "slide", "--resamples", "100"),
    ]


@pytest.fixture
def squares_given(tmp_path: Path) -> list[str]:
    return _saved(tmp_path, [squares(seed, 40, 56) for seed in range(16)], test=6)


def _report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def test_from_pictures_and_masks_to_a_report_predictions_and_a_picture(squares_given, recipe, tmp_path, capsys):
    output = tmp_path / "out"
    options = ["--classes", NAMES, "--epochs", "15", "--batch-size", "4", "--lr", "0.01", "--output", str(output)]
    assert main([recipe, *squares_given, *options]) == 0
    report = _report(output)
    assert report["scores"]["miou"]["low"] > 0.4 > report["constant"]["scores"]["miou"]["value"]
    assert (report["data"]["train"], report["data"]["test"], report["data"]["test_groups"]) == (10, 6, 3)
    assert report["training"]["last_loss"] < report["training"]["first_loss"] / 2
    written = sorted((output / "predictions").iterdir())
    assert [path.name for path in written] == [f"tile_{number}.png" for number in range(10, 16)]
    true, said = (
        np.concatenate([np.array(Image.open(folder / path.name)).ravel() for path in written])
        for folder in (tmp_path / "masks", output / "predictions")
    )
    assert report["scores"]["miou"]["value"] == pytest.approx(jaccard_score(true, said, average="macro"), abs=1e-9)
    assert np.sum(report["confusion"]) == 6 * 40 * 56
    page = (output / "report.md").read_text()
    assert "| bright |" in page
    assert f"{report['scores']['miou']['value']:.4f}" in page
    with Image.open(output / "pictures.png") as picture:
        assert picture.width > 800
    assert f"mIoU {report['scores']['miou']['value']:.4f}" in capsys.readouterr().out


def test_the_same_command_gives_the_same_numbers_and_the_split_that_it_wrote_gives_them_too(
    squares_given, recipe, tmp_path
):
    options = ["--classes", NAMES, "--epochs", "3", "--window", "32", "--stride", "16"]
    before = torch.get_rng_state()
    found = []
    for name in ("one", "two"):
        assert main([recipe, *squares_given, *options, "--output", str(tmp_path / name)]) == 0
        found.append(_report(tmp_path / name))
    again = [word if "labels.csv" not in word else str(tmp_path / "one" / "split.csv") for word in squares_given]
    again[again.index("slide")] = "group"
    assert main([recipe, *again, *options, "--output", str(tmp_path / "three")]) == 0
    found.append(_report(tmp_path / "three"))
    assert found[0]["scores"] == found[1]["scores"] == found[2]["scores"]
    assert torch.equal(torch.get_rng_state(), before)
    assert found[0]["settings"]["window"] == [32, 32]


def test_the_multiscale_head_reads_four_blocks_at_several_scales(squares_given, recipe, tmp_path):
    options = ["--head", "multiscale", "--cls", "--scales", "1,1.5", "--epochs", "4", "--lr", "0.01"]
    assert main([recipe, *squares_given, *options, "--output", str(tmp_path / "out")]) == 0
    report = _report(tmp_path / "out")
    assert report["settings"]["blocks"] == 4
    assert report["settings"]["scales"] == [1.0, 1.5]
    assert report["classes"] == ["class_0", "class_1", "class_2"]
    assert report["scores"]["miou"]["value"] > report["constant"]["scores"]["miou"]["value"]


def test_numbers_are_learned_scored_and_written_as_arrays(recipe, tmp_path):
    given = _saved(tmp_path, [hills(seed, 40, 56) for seed in range(14)], test=4)
    options = ["--task", "regression", "--epochs", "20", "--batch-size", "4", "--lr", "0.01"]
    assert main([recipe, *given, *options, "--output", str(tmp_path / "out")]) == 0
    report = _report(tmp_path / "out")
    assert report["scores"]["abs_rel"]["high"] < report["constant"]["scores"]["abs_rel"]["value"] / 1.5
    said = np.load(tmp_path / "out" / "predictions" / "tile_13.npy")
    assert said.shape == (40, 56)
    assert 1.0 <= said.min() <= said.max() <= 5.0
    assert "| AbsRel (lower is better) |" in (tmp_path / "out" / "report.md").read_text()


def _export(path: Path, seed: int) -> Path:
    student = StudentConfig(arch="vit4k_xs", patch_size=8, layerscale=0.0)
    torch.manual_seed(seed)
    vit = build_backbone(student, 48, drop_path=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parents[1] / "recipe.yaml").write_text(RECIPE)
    save_file({f"backbone.{name}": value for name, value in vit.state_dict().items()}, path)
    return path


def test_weights_are_those_of_a_run_or_random_by_the_seed(recipe, tmp_path):
    exports = tmp_path / "run" / "exports"
    first, second = (_export(exports / f"teacher_0000{step}.safetensors", step) for step in (1000, 2000))
    found = backbone_named(str(tmp_path / "run"))
    assert found.facts["name"] == str(second)
    assert found.run == backbone_named(str(first)).run == tmp_path / "run"
    assert not any(parameter.requires_grad for parameter in found.vit.parameters())
    one, same, other = (backbone_named(recipe, None, seed).vit.blocks[0].attn.qkv.weight for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_the_report_of_a_run_lies_in_its_results_and_others_in_evaluations(
    squares_given, recipe, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    export = _export(tmp_path / "run" / "exports" / "teacher_00000900.safetensors", 0)
    for weights in (str(export), recipe):
        assert main([weights, *squares_given, "--epochs", "1"]) == 0
    results = tmp_path / "run" / "results"
    assert _report(results / "dense_segmentation_linear_run_teacher_00000900")["weights"]["sha256"]
    assert _report(tmp_path / "evaluations" / "dense_segmentation_linear_random_small")["weights"]["sha256"] is None


@pytest.mark.parametrize("stage", ["tokens of training pictures", "training the head", "scoring"])
def test_told_to_leave_it_leaves_at_once_without_a_report(squares_given, recipe, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(signals, "_notes", [])
    handlers = {number: signal.getsignal(number) for number in signals._NOTED}
    shown = dense.progress

    def told(items, description, **options):
        for item in shown(items, description, **options):
            if description == stage:
                os.kill(os.getpid(), signal.SIGTERM)
            yield item

    monkeypatch.setattr(dense, "progress", told)
    try:
        given = ["dense", recipe, *squares_given, "--epochs", "2", "--output", str(tmp_path / "out")]
        assert pathfm(given) == EXIT_INTERRUPTED
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not (tmp_path / "out" / "report.json").exists()
    assert len(list((tmp_path / "out").rglob("*.png"))) == (stage == "scoring")


def test_what_is_wrong_is_one_line_before_anything_is_computed(squares_given, recipe, tmp_path):
    for changes, said in [
        (["--output", "x", "--classes", "noise,bright"], "has the value 2, and classes are 0 to 1"),
        (["--output", "x", "--window", "20"], "--window 20 is no whole number of 8 px patches"),
        (["--output", "x", "--task", "regression", "--instances"], "are for --task segmentation"),
        (["--output", "x", "--split", f"{tmp_path / 'labels.csv'}"], "has no column 'split'"),
        (["--output", "x", "--images", "nowhere"], "there is no folder or tar nowhere"),
    ]:
        with pytest.raises(UserError, match=said):
            main([recipe, *squares_given, *changes])
    with pytest.raises(UserError, match=r"there is no nowhere.pth; name a file of weights"):
        main(["nowhere.pth", *squares_given, "--output", "x"])
    with pytest.raises(UserError, match="there is no recipe 'vits4'"):
        main(["random:vits4", *squares_given, "--output", "x"])
    with pytest.raises(UserError, match="random:region reads patch features, not images"):
        main(["random:region", *squares_given, "--output", "x"])
    save_picture(tmp_path / "masks" / "tile_03.png", np.zeros((56, 40), np.uint8))
    with pytest.raises(UserError, match="the mask of tile_03 is 40 x 56 px, its picture 56 x 40"):
        main([recipe, *squares_given, "--output", "x"])


def test_nuclei_are_found_in_fields_that_were_not_learned_from(shared_data, recipe, tmp_path):
    nuclei = shared_data / "nuclei_masks"
    given = ["--images", str(nuclei / "images"), "--masks", str(nuclei / "masks"), "--instances", "--split", "fields"]
    options = ["--epochs", "4", "--lr", "0.01", "--resamples", "200", "--window", "128", "--stride", "128"]
    (tmp_path / "small.yaml").write_text(RECIPE.replace("patch_size: 8", "patch_size: 16").replace("24", "32"))
    assert main([recipe, *given, *options, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    report = _report(tmp_path / "out")
    assert report["classes"] == ["background", "nucleus"]
    assert report["data"]["train"] + report["data"]["test"] == 107
    assert report["scores"]["miou"]["low"] > report["constant"]["scores"]["miou"]["value"] + 0.1
    with (tmp_path / "out" / "split.csv").open() as file:
        rows = list(csv.DictReader(file))
    parts = {part: {row["group"] for row in rows if row["split"] == part} for part in ("train", "test")}
    assert not parts["train"] & parts["test"]
