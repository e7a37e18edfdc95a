"""Weights of other people and of our own runs; whatever does not fit is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pathfm.errors import UserError
from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig
from pathfm.models.pretrained import load_backbone
from tests.features.small import patch_backbone, region_backbone, saved_teacher


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone."])
def test_a_backbone_is_found_whatever_stands_before_its_names(prefix, tmp_path):
    vit = patch_backbone()
    path = saved_teacher(tmp_path / "weights.pth", vit, prefix) if prefix else tmp_path / "weights.pth"
    if not prefix:
        torch.save(vit.state_dict(), path)
    found = load_backbone(path)
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in found.vit.state_dict().items())
    assert found.left_out == ({"head": 1} if prefix else {})
    assert not found.vit.training
    assert not any(parameter.requires_grad for parameter in found.vit.parameters())


def test_safetensors_are_read_too(tmp_path):
    vit = patch_backbone()
    save_file({f"backbone.{name}": value for name, value in vit.state_dict().items()}, tmp_path / "w.safetensors")
    assert torch.equal(load_backbone(tmp_path / "w.safetensors").vit.pos_embed, vit.pos_embed)


@pytest.mark.parametrize(
    "student",
    [
        StudentConfig(arch="vit_small", patch_size=16, layerscale=0.0),
        StudentConfig(arch="vit_tiny", patch_size=14, ffn_layer="swiglu", qkv_bias=False),
        StudentConfig(
            arch="vit_tiny", patch_size=14, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0
        ),
        StudentConfig(arch="vit4k_xs", patch_size=1, feature_width=384, layerscale=0.0),
    ],
)
def test_the_shapes_tell_what_a_backbone_is(student, tmp_path):
    torch.save(build_backbone(student, 6 * student.patch_size, drop_path=False).state_dict(), tmp_path / "w.pth")
    found = load_backbone(tmp_path / "w.pth")
    assert found.student == student.model_copy(update={"drop_path_rate": found.student.drop_path_rate})
    assert found.reads_features == (student.feature_width is not None)


def test_the_recipe_of_a_run_tells_what_the_shapes_do_not(tmp_path):
    path = saved_teacher(tmp_path / "exports" / "teacher_00000001.pth", patch_backbone())
    (tmp_path / "recipe.yaml").write_text(
        "student: {arch: vit_tiny, patch_size: 16, layerscale: 0.0, interpolate_offset: 0.25}\n"
    )
    assert load_backbone(path).student.interpolate_offset == 0.25


def test_positions_of_another_grid_than_that_of_the_images_are_resampled(tmp_path):
    found = load_backbone(saved_teacher(tmp_path / "w.pth", patch_backbone()))
    assert found.vit.pos_embed.shape[1] == 1 + 3 * 3
    assert found.vit([torch.zeros(1, 3, 64, 64)])[0].cls.shape == (1, 192)


def altered(folder: Path, **changes: torch.Tensor | None) -> Path:
    weights = {**patch_backbone().state_dict(), **{name.replace("__", "."): value for name, value in changes.items()}}
    torch.save({name: value for name, value in weights.items() if value is not None}, folder / "w.pth")
    return folder / "w.pth"


def test_every_key_is_accounted_for(tmp_path):
    path = altered(tmp_path, norm__bias=None, norm__extra=torch.zeros(1), norm__weight=torch.zeros(7))
    with pytest.raises(UserError) as caught:
        load_backbone(path)
    said = str(caught.value)
    for part in ("missing: norm.bias", "unexpected: norm.extra", r"of another shape: norm.weight [7] for [192]"):
        assert part in said


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": torch.zeros(1)}, "holds no vision transformer: its tensors are a"),
        ({"step": 3}, "no tensors under step"),
        (torch.zeros(3), "holds Tensor, not named tensors"),
        ({}, "holds dict, not named tensors"),
        ({"cls_token": torch.zeros(1, 1, 9), "pos_embed": torch.zeros(1, 5, 9)}, "9 wide and 0 blocks deep"),
    ],
)
def test_other_files_are_told_by_what_they_hold(content, reason, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=reason):
        load_backbone(tmp_path / "w.pth")


class RunsCode:
    def __reduce__(self):
        return exec, ("raise SystemExit('code from a file of weights was run')",)


def test_code_in_a_file_is_never_run(tmp_path):
    torch.save({"teacher": RunsCode()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds code or objects, which are not loaded"):
        load_backbone(tmp_path / "w.pth")


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_and_missing_files_are_named(name, tmp_path):
    with pytest.raises(UserError, match=f"there is no file .*{name}"):
        load_backbone(tmp_path / name)
    (tmp_path / name).write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match=f"{name} is "):
        load_backbone(tmp_path / name)


def test_a_region_backbone_is_one_that_reads_features(tmp_path):
    assert load_backbone(saved_teacher(tmp_path / "w.pth", region_backbone())).student.feature_width == 192
