"""Files of tensors under names of our own: the official DINOv2 names, plain or as the ancestors keep them.

The settings that shapes do not tell lie beside them in recipe.yaml, where `load_backbone` looks.
"""

from pathlib import Path

import torch
import yaml

from pathfm.errors import UserError
from pathfm.export.carried import Written, demand_images, save_tensors, saved, shape_of
from pathfm.models.pretrained import Pretrained

_NO_SETTINGS_OF_WEIGHTS = {"pretrained_weights", "pretrained_allow", "freeze_blocks", "attention", "block_chunks"}
SETTINGS = "recipe.yaml"


def write_hub(folder: Path, model: Pretrained, image_size: int | None) -> Written:
    """weights.pth: a state dict by the official names, for `torch.hub.load`."""
    demand_images(model, "torch.hub")
    _demand_no_size(image_size, "hub")
    torch.save(saved(model.vit.state_dict()), folder / "weights.pth")
    _write_settings(folder, model)
    loading = """\
import torch

model = torch.hub.load(REPO, "pathfm", source="local", weights=f"{FOLDER}/weights.pth")
features = model.forward_features(images)
cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]"""
    return Written(shape_of(model.vit).learned_size, True, loading, tuple(_hub_notes(model)))


def write_safetensors(folder: Path, model: Pretrained, image_size: int | None) -> Written:
    """model.safetensors: the backbone, nothing renamed."""
    _demand_no_size(image_size, "safetensors")
    save_tensors(model.vit.state_dict(), folder / "model.safetensors")
    _write_settings(folder, model)
    return Written(_size(model), True, _loading_here("model.safetensors"))


def write_ancestor(folder: Path, model: Pretrained, image_size: int | None) -> Written:
    """teacher.pth: {"teacher": {"backbone.NAME": tensor}}, without heads."""
    _demand_no_size(image_size, "ancestor")
    weights = {f"backbone.{name}": value for name, value in saved(model.vit.state_dict()).items()}
    torch.save({"teacher": weights}, folder / "teacher.pth")
    _write_settings(folder, model)
    return Written(_size(model), True, _loading_here("teacher.pth"))


def _demand_no_size(image_size: int | None, target: str) -> None:
    if image_size is not None:
        raise UserError(f"--to {target} keeps the positions that were learned, for images of any size; no --image-size")


def _write_settings(folder: Path, model: Pretrained) -> None:
    settings = model.student.model_dump(mode="json", exclude=_NO_SETTINGS_OF_WEIGHTS)
    (folder / SETTINGS).write_text(yaml.safe_dump({"student": settings}, sort_keys=False), encoding="utf-8")


def _size(model: Pretrained) -> int:
    """px, or for a model that reads patch features rows of its grid."""
    return model.student.patch_size * model.vit.learned_grid


def _hub_notes(model: Pretrained) -> list[str]:
    vit, size = model.vit, shape_of(model.vit).learned_size
    notes = [
        f"DINOv2's own code takes weights.pth with img_size={size}, interpolate_antialias={vit.interpolate_antialias}, "
        f"interpolate_offset={vit.interpolate_offset}{'' if shape_of(vit).has_layerscale else ', init_values=None'}."
    ]
    if vit.mask_token is None:
        notes.append("The file has no mask_token, as the model masked nothing; there, load it with strict=False.")
    return notes


def _loading_here(file: str) -> str:
    return f"""\
from pathlib import Path
from pathfm.models.pretrained import load_backbone

features = load_backbone(Path(FOLDER) / "{file}").vit([images])[0]
cls, patches = features.cls, features.patches"""
