"""Weights as timm and transformers save them are taken up by name: as a backbone, and as the start of a run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pathfm.models.config import StudentConfig
from pathfm.models.pretrained import load_backbone

IMAGES = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


def drawn(model: nn.Module) -> nn.Module:
    """With weights that make every layer count."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny(**settings: object) -> StudentConfig:
    return StudentConfig(arch="vit4k_xs", patch_size=14, layerscale=1e-5, drop_path_rate=0.0, **settings)


def own_features(path: Path, student: StudentConfig) -> Tensor:
    with torch.no_grad():
        return load_backbone(path, student).vit([IMAGES])[0].cls


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_transformers_models_are_read_from_their_folder(tmp_path: Path, registers: int, swiglu: bool):
    from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    shape = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "image_size": 56, "patch_size": 14}
    if registers:
        config = Dinov2WithRegistersConfig(**shape, use_swiglu_ffn=swiglu, num_register_tokens=registers)
        theirs = drawn(Dinov2WithRegistersModel(config))
    else:
        theirs = drawn(Dinov2Model(Dinov2Config(**shape, use_swiglu_ffn=swiglu)))
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(pixel_values=IMAGES).last_hidden_state[:, 0]
    student = tiny(num_register_tokens=registers, ffn_layer="swiglu" if swiglu else "mlp")
    torch.testing.assert_close(own_features(tmp_path, student), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("registers", [0, 4])
def test_timms_models_are_read(tmp_path: Path, registers: int):
    import timm

    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    shape = {"embed_dim": 192, "depth": 6, "num_heads": 6, "img_size": 56, "num_classes": 0}
    theirs = drawn(timm.create_model(name, pretrained=False, **shape))
    save_file({key: tensor.contiguous() for key, tensor in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = theirs.forward_features(IMAGES)[:, 0]
    student = tiny(num_register_tokens=registers)
    torch.testing.assert_close(own_features(tmp_path / "model.safetensors", student), expected, atol=1e-4, rtol=1e-4)
