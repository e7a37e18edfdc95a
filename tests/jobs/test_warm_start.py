"""A run that begins from another's teacher: what it takes up, what it leaves as it is, and when it ends."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.jobs.journeys import train, weights
from tests.labelled import make_labelled, tuning_settings

BACKBONE = "method.student.backbone."


@pytest.fixture(scope="module")
def teacher(recipe, data, tmp_path_factory) -> Path:
    """What a first run exported."""
    run = tmp_path_factory.mktemp("first") / "run"
    done = train(recipe, data, run, "optim.total_steps=4")
    assert done.returncode == 0, done.stderr
    return run / "exports" / "teacher_00000004.safetensors"


def test_a_run_begins_where_anothers_teacher_stood_and_goes_on_without_its_file(recipe, data, teacher, tmp_path):
    file, run = tmp_path / "teacher.safetensors", tmp_path / "run"
    shutil.copyfile(teacher, file)
    settings = [f"student.pretrained_weights={file}", "optim.total_steps=4", "checkpoint.keep_every_steps=4"]
    settings += ["checkpoint.keep_last=9", "crops.global_crops_size=64"]  # of another grid than it was trained on
    done = train(recipe, data, run, *settings)
    assert done.returncode == 0, done.stderr
    assert "warm start from" in done.stderr
    assert "pos_embed is resampled from 10 to 17 positions" in done.stderr
    given, begun = load_file(file), weights(run, 0)
    for name in (name for name in given if name.startswith("backbone.") and name != "backbone.pos_embed"):
        assert begun[f"method.student.{name}"].equal(given[name])
        assert begun[f"method.teacher.{name}"].equal(given[name])
    kept = json.loads((run / "warm_start.json").read_text())
    assert (len(kept["sha256"]), kept["resized"]) == (64, {"pos_embed": [10, 17]})
    assert all(name.startswith(("dino_head.", "ibot_head.")) for name in kept["left_out"])

    file.unlink()
    (run / "exit.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    again = train(recipe, data, run, *settings)
    assert again.returncode == 0, again.stderr
    assert "goes on from step 0" in again.stderr


def test_blocks_and_backbone_stay_as_they_are_when_told(recipe, data, teacher, tmp_path):
    start = f"student.pretrained_weights={teacher.parent.parent}"  # the run, whose newest teacher is taken
    every = [start, "optim.total_steps=4", "checkpoint.keep_last=9", "optim.warmup_pct=0"]
    for name, setting in {"blocks": "student.freeze_blocks=3", "backbone": "optim.freeze_backbone_pct=1.0"}.items():
        done = train(recipe, data, tmp_path / name, *every, setting)
        assert done.returncode == 0, done.stderr
    before, after = weights(tmp_path / "blocks", 0), weights(tmp_path / "blocks", 4)
    moved = {name.removeprefix(BACKBONE) for name in before if BACKBONE in name and not before[name].equal(after[name])}
    moved = {name for name in moved if not name.startswith("optimizer.")}
    assert {"mask_token", "blocks.3.attn.qkv.weight", "norm.weight"} <= moved
    assert not {
        name for name in moved if name.startswith(("blocks.0.", "blocks.1.", "blocks.2.", "patch_embed", "pos", "cls"))
    }

    before, after = weights(tmp_path / "backbone", 0), weights(tmp_path / "backbone", 4)
    assert all(before[name].equal(after[name]) for name in before if name.startswith(BACKBONE))
    assert not before["method.student.dino_head.mlp.0.weight"].equal(after["method.student.dino_head.mlp.0.weight"])


def test_a_guard_ends_a_run_that_forgets(recipe, data, tmp_path):
    labelled = make_labelled(tmp_path / "labelled")
    settings = [*tuning_settings(labelled), "tune.tune_every_samples=8", "tune.num_workers=0", "tune.bootstrap=100"]
    settings += ["tune.guard.max_drop=0.0", "tune.guard.action=stop", "optim.base_lr=1.0", "optim.warmup_pct=0"]
    settings += ["teacher.momentum_teacher=0.0", "teacher.final_momentum_teacher=0.0", "optim.clip_grad=0"]
    settings += ["student.layerscale=0.0"]  # so that a network without any training tells colours apart
    done = train(recipe, data, tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    ended = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert "stopped by tune.guard: the teacher fell too far below auc_20" in ended["reason"]
    (alarm,) = [json.loads(line) for line in (tmp_path / "run" / "alarms.jsonl").read_text().splitlines()]
    assert (alarm["alarm"], alarm["step"]) == ("forgetting", ended["step"])
    first = json.loads((tmp_path / "run" / "results" / "tuning.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    again = train(recipe, data, tmp_path / "run", *settings)
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["student.pretrained_weights=nowhere.pth"], "error: there is no nowhere.pth; name a file of weights"),
        (["student.pretrained_weights={teacher}", "student.arch=vit_small"], "does not fit this student"),
        (["student.pretrained_weights={teacher}", "student.freeze_blocks=12"], "leaves none of 12 blocks to train"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(recipe, data, teacher, tmp_path, settings, message):
    done = train(recipe, data, tmp_path / "run", *(setting.format(teacher=teacher) for setting in settings))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
