"""The backbone against DINOv2's recorded features, and what packing, masking, drop path and bf16 must not change."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pathfm.errors import UserError
from pathfm.models.build import build_backbone
from pathfm.models.config import StudentConfig
from pathfm.models.names import unchunked
from pathfm.models.vit import Features, ViT, as_grid

TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}
RECORDED = ("mlp", "reg4_antialias", "swiglu", "chunks")


class Recorded:
    """One golden file: the recorded arrays and a model with the recorded weights."""

    def __init__(self, path: Path) -> None:
        self.arrays = np.load(path)
        config = ast.literal_eval(str(self.arrays["config"]))
        self.vit = ViT(
            image_size=config["img_size"],
            patch_size=config["patch_size"],
            width=config["embed_dim"],
            num_heads=config["num_heads"],
            drop_path_rates=[0.0] * config["depth"],
            layerscale=config["init_values"],
            ffn_layer=config.get("ffn_layer", "mlp"),
            num_register_tokens=config.get("num_register_tokens", 0),
            interpolate_antialias=config.get("interpolate_antialias", False),
            interpolate_offset=config.get("interpolate_offset", 0.1),
        )
        weights = {key.removeprefix("sd/"): self[key] for key in self.arrays.files if key.startswith("sd/")}
        self.vit.load_state_dict(unchunked(weights), strict=True)
        self.sizes = [key.removesuffix("/x") for key in self.arrays.files if key.endswith("/x")]

    def __getitem__(self, key: str) -> Tensor:
        return torch.from_numpy(self.arrays[key])


@pytest.fixture(scope="module", params=RECORDED)
def recorded(request: pytest.FixtureRequest, golden_dir: Path) -> Recorded:
    return Recorded(golden_dir / f"dinov2_vit_{request.param}.npz")


@pytest.fixture
def tiny_vit() -> ViT:
    torch.manual_seed(0)
    return small_vit(num_register_tokens=2)


def small_vit(drop_path_rate: float = 0.0, **settings: object) -> ViT:
    return ViT(
        image_size=56,
        patch_size=14,
        width=32,
        num_heads=2,
        drop_path_rates=[drop_path_rate] * 2,
        layerscale=1.0,
        **settings,
    )


def assert_recorded(features: Features, recorded: Recorded, name: str) -> None:
    for ours, theirs in (("cls", "cls"), ("registers", "reg"), ("patches", "patch"), ("prenorm", "prenorm")):
        torch.testing.assert_close(getattr(features, ours), recorded[f"{name}/{theirs}"], **TOLERANCE)


def test_features_equal_the_recorded_ones_at_every_size(recorded: Recorded) -> None:
    assert {"global224", "local98", "rect"} <= set(recorded.sizes)
    for name in recorded.sizes:
        (features,) = recorded.vit([recorded[f"{name}/x"]])
        assert_recorded(features, recorded, name)


def test_features_of_masked_crops_equal_the_recorded_ones(recorded: Recorded) -> None:
    for name in recorded.sizes:
        (features,) = recorded.vit([recorded[f"{name}/x"]], [recorded[f"{name}/mask"]])
        assert_recorded(features, recorded, f"{name}_masked")


def test_all_sizes_packed_in_one_pass_equal_the_recorded_features(recorded: Recorded) -> None:
    crops = [recorded[f"{name}/x"] for name in recorded.sizes]
    masks = [recorded[f"{name}/mask"] if number % 2 else None for number, name in enumerate(recorded.sizes)]
    for number, features in enumerate(recorded.vit(crops, masks)):
        name = recorded.sizes[number] + ("_masked" if number % 2 else "")
        assert_recorded(features, recorded, name)


def test_the_last_two_blocks_outputs_equal_the_recorded_ones(recorded: Recorded) -> None:
    for number, features in enumerate(recorded.vit.intermediate_layers(recorded["global224/x"], 2)):
        torch.testing.assert_close(features.cls, recorded[f"intermediate{number}/cls"], **TOLERANCE)
        torch.testing.assert_close(
            as_grid(features.patches, 16, 16), recorded[f"intermediate{number}/patch"], **TOLERANCE
        )


def test_every_recorded_array_is_compared(recorded: Recorded) -> None:
    outputs = ("cls", "reg", "patch", "prenorm")
    compared = {f"{name}{suffix}/{o}" for name in recorded.sizes for suffix in ("", "_masked") for o in outputs}
    inputs = {f"{name}/{i}" for name in recorded.sizes for i in ("x", "mask")}
    intermediate = {f"intermediate{number}/{o}" for number in (0, 1) for o in ("cls", "patch")}
    weights = {key for key in recorded.arrays.files if key.startswith("sd/")}
    assert set(recorded.arrays.files) == compared | inputs | intermediate | weights | {"config"}


def test_packed_crops_give_the_features_and_gradients_of_crops_passed_alone(tiny_vit: ViT) -> None:
    groups = [torch.randn(3, 3, 56, 56), torch.randn(4, 3, 28, 28), torch.randn(1, 3, 42, 28)]
    mask = torch.rand(3, 16) < 0.4
    weights = list(tiny_vit.parameters())

    packed = tiny_vit(groups, [mask, None, None])
    packed_gradients = torch.autograd.grad(sum(f.prenorm.square().sum() for f in packed), weights, allow_unused=True)
    alone = [
        tiny_vit([crop[None]], [mask[row][None] if group is groups[0] else None])[0]
        for group in groups
        for row, crop in enumerate(group)
    ]
    alone_gradients = torch.autograd.grad(sum(f.prenorm.square().sum() for f in alone), weights, allow_unused=True)

    for name in ("cls", "registers", "patches", "prenorm"):
        ours = torch.cat([getattr(features, name).flatten() for features in packed])
        theirs = torch.cat([getattr(features, name).flatten() for features in alone])
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    for ours, theirs in zip(packed_gradients, alone_gradients, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_drop_path_acts_in_training_only(tiny_vit: ViT) -> None:
    dropping = small_vit(drop_path_rate=0.5, num_register_tokens=2)
    dropping.load_state_dict(tiny_vit.state_dict())
    crops = [torch.randn(4, 3, 56, 56), torch.randn(6, 3, 28, 28)]
    (expected, _), (trained, _) = tiny_vit(crops), dropping.train()(crops)
    assert not torch.allclose(trained.cls, expected.cls)
    evaluated, _ = dropping.eval()(crops)
    torch.testing.assert_close(evaluated.cls, expected.cls)


def test_a_seed_repeats_the_drop_path() -> None:
    vit = small_vit(drop_path_rate=0.5)
    crops = [torch.randn(4, 3, 56, 56)]
    outputs = []
    for _ in range(2):
        torch.manual_seed(7)
        outputs.append(vit(crops)[0].cls)
    assert torch.equal(*outputs)


def test_bf16_autocast_stays_near_fp32_and_keeps_the_residual_stream_in_fp32(tiny_vit: ViT) -> None:
    crops = [torch.randn(2, 3, 56, 56), torch.randn(4, 3, 28, 28)]
    exact, _ = tiny_vit(crops)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = tiny_vit(crops)
    rounded.cls.sum().backward()
    assert rounded.prenorm.dtype == rounded.cls.dtype == torch.float32
    torch.testing.assert_close(rounded.cls, exact.cls, atol=0.1, rtol=0.1)
    assert all(p.grad.dtype == torch.float32 for p in tiny_vit.parameters() if p.grad is not None)


def test_a_crop_that_is_no_whole_number_of_patches_is_refused(tiny_vit: ViT) -> None:
    with pytest.raises(UserError, match=r"56x50 px is not a whole number of 14 px patches"):
        tiny_vit([torch.zeros(1, 3, 56, 50)])


@pytest.mark.parametrize(
    ("arch", "parameters"),
    [
        ("vit_small", 22_056_576),
        ("vit_base", 86_580_480),
        ("vit_large", 304_368_640),
        ("vit_giant2", 1_136_480_768),
    ],
)
def test_sizes_have_the_number_of_parameters_of_dinov2s_published_weights(arch: str, parameters: int) -> None:
    config = StudentConfig(arch=arch, patch_size=14, ffn_layer="swiglufused" if arch == "vit_giant2" else "mlp")
    with torch.device("meta"):
        vit = build_backbone(config, 518, drop_path=True)
    assert sum(parameter.numel() for parameter in vit.parameters()) == parameters


def test_drop_path_rates_are_uniform_or_grow_with_depth() -> None:
    def rates(**settings: object) -> list[float]:
        with torch.device("meta"):
            vit = build_backbone(StudentConfig(arch="vit_tiny", drop_path_rate=0.22, **settings), 224, drop_path=True)
        return [block.drop_path_rate for block in vit.blocks]

    assert rates() == [0.22] * 12
    assert rates(drop_path_uniform=False) == pytest.approx([0.02 * number for number in range(12)])


def test_initial_weights_are_dinov2s() -> None:
    torch.manual_seed(0)
    vit = build_backbone(StudentConfig(arch="vit_tiny", patch_size=14, num_register_tokens=4), 224, drop_path=False)
    block = vit.blocks[0]
    assert block.attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.02)
    assert vit.cls_token.abs().max().item() < 1e-5
    assert vit.register_tokens.abs().max().item() < 1e-5
    assert not vit.mask_token.any()
    assert not block.mlp.fc1.bias.any()
    assert (block.ls1.gamma == 1e-5).all()
    fan_in = 3 * 14 * 14
    assert vit.patch_embed.proj.weight.std().item() == pytest.approx((1 / (3 * fan_in)) ** 0.5, rel=0.02)


def test_chunked_names_become_plain_ones_and_others_stay() -> None:
    names = ["backbone.blocks.2.11.mlp.fc1.weight", "blocks.0.3.norm1.bias", "blocks.4.norm1.bias", "norm.weight"]
    assert list(unchunked(dict.fromkeys(names))) == [
        "backbone.blocks.11.mlp.fc1.weight",
        "blocks.3.norm1.bias",
        "blocks.4.norm1.bias",
        "norm.weight",
    ]
