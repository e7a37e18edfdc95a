"""A backbone's tensors by this package's names, out of files of pathfm, DINO, HIPT, DINOv2, timm and Hugging Face."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pathfm.models.names import backbone_weights


class Found(NamedTuple):
    weights: dict[str, Tensor]  # by our names
    others: list[str]  # names in the file that are none of the backbone's


# Hugging Face's Dinov2 and Dinov2WithRegisters, the rest of a layer's name behind `encoder.layer.N.`
_OF_HUGGING_FACE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
_OF_ITS_LAYERS = {
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
}
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.+)")
_PART_OF_QKV = re.compile(r"attention\.attention\.(query|key|value)\.(weight|bias)")
_BLOCK_OF_TIMM = re.compile(r"(blocks\.\d+\.mlp\.)(fc1|fc2)(\.\w+)")


def backbone_tensors(state_dict: Mapping[str, Tensor]) -> Found:
    """Whichever house the file is of. What is not known is kept under its own name, for the caller to refuse."""
    plain = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    if any(name.endswith("embeddings.cls_token") for name in plain):
        return _of_hugging_face(plain)
    names = backbone_weights({name: name for name in state_dict})  # ours -> the file's
    own = {name: state_dict[theirs] for name, theirs in names.items()}
    kept = {*names.values()}
    others = [name for name in state_dict if name not in kept]
    if not _is_of_timm(own):
        return Found(own, others)
    weights = _of_timm(own)
    return Found({name: tensor for name, tensor in weights.items() if not name.startswith("head.")}, others)


def _of_hugging_face(plain: Mapping[str, Tensor]) -> Found:
    """Query, key and value are joined; a model's own prefix (`dinov2.`) is taken off, and its classifier left out."""
    start = next(name for name in plain if name.endswith("embeddings.cls_token")).removesuffix("embeddings.cls_token")
    weights: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    others = []
    for full_name, tensor in plain.items():
        name = full_name.removeprefix(start)
        layer = _LAYER.fullmatch(name)
        if not full_name.startswith(start) or not (layer or name in _OF_HUGGING_FACE):
            others.append(full_name)
        elif layer is None:
            weights[_OF_HUGGING_FACE[name]] = tensor
        elif part := _PART_OF_QKV.fullmatch(layer[2]):
            parts.setdefault(f"blocks.{layer[1]}.attn.qkv.{part[2]}", {})[part[1]] = tensor
        else:
            weights[f"blocks.{layer[1]}.{_in_block(layer[2])}"] = tensor
    for name, three in parts.items():
        weights[name] = torch.cat([three[part] for part in ("query", "key", "value")])
    return Found(weights, others)


def _in_block(name: str) -> str:
    for theirs, ours in _OF_ITS_LAYERS.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


def _is_of_timm(weights: Mapping[str, Tensor]) -> bool:
    """By what only its models have: `reg_token`, positions without [CLS], SwiGLU of layers called fc1 and fc2."""
    if "pos_embed" not in weights:
        return False
    return "reg_token" in weights or not _is_square(weights["pos_embed"].shape[1] - 1) or _has_packed_swiglu(weights)


def _of_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where [CLS] has no position, its own is part of it already: it gets a position of zero."""
    swiglu = _has_packed_swiglu(weights)
    own = {}
    for name, tensor in weights.items():
        found = _BLOCK_OF_TIMM.fullmatch(name)
        if found and swiglu:
            name = f"{found[1]}{'w12' if found[2] == 'fc1' else 'w3'}{found[3]}"
        own["register_tokens" if name == "reg_token" else name] = tensor
    if _is_square(own["pos_embed"].shape[1]):
        own["pos_embed"] = torch.cat([torch.zeros_like(own["pos_embed"][:, :1]), own["pos_embed"]], dim=1)
    return own


def _has_packed_swiglu(weights: Mapping[str, Tensor]) -> bool:
    into, out_of = weights.get("blocks.0.mlp.fc1.weight"), weights.get("blocks.0.mlp.fc2.weight")
    return into is not None and out_of is not None and into.shape[0] == 2 * out_of.shape[1]


def _is_square(number: int) -> bool:
    return round(number**0.5) ** 2 == number
