from pathlib import Path

import torch
from safetensors.torch import load_file

from pathfm.export.teacher import export_teacher


def test_both_files_hold_the_same_weights_under_the_ancestors_keys(tmp_path: Path):
    teacher = {"backbone.norm.weight": torch.rand(3), "dino_head.mlp.0.bias": torch.rand(2).bfloat16()}
    teacher["backbone.tied"] = teacher["backbone.norm.weight"]  # safetensors refuses shared memory
    pth, tensors = export_teacher(teacher, tmp_path / "exports", 12)
    assert pth.name == "teacher_00000012.pth"
    old, new = torch.load(pth, weights_only=True), load_file(tensors)
    assert old.keys() == {"teacher"}
    assert old["teacher"].keys() == new.keys() == teacher.keys()
    assert tensors.stat().st_mode == pth.stat().st_mode  # whoever may read one may read the other
    assert all(torch.equal(teacher[name], found[name]) for found in (old["teacher"], new) for name in teacher)
