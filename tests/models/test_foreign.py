"""Files of other houses: a tiny backbone is written as they would write it, and read back."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pathfm.models.foreign import backbone_tensors
from pathfm.models.pretrained import read_backbone
from pathfm.models.vit import ViT


def tiny(**settings: object) -> ViT:
    torch.manual_seed(0)
    shape = {"image_size": 56, "patch_size": 14, "width": 36, "num_heads": 3, "drop_path_rates": [0.0] * 2}
    vit = ViT(**{**shape, "layerscale": 0.1, **settings})
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return vit


def as_hugging_face(weights: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """As transformers' Dinov2Model names them."""
    names = {
        "cls_token": "embeddings.cls_token",
        "mask_token": "embeddings.mask_token",
        "register_tokens": "embeddings.register_tokens",
        "pos_embed": "embeddings.position_embeddings",
        "norm": "layernorm",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "attn.proj": "attention.output.dense",
        "ls1.gamma": "layer_scale1.lambda1",
        "ls2.gamma": "layer_scale2.lambda1",
        "mlp.w12": "mlp.weights_in",
        "mlp.w3": "mlp.weights_out",
    }
    theirs = {}
    for name, tensor in weights.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        rest = block[2] if block else name
        start = f"{prefix}encoder.layer.{block[1]}." if block else prefix
        if rest.startswith("attn.qkv"):
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs[f"{start}attention.attention.{part}.{rest.rpartition('.')[2]}"] = third
            continue
        known = next((known for known in names if rest == known or rest.startswith(f"{known}.")), None)
        theirs[start + (names[known] + rest.removeprefix(known) if known else rest)] = tensor
    return theirs


def as_timm(weights: dict[str, Tensor], *, class_has_position: bool) -> dict[str, Tensor]:
    """As timm's vit_*_dinov2 names them."""
    theirs = {
        re.sub(r"mlp\.w12", "mlp.fc1", re.sub(r"mlp\.w3", "mlp.fc2", name)).replace(
            "register_tokens", "reg_token"
        ): tensor
        for name, tensor in weights.items()
        if name != "mask_token"
    }
    if not class_has_position:
        theirs["cls_token"] = theirs["cls_token"] + theirs["pos_embed"][:, :1]
        theirs["pos_embed"] = theirs["pos_embed"][:, 1:]
    return theirs


VARIANTS = [{}, {"num_register_tokens": 4}, {"ffn_layer": "swiglu"}, {"ffn_layer": "swiglu", "num_register_tokens": 4}]


@pytest.mark.parametrize("prefix", ["", "dinov2."])
@pytest.mark.parametrize("variant", VARIANTS)
def test_hugging_faces_names_are_read_with_query_key_and_value_joined(variant, prefix):
    own = tiny(**variant).state_dict()
    found = backbone_tensors({**as_hugging_face(own, prefix), "classifier.weight": torch.zeros(3, 36)})
    assert found.others == ["classifier.weight"]
    assert found.weights.keys() == own.keys()
    assert all(tensor.equal(own[name]) for name, tensor in found.weights.items())


@pytest.mark.parametrize("class_has_position", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_timms_names_give_the_same_features(variant, class_has_position):
    vit = tiny(**variant)
    found = backbone_tensors(as_timm(vit.state_dict(), class_has_position=class_has_position))
    again = tiny(**variant, has_mask_token=False)
    again.load_state_dict(found.weights)
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(again([images])[0].cls, vit([images])[0].cls)


def test_a_folder_of_hugging_face_is_read(tmp_path: Path):
    own = tiny().state_dict()
    save_file(
        {name: tensor.contiguous() for name, tensor in as_hugging_face(own).items()}, tmp_path / "model.safetensors"
    )
    found = read_backbone(tmp_path / "model.safetensors")
    assert found.weights.keys() == own.keys()


def test_a_file_of_ours_and_of_the_ancestors_stays_what_it_was():
    own = tiny().state_dict()
    teacher = {**{f"backbone.{name}": tensor for name, tensor in own.items()}, "dino_head.mlp.0.weight": torch.zeros(2)}
    found = backbone_tensors(teacher)
    assert found.weights.keys() == own.keys()
    assert found.others == ["dino_head.mlp.0.weight"]
