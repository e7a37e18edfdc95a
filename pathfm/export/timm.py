"""A folder whose weights timm loads into its own VisionTransformer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pathfm.batch import IMAGENET_MEAN, IMAGENET_STD
from pathfm.export.carried import (
    Resampling,
    Shape,
    Written,
    demand_images,
    positions_at,
    save_tensors,
    shape_of,
    whole_patches,
    with_biases,
    with_layerscale,
)
from pathfm.files import write_json
from pathfm.models.build import SIZES, Size
from pathfm.models.config import Architecture
from pathfm.models.pretrained import Pretrained

_THEIRS = Resampling(antialias=True, offset=0.0)
_RENAMED = {"register_tokens": "reg_token"}
_IN_SWIGLU = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
# timm's entry points of DINOv2's models, and those that stand for any other vision transformer
_DINOV2: dict[Architecture, str] = {
    "vit_small": "vit_small_patch14",
    "vit_base": "vit_base_patch14",
    "vit_large": "vit_large_patch14",
    "vit_giant2": "vit_giant_patch14",
}
_PLAIN: dict[Architecture, str] = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
}
_ANY = "vit_base_patch16_224"
_ANY_SWIGLU = "vit_giant_patch14_dinov2"  # the one whose feed-forward is SwiGLU: a layer's class is nothing for JSON
_LAYERSCALE = 1e-5  # any but None; the file's factors take its place


def write_timm(folder: Path, model: Pretrained, image_size: int | None) -> Written:
    """model.safetensors, and config.json with the name and arguments for `timm.create_model`."""
    demand_images(model, "timm")
    vit, shape = model.vit, shape_of(model.vit)
    size = whole_patches(shape, image_size)
    any_size = shape.resampling == _THEIRS
    size_there = shape.learned_size if any_size else size
    name, arguments = model_of(shape)
    arguments |= {"img_size": size_there, "num_classes": 0} | ({"dynamic_img_size": True} if any_size else {})
    weights = {**vit.state_dict(), "pos_embed": positions_at(vit, size_there)}
    save_tensors(their_names(weights, shape), folder / "model.safetensors")
    write_json(folder / "config.json", config_of(name, arguments, shape.width, size))
    return Written(size, any_size, _loading(shape), tuple(_notes(shape, size, any_size)))


def model_of(shape: Shape) -> tuple[str, dict[str, Any]]:
    """An entry point of timm and what it must be told; an official DINOv2 model needs no words beside its name."""
    arch = next((arch for arch, size in SIZES.items() if size == Size(shape.width, shape.depth, shape.num_heads)), None)
    is_dinov2 = shape.patch_size == 14 and shape.has_layerscale and shape.is_swiglu == (arch == "vit_giant2")
    if arch in _DINOV2 and is_dinov2 and shape.num_registers in (0, 4):
        return _DINOV2[arch] + ("_reg4_dinov2" if shape.num_registers else "_dinov2"), {}
    arguments: dict[str, Any] = {
        "patch_size": shape.patch_size,
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "reg_tokens": shape.num_registers,
        "no_embed_class": shape.num_registers > 0,
    }
    if shape.is_swiglu:  # both halves are one layer there; the half keeps int() from rounding down
        return _ANY_SWIGLU, {**arguments, "mlp_ratio": (2 * shape.hidden + 0.5) / shape.width}
    arguments["mlp_ratio"] = (shape.hidden + 0.5) / shape.width
    if shape.has_layerscale:
        arguments["init_values"] = _LAYERSCALE
    return (_PLAIN.get(arch, _ANY) if arch else _ANY), arguments


def their_names(weights: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Ours as they call them. With registers, the position of [CLS] is a part of its token there."""
    complete = with_biases({name: value for name, value in weights.items() if name != "mask_token"})
    if shape.is_swiglu:
        complete = with_layerscale(complete, shape.depth)
    if shape.num_registers:
        positions = complete["pos_embed"]
        complete |= {"cls_token": complete["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}
    return {_renamed(name): value for name, value in complete.items()}


def config_of(name: str, arguments: Mapping[str, Any], width: int, image_size: int) -> dict[str, Any]:
    """As the hub of Hugging Face keeps timm's models, so that `hf-hub:` and `local-dir:` find it too."""
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": width,
        "model_args": dict(arguments),
        "pretrained_cfg": {
            "input_size": [3, image_size, image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _renamed(name: str) -> str:
    for ours, theirs in _IN_SWIGLU.items():
        name = name.replace(ours, theirs)
    return _RENAMED.get(name, name)


def _notes(shape: Shape, size: int, any_size: bool) -> list[str]:
    notes = []
    if not any_size:
        notes.append(
            f"It takes images of {size} px alone: timm resamples positions for other sizes in another way than this "
            "model was trained with. Export again with --image-size for another."
        )
    if shape.is_swiglu and not shape.has_layerscale:
        notes.append("The model has no LayerScale; its factors here are ones, which change nothing.")
    return notes


def _loading(shape: Shape) -> str:
    return f"""\
import json, timm

config, weights = json.load(open(f"{{FOLDER}}/config.json")), f"{{FOLDER}}/model.safetensors"
model = timm.create_model(config["architecture"], **config["model_args"], checkpoint_path=weights).eval()
tokens = model.forward_features(images)
cls, patches = tokens[:, 0], tokens[:, {1 + shape.num_registers}:]"""
