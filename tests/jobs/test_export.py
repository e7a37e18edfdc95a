"""`pathfm export`: which weights are taken, what is written, what is said and refused."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pathfm.errors import UserError
from pathfm.jobs.export import main
from pathfm.models.pretrained import load_backbone
from tests.features.small import STUDENT, patch_backbone, region_backbone, saved_teacher

RECIPE = {
    "method": "dino",
    "train": {
        "dataset_path": "Pathology:root=/home/someone/tiles:extra=/scratch/index:subset=train",
        "output_dir": "/home/someone/runs/mine",
        "global_batch_size": 512,
        "seed": 7,
    },
    "student": STUDENT.model_dump(mode="json", exclude={"pretrained_weights", "pretrained_allow"}),
    "wandb": {"project": "secret"},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """With teachers of steps 9 and 12, of which the first is the best, and two segments."""
    directory = tmp_path / "runs" / "mine"
    for step in (9, 12):
        saved_teacher(directory / "exports" / f"teacher_{step:08d}.pth", patch_backbone(step))
    (directory / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (directory / "data.json").write_text(json.dumps({"samples": 12345, "fingerprint": "0"}))
    segment = {"commit": "0123456789abcdef", "diff": "", "host": "node7", "versions": {"pathfm": "0.1.0"}}
    segments = [{**segment, "ranks": 8, "from_step": 0}, {**segment, "ranks": 4, "from_step": 10}]
    (directory / "provenance.json").write_text(json.dumps(segments))
    (directory / "metrics.jsonl").write_text('{"step": 12, "samples_skipped": 3}\n{"step": 1')
    (directory / "results").mkdir()
    (directory / "results" / "tuning.jsonl").write_text(
        "".join(tuning(step, auc) for step, auc in ((9, 0.9), (12, 0.8)))
    )
    (directory / "checkpoints").mkdir()
    best = {"step": 9, "metric": "auc_20", "value": 0.9}
    (directory / "checkpoints" / "best.json").write_text(json.dumps(best))
    return directory


def tuning(step: int, auc: float) -> str:
    interval = {"teacher": {"auc_20": [auc - 0.05, auc + 0.05]}}
    line = {"step": step, "teacher": {"acc_20": 0.7, "auc_20": auc}, "intervals": interval, "test": {"samples": 321}}
    return json.dumps(line) + "\n"


def export(*words: object) -> int:
    return main([str(word) for word in words])


def same_backbone(file: Path, seed: int) -> bool:
    found, expected = load_backbone(file).vit.state_dict(), patch_backbone(seed).state_dict()
    return found.keys() == expected.keys() and all(value.equal(expected[name]) for name, value in found.items())


def test_a_run_gives_its_newest_teacher_or_the_best_where_there_is_one(run, capsys):
    assert export("mine", "--to", "safetensors", "--runs-dir", run.parent) == 0
    assert same_backbone(run / "exports" / "safetensors_teacher_00000012" / "model.safetensors", 12)
    assert "verified: read back by pathfm" in capsys.readouterr().out
    saved_teacher(run / "exports" / "teacher_best.pth", patch_backbone(9))
    assert export(run, "--to", "safetensors") == 0
    assert same_backbone(run / "exports" / "safetensors_teacher_best" / "model.safetensors", 9)


def test_the_ancestors_file_has_their_keys_and_no_heads(run, tmp_path):
    assert export(run, "--to", "ancestor", "--output", tmp_path / "out") == 0
    found = torch.load(tmp_path / "out" / "teacher.pth", weights_only=True)
    assert found.keys() == {"teacher"}
    assert found["teacher"].keys() == {f"backbone.{name}" for name in patch_backbone().state_dict()}


def test_what_shapes_do_not_tell_goes_with_the_file(run, tmp_path):
    assert export(run, "--to", "hub", "--output", tmp_path / "out") == 0
    again = load_backbone(tmp_path / "out" / "weights.pth")
    assert again.student.interpolate_offset == STUDENT.interpolate_offset == 0.0
    assert (again.student.arch, again.student.layerscale) == ("vit_tiny", 0.0)


def test_the_card_tells_what_the_runs_files_tell_and_no_folders(run, tmp_path):
    assert export(run / "exports" / "teacher_00000009.pth", "--to", "hub", "--output", tmp_path / "out") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for told in (
        "# mine",
        "data `Pathology:root=tiles:extra=index:subset=train`, 12,345 samples",
        "Global batch 512, seed 7",
        "3 samples could not be decoded",
        "Weights of step 9; the run has logged up to step 12",
        "Ran commit 0123456789ab (pathfm 0.1.0) on 8 ranks, started at step 0",
        "on 4 ranks, started at step 10",
        "| last | 12 | 0.700 | 0.800 (0.750 to 0.850) |",
        "| best | 9 | 0.700 | 0.900 (0.850 to 0.950) |",
        "The best is so by auc_20 of the teacher.",
        "over 321 test samples",
        "method: dino",
        "This export was verified: loaded by torch",
    ):
        assert told in card
    for private in ("someone", "/scratch", "node7", "secret"):
        assert private not in card


def test_the_card_of_a_lone_file_says_what_is_unknown(tmp_path):
    path = saved_teacher(tmp_path / "lone.pth", patch_backbone())
    assert export(path, "--to", "safetensors") == 0
    card = (tmp_path / "safetensors_lone" / "README.md").read_text()
    for told in ("This run was not tuned", "no provenance.json", "lay in no run's directory", "of an unknown step"):
        assert told in card
    assert "## Recipe" not in card


def test_a_library_that_is_missing_is_said_and_the_export_stays(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert export(run, "--to", "timm", "--output", tmp_path / "out") == 0
    said = "not verified: timm cannot be imported"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_an_export_that_fails_leaves_nothing(run, tmp_path):
    with pytest.raises(UserError, match="take 48 or 64"):
        export(run, "--to", "timm", "--output", tmp_path / "out", "--image-size", 50)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("target", ["timm", "huggingface", "hub", "onnx"])
def test_region_models_are_refused_where_images_are_read(target, tmp_path):
    path = saved_teacher(tmp_path / "region.pth", region_backbone())
    with pytest.raises(UserError, match=r"reads patch features, which .* does not; take --to safetensors or ancestor"):
        export(path, "--to", target)


def test_region_models_are_written_as_plain_files(tmp_path):
    path = saved_teacher(tmp_path / "region.pth", region_backbone())
    assert export(path, "--to", "safetensors") == 0
    assert load_backbone(tmp_path / "safetensors_region" / "model.safetensors").reads_features
    assert "[B, 192, rows, columns]" in (tmp_path / "safetensors_region" / "README.md").read_text()


def test_what_is_there_is_not_written_over(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out is there; remove it, or choose another --output"):
        export(run, "--to", "hub", "--output", tmp_path / "out")


def test_what_cannot_be_exported_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match=r"there is no file .*nowhere.pth"):
        export(tmp_path / "nowhere.pth", "--to", "hub")
    with pytest.raises(UserError, match="keeps the positions that were learned"):
        export(run, "--to", "hub", "--image-size", 64)
    for file in (run / "exports").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="run mine has no exported teacher"):
        export(run, "--to", "hub")
