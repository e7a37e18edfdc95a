"""A folder that transformers' Dinov2Model or Dinov2WithRegistersModel loads."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathfm.batch import IMAGENET_MEAN, IMAGENET_STD
from pathfm.errors import UserError
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
from pathfm.models.layers import NORM_EPS
from pathfm.models.pretrained import Pretrained

# The names that the published DINOv2 weights have there; newer versions of the library rename them as they load.
_OUTSIDE_BLOCKS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
_IN_BLOCKS = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
    "ls2.gamma": "layer_scale2.lambda1",
}
_QKV = ("query", "key", "value")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_END = re.compile(r"\.(weight|bias)$")
_MLP_RATIO = 4


def write_huggingface(folder: Path, model: Pretrained, image_size: int | None) -> Written:
    """config.json, model.safetensors, preprocessor_config.json. Raises `UserError` for what the library cannot be."""
    demand_images(model, "transformers")
    vit, shape = model.vit, shape_of(model.vit)
    size = whole_patches(shape, image_size)
    if shape.hidden != _hidden_there(shape):
        raise UserError(f"transformers has no feed-forward layer {shape.hidden} wide in a model of width {shape.width}")
    theirs = Resampling(antialias=shape.num_registers > 0, offset=0.0)
    any_size = shape.resampling == theirs
    weights: dict[str, Tensor] = dict(vit.state_dict())
    if not any_size:
        weights["pos_embed"] = positions_at(vit, size)
    if shape.num_registers and "mask_token" not in weights:
        weights["mask_token"] = torch.zeros(1, shape.width)
    config = config_of(shape, shape.learned_size if any_size else size, has_mask_token="mask_token" in weights)
    weights = their_names(with_layerscale(with_biases(weights), shape.depth))
    save_tensors(weights, folder / "model.safetensors")
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", preprocessor_of(size))
    return Written(size, any_size, _loading(shape, config["architectures"][0]), tuple(_notes(shape, size, any_size)))


def their_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours as they call them; query, key and value come apart."""
    theirs = {}
    for name, tensor in weights.items():
        block = _BLOCK.fullmatch(name)
        if block is None:
            theirs[_renamed(name, _OUTSIDE_BLOCKS)] = tensor
        elif block[2].startswith("attn.qkv."):
            for part, third in zip(_QKV, tensor.chunk(3), strict=True):
                ending = block[2].removeprefix("attn.qkv.")
                theirs[f"encoder.layer.{block[1]}.attention.attention.{part}.{ending}"] = third
        else:
            theirs[f"encoder.layer.{block[1]}.{_renamed(block[2], _IN_BLOCKS)}"] = tensor
    return theirs


def config_of(shape: Shape, image_size: int, *, has_mask_token: bool) -> dict[str, Any]:
    registers = shape.num_registers
    return {
        "architectures": ["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if registers else "dinov2",
        "hidden_size": shape.width,
        "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.num_heads,
        "mlp_ratio": _MLP_RATIO,
        "hidden_act": "gelu",
        "layer_norm_eps": NORM_EPS,
        "image_size": image_size,
        "patch_size": shape.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "layerscale_value": 1.0,
        "drop_path_rate": 0.0,
        "use_swiglu_ffn": shape.is_swiglu,
        **({"num_register_tokens": registers} if registers else {"use_mask_token": has_mask_token}),
    }


def preprocessor_of(image_size: int) -> dict[str, Any]:
    """The shorter side is scaled to the image size and the middle taken, as tuning does it here."""
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }


def _renamed(name: str, table: Mapping[str, str]) -> str:
    ending = "" if name in table else f".{found[1]}" if (found := _END.search(name)) else ""
    return table[name.removesuffix(ending)] + ending


def _hidden_there(shape: Shape) -> int:
    hidden = shape.width * _MLP_RATIO
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if shape.is_swiglu else hidden


def _notes(shape: Shape, size: int, any_size: bool) -> list[str]:
    notes = []
    if not any_size:
        notes.append(
            f"Give images of {size} px: transformers resamples positions for other sizes in another way than this "
            "model was trained with, so features of other sizes differ a little."
        )
    if not shape.has_layerscale:
        notes.append("The model has no LayerScale; its factors here are ones, which change nothing.")
    return notes


def _loading(shape: Shape, architecture: str) -> str:
    return f"""\
from transformers import {architecture}

model = {architecture}.from_pretrained(FOLDER).eval()
tokens = model(pixel_values=images).last_hidden_state
cls, patches = tokens[:, 0], tokens[:, {1 + shape.num_registers}:]"""
